"""TRL's GRPOTrainer does a finished run again: same warm start, problems, judge, batch and rates.

    python train.py --recipe recipes/tiny.toml --lang prolog --name ours
    python -m bench peer --run runs/ours

Both final models are evaluated by eval.py on the run's held-out problems. The table has the seconds
of the rollouts alone (no warm start, no evaluation). Needs pip install trl datasets (TRL 1.16).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from rewards import Judge
from sandbox import Pool
from settings import Settings, read_config
from tasks.problems import load_problems, program_messages


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench peer")
    parser.add_argument("--run", type=Path, required=True, help="a finished run with a warm start")
    folder = parser.parse_args(arguments).run
    settings = Settings(**read_config(folder))

    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    ours = sum(row["time/step"] for row in rows if row["step"] > 0)
    checkpoint = folder / "checkpoints" / f"step_{settings.steps}"
    theirs = trl_run(settings, folder / "warm_start", folder / "trl")

    table = {
        "before": (0.0, held_out_pass(settings, folder / "warm_start")),
        "rarecode": (ours, held_out_pass(settings, checkpoint)),
        "TRL": (theirs, held_out_pass(settings, folder / "trl")),
    }
    for name, (seconds, rate) in table.items():
        print(f"{name:<10}{seconds:>8.0f} s   pass@1 {rate:.3f}")
    print(json.dumps(table))


def trl_run(settings, warm_start, out):
    """Seconds of TRL's rollouts; the model goes to `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(warm_start, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.eos_token = "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(warm_start, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    with Pool() as pool:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=rewards_of(settings, Judge(pool, settings.lang)),
            args=trl_settings(settings, out),
            train_dataset=questions(settings),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return seconds


def questions(settings):
    """TRL's data set: chat messages, and the ids by which the reward finds the problem."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    problems = load_problems(settings.task, "train")
    prompts = [program_messages(p, settings.lang, examples=0, system=False) for p in problems]
    table = InMemoryTable.from_pydict({"prompt": prompts, "id": [p.id for p in problems]})
    return Dataset(table, fingerprint="questions")


def rewards_of(settings, judge):
    """TRL's reward function: completions run in the same sandbox, by the same judge."""
    problems = {problem.id: problem for problem in load_problems(settings.task, "train")}
    started = time.perf_counter()

    def reward(completions, id, **_):
        submissions = []
        for sample, (name, messages) in enumerate(zip(id, completions)):
            submissions.append(judge.submit(problems[name], messages[0]["content"], sample))
        found = [verdict.reward for verdict in judge.collect(submissions)]
        seconds = time.perf_counter() - started
        print(f"TRL: reward {sum(found) / len(found):.3f} at {seconds:.0f} s", flush=True)
        return found

    return reward


def trl_settings(settings, out):
    """The run's settings under TRL's names."""
    from trl import GRPOConfig

    rollout = settings.prompts * settings.samples
    return GRPOConfig(
        output_dir=f"{out}.state",
        max_steps=settings.steps * settings.minibatches,
        per_device_train_batch_size=rollout // settings.minibatches,
        steps_per_generation=settings.minibatches,
        gradient_accumulation_steps=1,
        num_generations=settings.samples,
        max_completion_length=settings.max_new_tokens,
        temperature=1.0,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup * settings.minibatches,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_norm,
        loss_type="dapo",
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        beta=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        seed=settings.seed,
    )


def held_out_pass(settings, model):
    """pass@1 at temperature 1 on the run's held-out problems."""
    out = f"{model}.eval"
    command = [sys.executable, "eval.py", "--model", str(model), "--out", out]
    command += ["--bench", settings.task, "--lang", settings.lang, "--short_prompt", "true"]
    command += ["--examples", "0", "--problems", str(settings.eval_problems)]
    command += ["--samples", str(settings.eval_samples), "--temperature", "1"]
    command += ["--max_new_tokens", str(settings.max_new_tokens)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path(out, settings.lang, "results.json").read_text())["pass@1"]
