"""Does a real pretrained model get better at Prolog and Lisp, or only surer?

Evaluation, GRPO on GSM8K from the instruct model itself with one worked example, evaluation, and
the same with a random reward; one command.

    python -m bench.proof --model DIR                  one GPU: both languages with their
                                                       random-reward controls, two seeds
    python -m bench.proof --model DIR --minutes 9      stop in time; the same command continues
    python -m bench.proof --model DIR --scale cpu --lang prolog --seeds 0
                                                       two cores, some hours
    python -m bench.proof --model DIR --scale smoke    a few questions and steps: every stage runs

Stages are runs of train.py, printed before they start; each leaves its folder under runs/proof/ and
is skipped once it is done. The table at the end, which --table prints alone, compares the same
held-out questions before and after: greedy, and n samples at temperature 1. Gain raises pass@n;
where pass@1 alone rises, the model has become surer. runs/proof/report.html shows all runs.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.report import read_evaluations, read_rows, write_page
from eval import print_gained
from runtime import content
from runtime.hugging_face import find_checkpoint
from tasks.statistics import changes

ROOT = Path(__file__).resolve().parent.parent
PROOF = Path("runs/proof")
# At temperature 1 the 0.5B has the form in 35 of 100 samples and is right in 2: with a reward for
# right answers alone, 18 of the first 20 groups of 8 had no signal. The form is asked for either way.
REWARD = "correct=1,soft_format=0.2"
# Measured on two cores, one seed each (BENCHMARKS.md): with DAPO, temperature 1 and lr 1e-5 the
# reasoning shrank from 69 words to 21 and greedy did not rise (0.10, 0.06); with these and 3e-6 it
# has 50 words and 0.21; on an H200 with 5e-6 0.12 became 0.23. Advantages that no standard
# deviation divides keep the form a fifth.
MILD = "--loss dr_grpo --temperature 0.7"


@dataclass(frozen=True)
class Scale:
    """How large a run is. Held-out questions are GSM8K's test split (1,319)."""

    steps: int
    prompts: int
    samples: int
    prompt_tokens: int  # longest prompt, with its worked example
    new: int  # longest completion
    lr: float
    eval_problems: int
    eval_samples: int  # at temperature 1, beside a greedy one
    evaluations: int  # after the one before training
    save_every: int


