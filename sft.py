"""Supervised warm start on programs rendered from known steps: full fine-tuning, packed, the prompt masked.

    python sft.py --task gsm8k_steps --lang prolog --model DIR --out DIR          from a checkpoint
    python sft.py --task sums --lang lisp --model tiny --out DIR                  from scratch, with a BPE of its own

Reinforcement learning needs a model that is right sometimes; this makes one from a model that never is.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
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
from runtime import distributed, hugging_face
from runtime.tokenizer import ChatTokenizer, train_bpe
from sandbox.languages import load_language
from selfplay import triples
from settings import add_flags, setting
from tasks.problems import load_problems, program_messages
from tasks.render import solution


@dataclass
class WarmStart:
    """Settings of a supervised warm start."""

    task: str = setting(
        "gsm8k_steps",
        "what to learn from: sums, gsm8k_steps or selfplay (synthetic triples in its six prompts)",
    )
    lang: str = setting("prolog", "language to render programs in")
    model: str = setting(
        "tiny", "checkpoint folder or hub id; 'tiny' builds a 1M-parameter model with its own BPE"
    )
    out: str = setting("runs/warm_start", "folder for the trained checkpoint; must not exist")
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    problems: int = setting(0, "use only the first so many problems; 0 = all")
    examples: int = setting(0, "worked examples in the prompt: 0, 1 or 5")
    short_prompt: bool = setting(False, "leave the long instructions out")
    max_prompt_tokens: int = setting(
        1024, "problems with a longer prompt are dropped, and counted at the start"
    )
    references: int = setting(6, "selfplay: most earlier programs in a proposer's prompt")
    steps: int = setting(300, "optimizer steps")
    batch: int = setting(64, "problems per step, over all ranks")
    lr: float = setting(1e-5, "peak learning rate (cosine to 0 after the warm-up)")
    warmup: int = setting(20, "steps of linear warm-up")
    beta2: float = setting(0.95, "AdamW's second-moment decay")
    max_norm: float = setting(1.0, "clip the global gradient norm here")
    token_budget: int = setting(16384, "most tokens in one micro-batch of one rank")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    mistakes: float = setting(
        0.0,
        "share of demonstrations with a typical mistake (its language's TOML): a teacher that barely knows the language",
    )
    seed: int = setting(0, "decides data order, mistakes and random weights")


def tiny_config(vocab_size):
    """About one million parameters: 5 layers of 128, 4 query and 2 key-value heads of 32, tied embeddings."""
    shapes = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return model_file.Config.from_dict(
        {
            "model_type": "qwen2",
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            **shapes,
        }
    )


def make_tiny(problems, language, prompt, folder, seed):
    """A random tiny model and a byte-level BPE trained on the task's own text, written to `folder`."""
    texts = [
        text
        for p in problems[:4000]
        for text in (p.question, solution(p, language), *(m["content"] for m in prompt(p)))
    ]
    make_tiny_from(texts, folder, seed)


def make_tiny_from(texts, folder, seed):
    train_bpe(texts, 768, folder)
    config = tiny_config(ChatTokenizer(folder).vocab_size)
    # Random weights of deviation 0.02, right for large models, are too small at width 128: after 400 steps the loss was 0.27, with 0.08 0.16.
    model = model_file.random_model(config, seed, std=0.08)
    hugging_face.save_model(dict(model.named_parameters()), config, folder, dtype=torch.float32)


def encode(problems, language, tokenizer, prompt, mistakes, seed):
    """Problems with steps -> list[Sequence] with the rendered solution and the stop token as completion."""
    texts = [
        imperfect(solution(p, language), language, mistakes, random.Random(f"{seed}/{p.id}"))
        for p in problems
    ]
    return [
        Sequence(tokenizer.encode_chat(prompt(p)), [*tokenizer.encode(text), tokenizer.stop_ids[0]])
        for p, text in zip(problems, texts)
    ]


def imperfect(text, language, share, rng):
    """With chance `share`, make one of the mistakes of the language's [render] table: [what is right, what stands there instead].

    Prolog: " is " becomes " = ", which compares instead of computing. Only running the program shows the difference.
    """
    kinds = language.render.get("mistakes", [])
    if not kinds or rng.random() >= share:
        return text
    right, wrong = rng.choice(kinds)
    return text.replace(right, wrong)


