"""Does a real pretrained model get better at Prolog and Lisp? Warm start, evaluation, GRPO on GSM8K, evaluation, the control; one command.

    python proof.py --model DIR                     one GPU: both languages, two seeds and the random-reward control
    python proof.py --model DIR --minutes 9         stop in time; the same command goes on where it was
    python proof.py --model DIR --small             a few questions and steps on a CPU: shows that every stage runs

Stages are commands of this repository, printed before they run; each leaves its folder under runs/proof/ and is skipped once it is done.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FULL = dict(warm_steps=400, batch=64, steps=120, prompts=64, samples=16, eval_problems=500, warm_lr=2e-4, lr=5e-6, new=256)
SMALL = dict(warm_steps=20, batch=8, steps=2, prompts=4, samples=4, eval_problems=8, warm_lr=2e-4, lr=5e-6, new=160)


def stages(model, languages, seeds, n):
    """(name, command, file that shows it is done, run folder to resume or None) in the order in which they run."""
    for language in languages:
        warm = f"runs/proof/{language}-warm"
        supervised = f"sft.py --task gsm8k_steps --lang {language} --model {model} --out {warm} --short_prompt true --examples 0"
        yield f"{language} warm start", f"{supervised} --steps {n['warm_steps']} --batch {n['batch']} --lr {n['warm_lr']}", f"{warm}/config.json", None
    for seed in seeds:
        for language in languages:
            yield training(language, seed, "", n)
    yield training(languages[0], seeds[0], " --reward random", n)


def training(language, seed, extra, n):
    name = f"proof/{language}-{'random' if extra else 'seed'}-{seed}"
    command = (
        f"train.py --task gsm8k --lang {language} --model runs/proof/{language}-warm --short_prompt true --examples 0 --name {name} --seed {seed}{extra} "
        f"--steps {n['steps']} --prompts {n['prompts']} --samples {n['samples']} --max_new_tokens {n['new']} --lr {n['lr']} --warmup 5 --schedule constant "
        f"--eval_problems {n['eval_problems']} --eval_every {max(2, n['steps'] // 4)} --save_every 10 --wandb off"
    )
    return name, command, f"runs/{name}/eval/step_{n['steps']}.jsonl", f"runs/{name}"


def run(command, deadline):
    """One stage -> True when it ended well; at the deadline it gets Ctrl-C, which loses nothing."""
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and their children inherit that
    process = subprocess.Popen([sys.executable, *command.split()], preexec_fn=heard)
    try:
        code = process.wait(None if deadline is None else max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(f"stopped: {command.split()[0]} ended with {code}; its message stands above")
    return True


def passed(path):
    verdicts = [json.loads(line)["correct"] for line in path.read_text().splitlines()]
    return sum(verdicts) / len(verdicts)


def table():
    """pass@1 on held-out GSM8K test questions before and after, of every run that has both."""
    print("\n| run | steps | pass@1 before | after | gain | last constant share |\n| --- | --- | --- | --- | --- | --- |")
    for folder in sorted(Path("runs/proof").glob("*-*-*")):
        evaluated = {int(p.stem.removeprefix("step_")): passed(p) for p in (folder / "eval").glob("step_*.jsonl")}
        if len(evaluated) > 1:
            last, rows = max(evaluated), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            before, after = evaluated[0], evaluated[last]
            print(f"| {folder.name} | {last} | {before:.3f} | {after:.3f} | {100 * (after - before):+.1f} | {rows[-1].get('completions/constant_frac', float('nan')):.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--lang", default="prolog,lisp")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0 = no limit")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for name, command, done, folder in stages(options.model, options.lang.split(","), seeds, SMALL if options.small else FULL):
        if Path(done).exists():
            continue
        if folder and (Path(folder) / "config.json").exists():
            command = f"train.py --resume {folder}"
        script, rest = command.split(" ", 1)
        print(f"== {name}: python {command}", flush=True)
        if not run(f"{ROOT / script} {rest}", deadline):
            print("time is up: the same command goes on from here")
            break
    table()


if __name__ == "__main__":
    main()