SCALES = {
    # 64 x 16 samples of a 0.5B on an H200: 2.4 s a step, 16 s an evaluation, four minutes in all.
    "gpu": Scale(
        steps=60,
        prompts=64,
        samples=16,
        prompt_tokens=1024,
        new=400,
        lr=5e-6,
        eval_problems=500,
        eval_samples=16,
        evaluations=2,
        save_every=30,
    ),
    # 4 x 8 samples of a 0.5B model on two cores: one to two minutes a step, 6 to 15 an evaluation.
    "cpu": Scale(
        steps=40,
        prompts=4,
        samples=8,
        prompt_tokens=1024,
        new=256,
        lr=3e-6,
        eval_problems=150,
        eval_samples=4,
        evaluations=1,
        save_every=2,
    ),
    "smoke": Scale(
        steps=2,
        prompts=2,
        samples=4,
        prompt_tokens=1024,
        new=24,
        lr=5e-6,
        eval_problems=4,
        eval_samples=2,
        evaluations=2,
        save_every=1,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One run of train.py."""

    name: str  # below runs/
    command: str

    def is_done(self, steps):
        """Whether the evaluation after the last step is there; it is written whole or not."""
        return Path("runs", self.name, f"eval/step_{steps}.jsonl").exists()

    def is_begun(self):
        return Path("runs", self.name, "config.json").exists()


def stages(model, languages, seeds, scale):
    """The stages in the order in which they run.

    Each language's first seed, then its control: where time ends, a control is worth more than a
    second seed.
    """
    for language in languages:
        yield training(model, language, seeds[0], "correct", scale)
        yield training(model, language, seeds[0], "random", scale)
    for seed in seeds[1:]:
        for language in languages:
            yield training(model, language, seed, "correct", scale)


def training(model, language, seed, reward, scale):
    """GRPO with its evaluations before and after; reward: correct, or random for the control."""
    name = f"proof/{language}-{'random' if reward == 'random' else 'seed'}-{seed}"
    words = [
        f"train.py --task gsm8k --recipe {ROOT}/recipes/gsm8k.toml --lang {language}",
        f"--model {model} --name {name} --seed {seed}",
    ]
    words.append(f"--reward {'random' if reward == 'random' else REWARD}")
    words += [
        MILD,
        f"--steps {scale.steps} --prompts {scale.prompts} --samples {scale.samples}",
        f"--max_prompt_tokens {scale.prompt_tokens} --max_new_tokens {scale.new}",
        f"--lr {scale.lr} --warmup 5 --schedule constant",
        f"--eval_problems {scale.eval_problems} --eval_samples {scale.eval_samples}",
        "--eval_temperature 1 --eval_greedy true --validation_problems 0",
        f"--eval_every {math.ceil(scale.steps / scale.evaluations)}",
        f"--save_every {scale.save_every} --keep 1 --wandb off",
    ]
    return Stage(name, " ".join(words))


def check_start(model, scale):
    """End with a sentence when runs/proof/ has runs of other weights or of another scale."""
    start = {"weights": content.weights(find_checkpoint(model)), "scale": scale}
    file = PROOF / "start.json"
    if file.exists() and json.loads(file.read_text()) != start:
        sys.exit(
            "runs/proof/ holds runs of another model or scale: move it away to begin anew "
            "(--table prints its table)"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(start))


def run(command, deadline):
    """Run one stage -> True when it ended well.

    At the deadline, and when this process gets one, it gets Ctrl-C, which loses the steps since the
    last checkpoint at most.
    """

    def hear_interrupts():
        # A shell's background jobs ignore Ctrl-C, and their children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, *command.split()], preexec_fn=hear_interrupts)
    seconds = None if deadline is None else max(1, deadline - time.monotonic())
    try:
        code = process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(f"stopped: {command.split()[0]} ended with {code}; its message stands above")
    return True


# ---- the table ----


def table():
    """Print every run's figures before and after, programs that a run gained, and the page."""
    print(
        "\n| run | steps | held-out figure | before (95 %) | after (95 %) | gain in points (95 %, "
        "paired) | problems gained, lost | constant programs before, after | hours |\n"
        + "| --- " * 9
        + "|"
    )
    shown = None
    folders = []
    for folder in sorted(PROOF.glob("*-*-*")):
        ends, _ = read_evaluations(folder, [])
        kinds = [kind for kind in ends if len(ends[kind]) == 2]
        for kind in kinds:
            before, after = ends[kind].values()
            print_rows(folder, max(ends[kind]), kind, before, after)
            shown = shown or (before, after)
        if kinds:
            folders.append(folder)
    if shown:
        print_gained(*shown)
        print(f"\nAll runs as a page: {write_page(folders, PROOF / 'report.html')}")


def print_rows(folder, steps, kind, before, after):
    """The rows of one run's greedy samples (kind greedy), or of those at temperature 1 (eval)."""
    how = "greedy" if kind == "greedy" else "at temperature 1"
    constant = f"{constant_share(before):.3f}, {constant_share(after):.3f}"
    for figure, change in changes(before, after).items():
        cells = [
            folder.name,
            str(steps),
            f"{figure} {how}",
            with_interval("{:.3f}", change["before"]),
            with_interval("{:.3f}", change["after"]),
            with_interval("{:+.1f}", [100 * value for value in change["gain"]]),
            f"{change['gained']}, {change['lost']} of {change['problems']}",
            constant,
            f"{hours(folder):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def with_interval(form, values):
    value, low, high = map(form.format, values)
    return f"{value} ({low} to {high})"


def hours(folder):
    """Of the run's steps and evaluations, as times.jsonl has them."""
    seconds = 0.0
    for row in read_rows(folder / "times.jsonl", {"time/step"}, []):
        seconds += row["time/step"] + row.get("time/eval", 0.0)
    return seconds / 3600


def constant_share(rows):
    """Share of programs that compute nothing: the model did the sum itself."""
    return sum(row["constant"] for row in rows) / len(rows)


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

    check_start(options.model, options.scale)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    languages = options.lang.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    scale = SCALES[options.scale]
    for stage in stages(options.model, languages, seeds, scale):
        if stage.is_done(scale.steps):
            continue
        command = stage.command
        if stage.is_begun():
            command = f"train.py --resume runs/{stage.name}"

        script, words = command.split(" ", 1)
        print(f"== {stage.name}: python {command}", flush=True)
        if not run(f"{ROOT / script} {words}", deadline):
            print("stopped in time: the same command continues from here")
            break
    table()


if __name__ == "__main__":
    main()