def short_enough(sequences, limit, report):
    """Drop sequences whose prompt is longer than the limit; say how many, as train.py does."""
    kept = [q for q in sequences if len(q.prompt) <= limit]
    if not kept:
        raise ValueError(
            f"no problem is left: every prompt is longer than --max_prompt_tokens {limit}; raise it, or lower --examples"
        )
    if len(kept) < len(sequences):
        report(
            f"{len(sequences) - len(kept)} of {len(sequences)} problems dropped: their prompt is longer than --max_prompt_tokens {limit}"
        )
    return kept


def train_supervised(model, optimizer, sequences, s, device, report=print):
    """Minimise the mean -log p per completion token for s.steps steps of s.batch sequences -> the last loss."""
    order, started, loss = [], time.perf_counter(), float("nan")
    for step in range(1, s.steps + 1):
        while len(order) < s.batch:
            fresh = list(range(len(sequences)))
            random.Random(f"{s.seed}/{step}").shuffle(fresh)
            order += fresh
        picked, order = [sequences[i] for i in order[: s.batch]], order[s.batch :]
        tokens = sum(len(q.tokens) for q in picked)
        for q in picked:
            q.weight = 1 / tokens
        losses = []
        parts = micro_batches(distributed.share(picked), s.token_budget)
        for batch in packed_batches(parts, device):
            logprobs, _ = model(batch)
            part_loss = -(batch.weights * logprobs).sum()
            backward(part_loss)
            losses.append(float(part_loss.detach()))  # a filler's is 0
        rate = learning_rate(step, s.steps, s.lr, s.warmup, "cosine")
        take_step(model, optimizer, rate, s.max_norm)
        loss = sum(distributed.gather(losses))
        if step % 10 == 0 or step == s.steps:
            report(
                f"warm start {step}/{s.steps}  loss {loss:.3f}  {time.perf_counter() - started:.0f}s"
            )
    return loss


def run(s, problems, language, device, report=print):
    """Warm-start s.model on the problems (selfplay: none are needed) and write the checkpoint to s.out (a collective)."""
    if s.task == "selfplay":
        problems = triples.demonstrations(
            language, s.problems or 6000, s.seed, s.references, s.short_prompt
        )
    out = Path(s.out)
    prompt = lambda p: program_messages(p, language, examples=s.examples, system=not s.short_prompt)
    source = (
        out.with_name(out.name + ".init")
        if s.model == "tiny"
        else hugging_face.find_checkpoint(s.model)
    )
    if s.model == "tiny" and distributed.rank() == 0:
        if s.task == "selfplay":
            make_tiny_from([text for pair in problems[:4000] for text in pair], source, s.seed)
        else:
            make_tiny(problems, language, prompt, source, s.seed)
    if s.model == "tiny":
        distributed.mirror(source)
    tokenizer = ChatTokenizer(source)
    model = hugging_face.load_model(source)
    config = model.config
    model.gradient_checkpointing = s.gradient_checkpointing
    model = distributed.shard(model, device)
    if s.task == "selfplay":
        sequences = [
            Sequence(tokenizer.encode(text), [*tokenizer.encode(answer), tokenizer.stop_ids[0]])
            for text, answer in problems
        ]
    else:
        sequences = encode(problems, language, tokenizer, prompt, s.mistakes, s.seed)
    sequences = short_enough(sequences, s.max_prompt_tokens, report)
    train_supervised(model, make_optimizer(model, beta2=s.beta2), sequences, s, device, report)
    weights = {name: distributed.full(p).cpu() for name, p in model.named_parameters()}
    if distributed.rank() == 0:
        partial = out.with_name(out.name + ".tmp")
        hugging_face.save_model(
            weights, config, partial, dtype=torch.float32, tokenizer_from=source
        )
        partial.rename(out)
    distributed.barrier()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, WarmStart)
    s = WarmStart(**vars(parser.parse_args()))
    if Path(s.out).exists():
        raise SystemExit(f"{s.out} exists: give another --out, or remove it")
    language = load_language(s.lang)
    device = distributed.setup()
    problems = (
        []
        if s.task == "selfplay"
        else load_problems(
            s.task, "train", data=s.data or None, count=s.problems or None, seed=s.seed
        )
    )
    report = partial(print, flush=True) if distributed.rank() == 0 else lambda *_: None
    run(s, problems, language, device, report)
    report(f"wrote {s.out}")
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"sft.py: {problem}")
