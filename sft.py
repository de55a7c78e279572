"""Supervised warm start on programs rendered from known steps: all weights, packed, prompt masked.

    python sft.py --task gsm8k_steps --lang prolog --model DIR --out DIR    from a checkpoint
    python sft.py --task sums --lang lisp --model tiny --out DIR            from scratch, own BPE
    python sft.py --task gsm8k --answers runs/eval/NAME/prolog/samples.jsonl --model DIR --out DIR

Reinforcement learning needs a model that is right sometimes; this makes one from a model that
never is. The third form learns from a model's own right answers (rejection sampling: RFT, arXiv
2308.01825), the baseline that reinforcement learning has to beat.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import model as model_file
from batches import (
    Sequence,
    backward,
    learning_rate,
    make_optimizer,
    micro_batches,
    packed_batches,
    take_step,
)
from rewards import parse
from runtime import distributed, hugging_face, memory
from runtime.tokenizer import ChatTokenizer, train_bpe
from sandbox.languages import load_language
from selfplay import triples
from settings import Settings, add_flags, check_values, setting
from tasks.data import hold_out, read_jsonl, take
from tasks.problems import load_problems, program_messages, question_of, with_worked_text
from tasks.render import solution

# The tiny model's BPE learns from the texts of so many problems, to so many tokens.
BPE_PROBLEMS = 4000
BPE_TOKENS = 768


@dataclass
class WarmStart:
    """Settings of a supervised warm start."""

    task: str = setting(
        "gsm8k_steps",
        "what to learn from: sums, gsm8k_steps, gsm8k (with --answers) or selfplay (synthetic "
        "triples in its six prompts)",
        section="what is learnt",
    )
    lang: str = setting("prolog", "language to render programs in")
    model: str = setting(
        "tiny", "checkpoint folder or hub id; 'tiny' builds a 1M-parameter model with its own BPE"
    )
    out: str = setting("runs/warm_start", "folder for the trained checkpoint; must not exist")
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    problems: int = setting(0, "use only so many problems; 0 = all")
    validation_problems: int = setting(
        200, "leave out what train.py with this setting holds out of the training split"
    )
    examples: int = setting(0, "worked examples in the prompt: 0, 1 or 5")
    short_prompt: bool = setting(False, "leave the long instructions out")
    max_prompt_tokens: int = setting(
        1024, "problems with a longer prompt are dropped, and counted at the start"
    )
    reasoning: str = setting(
        "steps",
        "what stands in <reasoning>: the steps as equations, or text, GSM8K's own words "
        "(gsm8k_steps)",
        choices=("steps", "text"),
    )
    answers: str = setting(
        "",
        "samples.jsonl of runs, or of evaluations of the training split (eval.py --split train), "
        "with commas: learn from their right answers instead",
    )
    answers_each: int = setting(4, "--answers: most different programs of a problem", least=1)
    references: int = setting(6, "selfplay: most earlier programs in a proposer's prompt")

    steps: int = setting(300, "optimizer steps", section="training")
    batch: int = setting(64, "problems per step, over all ranks")
    lr: float = setting(1e-5, "peak learning rate (cosine to 0 after the warm-up)")
    warmup: int = setting(20, "steps of linear warm-up")
    beta2: float = setting(0.95, "AdamW's second-moment decay")
    max_norm: float = setting(1.0, "clip the global gradient norm here")
    token_budget: int = setting(16384, "most tokens in one micro-batch of one rank")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    mistakes: float = setting(
        0.0,
        "share of demonstrations with a typical mistake (its language's TOML): "
        "a teacher that barely knows the language",
    )
    seed: int = setting(0, "decides data order, mistakes and random weights")


def run(settings, problems, language, device, report=print):
    """Warm-start settings.model on the problems and write the checkpoint to settings.out.

    problems: with steps to render; selfplay makes its own and needs none. A collective.
    """
    selfplay = settings.task == "selfplay"
    if selfplay:
        demonstrations = triples.demonstrations(
            language,
            settings.problems or 6000,
            settings.seed,
            settings.references,
            settings.short_prompt,
            settings.mistakes,
        )

    def prompt(problem):
        return program_messages(
            problem, language, examples=settings.examples, system=not settings.short_prompt
        )

    # The checkpoint to start from: the user's, or the tiny model, made by rank 0.
    out = Path(settings.out)
    if settings.model == "tiny":
        source = out.with_name(out.name + ".init")
        if distributed.rank() == 0 and selfplay:
            texts = [text for pair in demonstrations[:BPE_PROBLEMS] for text in pair]
            make_tiny_from(texts, source, settings.seed)
        elif distributed.rank() == 0:
            make_tiny(problems, language, prompt, source, settings.seed)
        distributed.mirror(source)
    else:
        source = hugging_face.find_checkpoint(settings.model)

    tokenizer = ChatTokenizer(source)
    if selfplay:
        sequences = []
        for text, answer in demonstrations:
            tokens = [*tokenizer.encode(answer), tokenizer.stop_ids[0]]
            sequences.append(Sequence(tokenizer.encode(text), tokens))
    else:
        if settings.answers:
            answers = right_answers(settings.answers, problems, language, settings.answers_each)
        else:
            answers = rendered(problems, language, settings.mistakes, settings.seed)
        report(f"{len(answers)} answers to {len({problem.id for problem, _ in answers})} problems")
        sequences = encode(answers, tokenizer, prompt)
    sequences = short_enough(sequences, settings.max_prompt_tokens, report)

    config = hugging_face.read_config(source)
    memory.check(config, as_step(settings, sequences), device, report, adapters=False)
    model = hugging_face.load_model(source)
    model.gradient_checkpointing = settings.gradient_checkpointing
    model = distributed.shard(model, device)

    optimizer = make_optimizer(model, beta2=settings.beta2)
    train_supervised(model, optimizer, sequences, settings, device, report)

    # Written beside its place and renamed, so that `out` is whole or not there.
    weights = {name: distributed.full(p).cpu() for name, p in model.named_parameters()}
    if distributed.rank() == 0:
        unfinished = out.with_name(out.name + ".tmp")
        hugging_face.save_model(
            weights, config, unfinished, dtype=torch.float32, tokenizer_from=source
        )
        unfinished.rename(out)
    distributed.barrier()


# ---- the tiny model ----


def make_tiny(problems, language, prompt, folder, seed):
    """A random tiny model and a byte-level BPE of the task's own text, written to `folder`."""
    texts = []
    for problem in problems[:BPE_PROBLEMS]:
        texts += [problem.question, solution(problem, language)]
        texts += [message["content"] for message in prompt(problem)]
    make_tiny_from(texts, folder, seed)


