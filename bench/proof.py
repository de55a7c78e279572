"""Does a real pretrained model get better at Prolog and Lisp?

Warm start, evaluation, GRPO on GSM8K, evaluation, the control; one command.

    python -m bench.proof --model DIR                  one GPU: both languages, two seeds and the
                                                       random-reward control
    python -m bench.proof --model DIR --minutes 9      stop in time; the same command continues
    python -m bench.proof --model DIR --scale cpu --lang prolog --seeds 0
                                                       two cores, some hours: short questions
    python -m bench.proof --model DIR --scale smoke    a few questions and steps: every stage runs

Stages are commands of this repository, printed before they run; each leaves its folder under
runs/proof/ and is skipped once it is done. The table at the end compares the same held-out test
questions before and after, and is printed alone by --table.
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

from eval import print_gained
from runtime import content
from runtime.hugging_face import find_checkpoint
from tasks.statistics import compare

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Scale:
    """How large the stages are. Held-out questions are GSM8K's test split (1,319)."""

    prompt_tokens: int  # longest prompt
    warm_steps: int
    batch: int  # demonstrations of a warm-start step
    warm_lr: float
    new: int  # longest completion
    token_budget: int
    checkpointing: str  # true or false
    steps: int
    prompts: int
    samples: int
    lr: float
    eval_problems: int
    eval_samples: int
    temperature: int  # of evaluation
    evaluations: int  # after the one before training


SCALES = {
    "gpu": Scale(
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
    # Prompts of at most 70 tokens leave 210 held-out questions, and 1,145 to learn from, of which
    # some are validation problems.
    "cpu": Scale(
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
    "smoke": Scale(
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


@dataclass(frozen=True)
class Stage:
    """One command of the proof."""

    name: str
    command: str
    done: str  # the file that shows that it is done
    run_folder: str | None = None  # what train.py resumes


def stages(model, languages, seeds, scale):
    """The stages in the order in which they run."""
    asked = f"--short_prompt true --examples 0 --max_prompt_tokens {scale.prompt_tokens}"
    for language in languages:
        warm = f"runs/proof/{language}-warm"
        command = (
            f"sft.py --task gsm8k_steps --lang {language} --model {model} --out {warm} {asked} "
            f"--steps {scale.warm_steps} --batch {scale.batch} --lr {scale.warm_lr}"
        )
        yield Stage(f"{language} warm start", command, f"{warm}/config.json")

    for seed in seeds:
        for language in languages:
            yield training(language, seed, "correct", asked, scale)
        # Before the other seeds: where time ends, a control is worth more than a second seed.
        if seed == seeds[0]:
            yield training(languages[0], seed, "random", asked, scale)


def training(language, seed, reward, asked, scale):
    """GRPO from the language's warm start; reward: correct, or random for the control."""
    name = f"proof/{language}-{'random' if reward == 'random' else 'seed'}-{seed}"
    words = [
        f"train.py --task gsm8k --lang {language} --model runs/proof/{language}-warm {asked}",
        f"--name {name} --seed {seed}",
    ]
    if reward == "random":
        words.append("--reward random")
    words += [
        f"--steps {scale.steps} --prompts {scale.prompts} --samples {scale.samples}",
        f"--max_new_tokens {scale.new} --lr {scale.lr} --warmup 5 --schedule constant",
        f"--token_budget {scale.token_budget} --gradient_checkpointing {scale.checkpointing}",
        f"--eval_problems {scale.eval_problems} --eval_samples {scale.eval_samples}",
        f"--eval_temperature {scale.temperature}",
        f"--eval_every {math.ceil(scale.steps / scale.evaluations)}",
        "--save_every 10 --wandb off",
    ]
    folder = f"runs/{name}"
    return Stage(name, " ".join(words), f"{folder}/eval/step_{scale.steps}.jsonl", folder)


def check_start(model, scale):
    """End with a sentence when runs/proof/ has stages of other weights or of another scale."""
    start = {"weights": content.weights(find_checkpoint(model)), "scale": scale}
    file = Path("runs/proof/start.json")
    if file.exists() and json.loads(file.read_text()) != start:
        sys.exit(
            "runs/proof/ holds stages of another model or scale: move it away to begin anew "
            "(--table prints its table)"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(start))


def run(command, deadline):
    """Run one stage -> True when it ended well.

    At the deadline, and when this process gets one, it gets Ctrl-C, which loses nothing.
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


def table():
    """Print held-out pass@1 before and after of every run that has both, and what one run gained.

    The gain is the paired difference over problems with its 95 % interval.
    """
    print(
        "\n| run | steps | pass@1 before | after | gain | problems gained, lost "
        "| constant programs before, after | hours |\n" + "| --- " * 8 + "|"
    )
    shown = None
    for folder in sorted(Path("runs/proof").glob("*-*-*")):
        files = {}
        for path in (folder / "eval").glob("step_*.jsonl"):
            files[int(path.stem.removeprefix("step_"))] = path
        if len(files) < 2:
            continue

        last = max(files)
        before, after = read_rows(files[0]), read_rows(files[last])
        print_row(folder, last, before, after)
        shown = shown or (before, after)
    if shown:
        print_gained(*shown)


def print_row(folder, steps, before, after):
    """One run of the table."""
    found = compare([before], [after])
    difference, low, high = (
        100 * found[name] for name in ("difference", "difference_low", "difference_high")
    )
    seconds = sum(row.get("time/step", 0.0) for row in read_rows(folder / "times.jsonl"))
    cells = [
        folder.name,
        str(steps),
        f"{found['pass@1_a']:.3f}",
        f"{found['pass@1_b']:.3f}",
        f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
        f"{len(found['gained'])}, {len(found['lost'])} of {found['problems']}",
        f"{constant_share(before):.3f}, {constant_share(after):.3f}",
        f"{seconds / 3600:.2f}",
    ]
    print(f"| {' | '.join(cells)} |")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    for stage in stages(options.model, languages, seeds, SCALES[options.scale]):
        if Path(stage.done).exists():
            continue
        command = stage.command
        if stage.run_folder and Path(stage.run_folder, "config.json").exists():
            command = f"train.py --resume {stage.run_folder}"

        script, words = command.split(" ", 1)
        print(f"== {stage.name}: python {command}", flush=True)
        if not run(f"{ROOT / script} {words}", deadline):
            print("stopped in time: the same command continues from here")
            break
    table()


if __name__ == "__main__":
    main()
