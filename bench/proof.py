"""Does a real pretrained model get better at Prolog and Lisp? Warm start, evaluation, GRPO on GSM8K, evaluation, the control; one command.

    python -m bench.proof --model DIR                     one GPU: both languages, two seeds and the random-reward control
    python -m bench.proof --model DIR --minutes 9         stop in time; the same command goes on where it was
    python -m bench.proof --model DIR --scale cpu --lang prolog --seeds 0       two cores, some hours: GSM8K's short questions
    python -m bench.proof --model DIR --scale smoke       a few questions and steps: shows that every stage runs

Stages are commands of this repository, printed before they run; each leaves its folder under runs/proof/ and is skipped once it is done. The table
at the end compares the same held-out test questions before and after, and is printed alone by --table.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from eval import print_gained
from tasks.statistics import compare

ROOT = Path(__file__).resolve().parent.parent
# Held-out questions are GSM8K's test split (1,319), those with a prompt of at most `prompt_tokens`; at 70 there are 210 of them, and 1,145 to learn from.
SCALES = {
    "gpu": dict(
        prompt_tokens=1024,
        warm_steps=400,
        batch=64,
        warm_lr=2e-4,
        new=256,
        token_budget=16384,
        checkpointing="true",
        steps=120,
        prompts=64,
        samples=16,
        lr=1e-5,
        eval_problems=500,
        eval_samples=1,
        temperature=0,
        evaluations=4,
    ),
    "cpu": dict(
        prompt_tokens=70,
        warm_steps=200,
        batch=8,
        warm_lr=2e-4,
        new=144,
        token_budget=4096,
        checkpointing="false",
        steps=120,
        prompts=8,
        samples=8,
        lr=2e-5,
        eval_problems=1319,
        eval_samples=2,
        temperature=1,
        evaluations=3,
    ),
    "smoke": dict(
        prompt_tokens=70,
        warm_steps=10,
        batch=8,
        warm_lr=2e-4,
        new=96,
        token_budget=4096,
        checkpointing="false",
        steps=2,
        prompts=2,
        samples=4,
        lr=2e-5,
        eval_problems=60,
        eval_samples=1,
        temperature=0,
        evaluations=1,
    ),
}


def stages(model, languages, seeds, n):
    """(name, command, file that shows it is done, run folder to resume or None) in the order in which they run."""
    asked = f"--short_prompt true --examples 0 --max_prompt_tokens {n['prompt_tokens']}"
    for language in languages:
        warm = f"runs/proof/{language}-warm"
        supervised = (
            f"sft.py --task gsm8k_steps --lang {language} --model {model} --out {warm} {asked}"
        )
        yield (
            f"{language} warm start",
            f"{supervised} --steps {n['warm_steps']} --batch {n['batch']} --lr {n['warm_lr']}",
            f"{warm}/config.json",
            None,
        )
    for seed in seeds:
        for language in languages:
            yield training(language, seed, "", asked, n)
        if (
            seed == seeds[0]
        ):  # before the other seeds: where time ends, a control is worth more than a second seed
            yield training(languages[0], seed, " --reward random", asked, n)


def training(language, seed, extra, asked, n):
    name = f"proof/{language}-{'random' if extra else 'seed'}-{seed}"
    command = (
        f"train.py --task gsm8k --lang {language} --model runs/proof/{language}-warm {asked} --name {name} --seed {seed}{extra} "
        f"--steps {n['steps']} --prompts {n['prompts']} --samples {n['samples']} --max_new_tokens {n['new']} --lr {n['lr']} --warmup 5 --schedule constant "
        f"--token_budget {n['token_budget']} --gradient_checkpointing {n['checkpointing']} "
        f"--eval_problems {n['eval_problems']} --eval_samples {n['eval_samples']} --eval_temperature {n['temperature']} "
        f"--eval_every {-(-n['steps'] // n['evaluations'])} --save_every 10 --wandb off"
    )
    return name, command, f"runs/{name}/eval/step_{n['steps']}.jsonl", f"runs/{name}"


def run(command, deadline):
    """One stage -> True when it ended well; at the deadline, and when this process gets one, it gets Ctrl-C, which loses nothing."""
    heard = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs ignore Ctrl-C, and their children inherit that
    process = subprocess.Popen([sys.executable, *command.split()], preexec_fn=heard)
    try:
        code = process.wait(None if deadline is None else max(1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(f"stopped: {command.split()[0]} ended with {code}; its message stands above")
    return True


def table():
    """Held-out pass@1 before and after of every run that has both, with the 95 % interval of the paired difference over problems; programs of the first."""
    shown = None
    print(
        "\n| run | steps | pass@1 before | after | gain | problems gained, lost | constant programs before, after | hours |\n"
        + "| --- " * 8
        + "|"
    )
    for folder in sorted(Path("runs/proof").glob("*-*-*")):
        files = {
            int(p.stem.removeprefix("step_")): p for p in (folder / "eval").glob("step_*.jsonl")
        }
        if len(files) > 1:
            last = max(files)
            before, after = (
                [json.loads(line) for line in files[step].read_text().splitlines()]
                for step in (0, last)
            )
            c, constant = (
                compare(before, after),
                [sum(r["constant"] for r in rows) / len(rows) for rows in (before, after)],
            )
            hours = (
                sum(
                    json.loads(line).get("time/step", 0.0)
                    for line in (folder / "times.jsonl").read_text().splitlines()
                )
                / 3600
            )
            gain = f"{100 * c['difference']:+.1f} ({100 * c['difference_low']:+.1f} to {100 * c['difference_high']:+.1f})"
            rates = f"{c['pass@1_a']:.3f} | {c['pass@1_b']:.3f} | {gain} | {len(c['gained'])}, {len(c['lost'])} of {c['problems']}"
            print(
                f"| {folder.name} | {last} | {rates} | {constant[0]:.3f}, {constant[1]:.3f} | {hours:.2f} |"
            )
            shown = shown or (before, after)
    if shown:
        print_gained(*shown)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder or hub id")
    parser.add_argument("--lang", default="prolog,lisp")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after so long; 0 = no limit"
    )
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    options = parser.parse_args()
    if options.table:
        return table()
    if not options.model:
        parser.error("--model is needed: a checkpoint folder or a hub id")
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for name, command, done, folder in stages(
        options.model, options.lang.split(","), seeds, SCALES[options.scale]
    ):
        if Path(done).exists():
            continue
        if folder and (Path(folder) / "config.json").exists():
            command = f"train.py --resume {folder}"
        script, rest = command.split(" ", 1)
        print(f"== {name}: python {command}", flush=True)
        if not run(f"{ROOT / script} {rest}", deadline):
            print("stopped in time: the same command goes on from here")
            break
    table()


if __name__ == "__main__":
    main()