def make_tiny_from(texts, folder, seed):
    """make_tiny of any texts."""
    train_bpe(texts, BPE_TOKENS, folder)
    config = tiny_config(ChatTokenizer(folder).vocab_size)
    # Random weights of deviation 0.02, right for large models, are too small at width 128: after
    # 400 steps the loss was 0.27, with 0.08 it was 0.16.
    model = model_file.random_model(config, seed, std=0.08)
    hugging_face.save_model(dict(model.named_parameters()), config, folder, dtype=torch.float32)


def tiny_config(vocab_size):
    """About one million parameters: 5 layers of 128, 4 query and 2 key-value heads, tied."""
    return model_file.Config.from_dict(
        {
            "model_type": "qwen2",
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )


# ---- demonstrations ----


def encode(answers, tokenizer, prompt):
    """[(problem, text)] -> list[Sequence]: the text and the stop token to learn."""
    sequences = []
    for problem, text in answers:
        tokens = [*tokenizer.encode(text), tokenizer.stop_ids[0]]
        sequences.append(Sequence(tokenizer.encode_chat(prompt(problem)), tokens))
    return sequences


def right_answers(paths, problems, language, most):
    """[(problem, text)] of samples.jsonl files: right ones in the right form, of these problems, at
    most so many different programs of each, the first ones.

    ValueError with one sentence where there is none.
    """
    texts = {problem.id: {} for problem in problems}  # program without its spaces -> text
    for path in paths.split(","):
        for id, is_right, text in read_jsonl(path, _answer):
            parsed = parse(text, language)
            programs = texts.get(id)
            is_wanted = programs is not None and len(programs) < most
            if is_wanted and is_right and parsed.format_ok:
                programs.setdefault("".join(parsed.code.split()), text)
    found = [(problem, text) for problem in problems for text in texts[problem.id].values()]
    if not found:
        raise ValueError(
            f"{paths}: no right answer to a problem of the training split is in there; make some "
            "with eval.py --split train --samples 8 --temperature 1"
        )
    return found


def _answer(_, row):
    """(problem's id, is it right, text) of a row of an evaluation or a run."""
    return row["id"] if "id" in row else row["problem"], row["correct"], row["text"]


def rendered(problems, language, mistakes, seed):
    """[(problem, text)] of problems with steps.

    mistakes: the share of them that gets one of the language's mistakes.
    """
    found = []
    for problem in problems:
        rng = random.Random(f"{seed}/{problem.id}")
        found.append((problem, imperfect(solution(problem, language), language, mistakes, rng)))
    return found


def imperfect(text, language, share, rng):
    """With chance `share`, make one mistake of the language's [render] table.

    The table holds pairs of what is right and what stands there instead. Prolog: " is " becomes
    " = ", which compares instead of computing. Only running the program shows the difference.
    """
    kinds = language.render.get("mistakes", [])
    if not kinds or rng.random() >= share:
        return text
    right, wrong = rng.choice(kinds)
    return text.replace(right, wrong)


def short_enough(sequences, limit, report):
    """Drop sequences whose prompt is longer than the limit; say how many, as train.py does."""
    kept = [sequence for sequence in sequences if len(sequence.prompt) <= limit]
    if not kept:
        raise ValueError(
            f"no problem is left: every prompt is longer than --max_prompt_tokens {limit}; "
            "raise it, or lower --examples"
        )
    dropped = len(sequences) - len(kept)
    if dropped:
        report(
            f"{dropped} of {len(sequences)} problems dropped: "
            f"their prompt is longer than --max_prompt_tokens {limit}"
        )
    return kept


# ---- training ----


def as_step(settings, sequences):
    """A step as the memory plan of train.py knows it: a prompt for each demonstration."""
    return Settings(
        prompts=settings.batch,
        samples=1,
        slots=1,  # it samples nothing
        share_prompts=False,
        max_prompt_tokens=max(len(sequence.prompt) for sequence in sequences),
        max_new_tokens=max(len(sequence.tokens) for sequence in sequences),
        token_budget=settings.token_budget,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def train_supervised(model, optimizer, sequences, settings, device, report=print):
    """Minimise the mean -log p per completion token -> the last step's loss.

    settings: steps, batch (sequences of a step, over all ranks), lr, warmup, max_norm, token_budget
    and seed of a WarmStart.
    """
    started = time.perf_counter()
    order = []  # of the sequences still to come in this pass
    loss = float("nan")
    for step in range(1, settings.steps + 1):
        # The step's sequences: the next of a pass, and of a new pass where one ends.
        while len(order) < settings.batch:
            fresh = list(range(len(sequences)))
            random.Random(f"{settings.seed}/{step}").shuffle(fresh)
            order += fresh
        picked = [sequences[i] for i in order[: settings.batch]]
        order = order[settings.batch :]

        # One denominator for the whole step, whatever the micro-batches and ranks.
        tokens = sum(len(sequence.tokens) for sequence in picked)
        for sequence in picked:
            sequence.weight = 1 / tokens

        losses = []
        parts = micro_batches(distributed.share(picked), settings.token_budget)
        for batch in packed_batches(parts, device):
            logprobs, _ = model(batch)
            part_loss = -(batch.weights * logprobs).sum()
            backward(part_loss)
            losses.append(part_loss.detach())  # a filler's is 0

        rate = learning_rate(step, settings.steps, settings.lr, settings.warmup, "cosine")
        take_step(model, optimizer, rate, settings.max_norm)
        loss = sum(distributed.gather(torch.stack(losses).tolist()))
        if step % 10 == 0 or step == settings.steps:
            seconds = time.perf_counter() - started
            report(f"warm start {step}/{settings.steps}  loss {loss:.3f}  {seconds:.0f}s")
    return loss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, WarmStart)
    settings = WarmStart(**vars(parser.parse_args()))
    check_values(settings)
    if settings.task == "selfplay" and (settings.answers or settings.reasoning != "steps"):
        raise SystemExit("--task selfplay makes its own texts: leave --answers and --reasoning out")
    if Path(settings.out).exists():
        raise SystemExit(f"{settings.out} exists: give another --out, or remove it")

    language = load_language(settings.lang)
    device = distributed.setup()
    problems = []
    if settings.task != "selfplay":
        count = settings.problems and settings.problems + settings.validation_problems
        split = load_problems(
            settings.task,
            "train",
            data=settings.data or None,
            count=count or None,
            seed=settings.seed,
        )
        rest, _ = hold_out(split, settings.validation_problems, question_of)
        problems = take(rest, settings.problems or None, settings.seed)
        if settings.reasoning == "text":
            problems = with_worked_text(problems, settings.data or None)

    def report(text):
        if distributed.rank() == 0:
            print(text, flush=True)

    run(settings, problems, language, device, report)
    report(f"wrote {settings.out}")
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"sft.py: {problem}")
