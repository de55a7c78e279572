"""pass@k of a model, sampled by sampler.py and judged in the sandbox while others are still being sampled.

    python eval.py --model DIR --bench gsm8k --lang prolog                          greedy pass@1
    python eval.py --model DIR --bench gsm8k --lang prolog,lisp --samples 4 --temperature 0.1 --top_p 0.95 --top_k 50
    python eval.py --model DIR --bench humaneval --lang racket --samples 20 --temperature 0.2 --top_p 0.95
    python eval.py --model DIR --bench mbpp --lang racket,julia --mode think        a self-play model, asked as it was trained
    python eval.py --model DIR --bench translate --source python,cpp --lang racket,lua,julia --mode chat
    python eval.py --model DIR --bench crux --lang racket --programs FILE           input and output prediction, as in CRUXEval
    python eval.py --compare runs/eval/A runs/eval/B                                 paired, problem by problem

Every program and verdict goes to OUT/samples.jsonl; the same command goes on where a killed evaluation was. evaluate() is what
train.py calls in the loop; under torchrun both spread over the ranks and give the numbers of one process.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rewards import Judge
from runtime import distributed
from runtime.hugging_face import find_checkpoint, load_model
from runtime.tokenizer import ChatTokenizer
from sampler import Request, Sampler
from sandbox import Pool
from sandbox.languages import load_language
from selfplay import triples
from selfplay.buffers import load_puzzles
from selfplay.judge import SolveJudge
from selfplay.prompts import solve_prompt
from settings import add_flags, setting
from tasks.data import find_data
from tasks.multipl_e import BENCHMARKS, TestJudge, benchmark_prompt, load_benchmark
from tasks.problems import load_problems, program_messages
from tasks.statistics import compare, summary

# ---- in the loop ----


def evaluate(
    sampler,
    tokenizer,
    judge,
    problems,
    *,
    prompt,
    n=1,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=256,
    seed=0,
    numbers=None,
    on_rows=None,
):
    """Sample n completions per problem, judge them, spread over the ranks -> (metrics, one row per sample, in problem order).

    prompt(problem) -> chat messages, or text to go on from. temperature 0 is greedy. numbers: each problem's number in the
    whole evaluation (default 0, 1, ...); draws depend on (seed, number, sample) alone, so batches, ranks and a resume do not
    change them. on_rows(rows) is called with a problem's rows as soon as they are judged, on the rank that judged them. Samples
    that the sandbox could not judge are left out of every figure and counted in sandbox/sandbox_error_frac.
    """
    numbered = distributed.share(
        list(zip(range(len(problems)) if numbers is None else numbers, problems))
    )
    requests = [
        Request(
            prompt_ids(tokenizer, prompt(p)),
            n,
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            stop_ids=tokenizer.stop_ids,
            seed=seed,
            id=number,
        )
        for number, p in numbered
    ]
    waiting, rows = {}, [None] * len(requests)

    def finish(i):
        completions, submissions = waiting.pop(i)
        verdicts = judge.collect(submissions)
        rows[i] = [
            row(numbered[i][1], c, s.text, v) for c, s, v in zip(completions, submissions, verdicts)
        ]
        if on_rows:
            on_rows(rows[i])

    def start_judging(i, completions):
        waiting[i] = (
            completions,
            [
                judge.submit(numbered[i][1], tokenizer.decode(c.tokens), c.sample)
                for c in completions
            ],
        )
        for j in [
            j
            for j, (_, submissions) in waiting.items()
            if all(s.future is None or s.future.done() for s in submissions)
        ]:
            finish(j)

    sampler.generate(requests, on_done=start_judging)
    for i in list(waiting):
        finish(i)
    rows = distributed.gather([r for group in rows for r in group])
    return summary(rows), rows


def prompt_ids(tokenizer, prompt):
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def row(problem, completion, text, verdict):
    """What samples.jsonl keeps of one sample."""
    return {
        "id": problem.id,
        "sample": completion.sample,
        "question": problem.question,
        "correct": verdict.correct,
        "status": verdict.status,
        "value": verdict.value,
        "answer": None if problem.answer is None else str(problem.answer),
        "program": verdict.program,
        "text": text,
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
        "format_ok": verdict.parsed.format_ok,
        "constant": verdict.constant,
        "leaked": verdict.leaked,
    }


# ---- figures ----


def print_gained(before, after, count=3):
    """Programs of the first `count` problems that were wrong before and are right after; rows of the same samples in the same order."""
    gained = {a["id"]: (a, b) for a, b in zip(before, after) if b["correct"] and not a["correct"]}
    for a, b in list(gained.values())[:count]:
        print(
            f"\n--- {a['id']}: {a['question']}\nbefore ({a['status']}, value {a['value']}):\n{a['program']}\nafter (value {b['value']}):\n{b['program']}"
        )


# ---- the command ----


@dataclass
class EvalSettings:
    """Settings of one evaluation."""

    model: str = setting("", "checkpoint folder or hub id")
    bench: str = setting("gsm8k", f"gsm8k, sums, crux, {', '.join(BENCHMARKS)}")
    lang: str = setting("prolog", "language, or several with commas")
    source: str = setting(
        "python",
        "translate: source language (python, cpp, java, javascript, go, rust), or several with commas",
    )
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    out: str = setting(
        "", "folder for samples.jsonl and results.json (default: runs/eval/MODEL-BENCH)"
    )
    problems: int = setting(0, "judge a random subset of so many problems; 0 = all")
    samples: int = setting(1, "completions per problem")
    temperature: float = setting(
        0.0,
        "0 = greedy; published practice: 0.2 with 20 samples (MultiPL-E), 0.1 with 4 (arXiv 2506.11027)",
    )
    top_p: float = setting(1.0, "nucleus; published practice: 0.95")
    top_k: int = setting(0, "0 = all")
    max_new_tokens: int = setting(512, "longest completion")
    examples: int = setting(1, "gsm8k: worked examples in the prompt: 0, 1 or 5")
    short_prompt: bool = setting(
        False, "gsm8k, crux: leave the long instructions out (for models trained without them)"
    )
    mode: str = setting(
        "completion",
        "humaneval, mbpp, translate: completion (base models), chat (instruct) or think (self-play models)",
    )
    programs: str = setting(
        "",
        "crux: JSON lines of code, input, output, or a checkpoint's selfplay.json (default: cruxeval for Python, else built-in triples)",
    )
    version: str = setting("v3", "MultiPL-E's data: v3 or v0.4")
    seed: int = setting(0, "decides every sampled token, and the subset")
    slots: int = setting(256, "sequences sampled at once")
    sandbox: str = setting(
        "kernel", "weakest sandbox level that is accepted: portable, kernel or namespaces"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two evaluation folders, side by side"
    )
    add_flags(parser, EvalSettings)
    given = vars(parser.parse_args(arguments))
    if folders := given.pop("compare"):
        return print_comparison(*folders)
    s = EvalSettings(**given)
    if not s.model:
        parser.error("--model is needed: a checkpoint folder or a hub id")
    if s.mode not in ("completion", "chat", "think"):
        raise ValueError(f"unknown mode {s.mode!r}: use completion, chat or think")
    sources = {"translate": s.source.split(","), "crux": ["output", "input"]}.get(s.bench, [""])
    cells = [(source, lang) for source in sources for lang in s.lang.split(",")]
    with Pool(require=s.sandbox) as pool:  # the launchers start before CUDA does
        loaded = [
            load_cell(s, pool, source, load_language(lang)) for source, lang in cells
        ]  # what is missing is said before the model loads
        device = distributed.setup()
        folder = find_checkpoint(s.model)
        sampler = Sampler(
            load_model(folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device),
            slots=s.slots,
        )
        tokenizer = ChatTokenizer(folder)
        results = [run_cell(s, sampler, tokenizer, *cell) for cell in loaded]
    if distributed.rank() == 0:
        print_matrix(s, cells, results)
        print(json.dumps({"settings": asdict(s), "results": results}))
    distributed.finish()


def load_cell(s, pool, source, language):
    """(source, language, problems, judge, prompt) of one language, and for translate of one source."""
    if sentence := language.missing():
        raise ValueError(sentence)
    if s.bench in ("gsm8k", "sums"):
        problems = load_problems(
            s.bench,
            "test",
            s.data or None,
            s.problems or (500 if s.bench == "sums" else None),
            s.seed,
        )
        return (
            source,
            language,
            problems,
            Judge(pool, language),
            lambda p: program_messages(p, language, s.examples, system=not s.short_prompt),
        )
    if s.bench == "crux":
        puzzles = crux_puzzles(s, {"output": "deduction", "input": "abduction"}[source], language)
        return (
            source,
            language,
            puzzles,
            SolveJudge(pool, language),
            lambda p: solve_prompt(p, language, s.short_prompt),
        )
    rows = load_benchmark(
        s.bench, language, s.data or None, s.version, source or s.source, s.problems or None, s.seed
    )
    return (
        source,
        language,
        rows,
        TestJudge(pool, language, s.mode),
        lambda row: benchmark_prompt(row, language, s.mode),
    )


def crux_puzzles(s, task, language):
    """Input (abduction) or output (deduction) prediction on --programs, on CRUXEval (Python), or on the built-in triples."""
    path = s.programs or (
        find_data("cruxeval/cruxeval.jsonl", s.data or None) if language.name == "python" else None
    )
    if path:
        puzzles, left_out = load_puzzles(path, task, language)
        print(
            f"{path}: {len(puzzles)} problems; {left_out} left out, whose input or output is no literal",
            file=sys.stderr,
        )
    else:
        puzzles = triples.held_out_triples(language, s.problems or 200, s.seed, tasks=(task,))
    chosen = (
        random.Random(s.seed).sample(range(len(puzzles)), s.problems)
        if 0 < s.problems < len(puzzles)
        else range(len(puzzles))
    )
    if not puzzles:
        raise ValueError(
            f"{path} has no program with an input and output that are literals of {language.name}"
        )
    return [puzzles[i] for i in sorted(chosen)]


def run_cell(s, sampler, tokenizer, source, language, problems, judge, prompt):
    """Evaluate one language (and source), or go on with it -> its figures, also in results.json."""
    folder = Path(s.out or f"runs/eval/{Path(s.model).name}-{s.bench}") / "-".join(
        part for part in (source, language.name) if part
    )
    done = resume(folder, s, source, language)
    numbers = [n for n, p in enumerate(problems) if p.id not in done]
    title = " ".join(part for part in (s.bench, source, language.name) if part)
    with open(folder / f"partial-{distributed.rank()}.jsonl", "a", encoding="utf-8") as partial:
        partial.write("\n" if partial.tell() else "")  # a kill may have left half a line
        log = Progress(title, partial, len(problems), done)
        if any(distributed.gather([bool(numbers)])):
            evaluate(
                sampler,
                tokenizer,
                judge,
                [problems[n] for n in numbers],
                prompt=prompt,
                n=s.samples,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                max_new_tokens=s.max_new_tokens,
                seed=s.seed,
                numbers=numbers,
                on_rows=log,
            )
    return conclude(folder, problems, title)


def resume(folder, s, source, language):
    """{problem id: rows} that an earlier, interrupted evaluation with the same settings has judged."""
    settings = {
        **asdict(s),
        "lang": language.name,
        "source": source,
        "out": "",
        "data": "",
        "slots": 0,
    }
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if file.exists() and json.loads(file.read_text("utf-8")) != settings:
            raise SystemExit(
                f"{folder} holds an evaluation with other settings: choose another --out"
            )
        file.write_text(json.dumps(settings, indent=1), "utf-8")
    distributed.barrier()
    return distributed.broadcast(read_partial(folder, s.samples))


def read_partial(folder, samples=None):
    """Rows by problem from partial-*.jsonl; half-written problems and sandbox errors are dropped, so that they are done again."""
    found = {}
    for file in sorted(folder.glob("partial-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            try:
                rows = json.loads(line)
            except json.JSONDecodeError:  # empty, or the line at which an evaluation was killed
                continue
            if samples is None or all(r["status"] != "sandbox_error" for r in rows):
                found[rows[0]["id"]] = rows
    return found


class Progress:
    """Writes a problem's rows as one line at once, so that a kill leaves whole problems, and shows a bar."""

    def __init__(self, title, file, total, done):
        self.title, self.file, self.total, self.started = title, file, total, time.perf_counter()
        self.count, self.before = len(done), len(done)
        self.right = sum(rows[0]["correct"] for rows in done.values())

    def __call__(self, rows):
        self.file.write(json.dumps(rows) + "\n")
        self.file.flush()
        self.count, self.right = self.count + 1, self.right + rows[0]["correct"]
        if distributed.rank() == 0:
            left = (
                (time.perf_counter() - self.started)
                / (self.count - self.before)
                * (self.total / distributed.world_size() - self.count)
            )
            bar = "#" * (20 * self.count // self.total)
            text = f"{self.title} [{bar:<20}] {self.count}/{self.total}  first sample right {self.right / self.count:.3f}  {max(left, 0):.0f} s left"
            print(f"\r{text}  ", end="", file=sys.stderr, flush=True)


def conclude(folder, problems, title):
    """Merge what the ranks wrote into samples.jsonl, in problem order, and print the table."""
    distributed.barrier()
    found = read_partial(folder)
    rows = [r for p in problems for r in found[p.id]]
    figures = {"problems": len(problems), **summary(rows)}
    if distributed.rank() == 0:
        for name, text in (
            ("samples.jsonl", "".join(json.dumps(r) + "\n" for r in rows)),
            ("results.json", json.dumps(figures, indent=1)),
        ):
            (folder / f".{name}").write_text(text, "utf-8")
            (folder / f".{name}").replace(folder / name)
        print(f"\n\n{title}: {len(problems)} problems -> {folder}\n{'-' * 44}")
        for name, value in figures.items():
            print(
                f"{name:<34}{value:>10.4f}"
                if isinstance(value, float)
                else f"{name:<34}{value:>10}"
            )
    return {"cell": title, "folder": str(folder), **figures}


def print_matrix(s, cells, results):
    """pass@1 of every source x target."""
    if len(cells) < 2:
        return
    sources, langs = (
        list(dict.fromkeys(source for source, _ in cells)),
        list(dict.fromkeys(lang for _, lang in cells)),
    )
    figures = {cell: result["pass@1"] for cell, result in zip(cells, results)}
    print(f"\npass@1 {s.bench:<12}" + "".join(f"{lang:>12}" for lang in langs))
    for source in sources:
        print(
            f"{source or 'all':<19}" + "".join(f"{figures[source, lang]:>12.4f}" for lang in langs)
        )


def print_comparison(a, b):
    found = compare(*(read_samples(folder) for folder in (a, b)))
    for name in ("gained", "lost"):
        for id in found[name][:10]:
            print(f"{name:<8}{id}")
    print(f"\n{'':<12}{'A':>10}{'B':>10}{'B - A':>10}   95 % interval      p")
    print(
        f"{'pass@1':<12}{found['pass@1_a']:>10.4f}{found['pass@1_b']:>10.4f}{found['difference']:>+10.4f}   "
        f"[{found['difference_low']:+.4f}, {found['difference_high']:+.4f}]   {found['p']:.4f}"
    )
    print(
        f"{found['problems']} problems: {len(found['gained'])} gained, {len(found['lost'])} lost, {found['unchanged']} unchanged"
    )
    print(json.dumps({**found, "gained": len(found["gained"]), "lost": len(found["lost"])}))


def read_samples(folder):
    path = Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give the folder of a finished evaluation (one language)"
        )
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on where it was")
    except (ValueError, OSError) as problem:
        sys.exit(f"eval.py: {problem}")
