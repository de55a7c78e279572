"""pass@k of a model: sampled by sampler.py, judged in the sandbox while others are still sampled.

    python eval.py --model DIR --bench gsm8k --lang prolog      greedy pass@1
    python eval.py --model DIR --bench gsm8k --lang prolog,lisp \\
        --samples 4 --temperature 0.1 --top_p 0.95 --top_k 50
    python eval.py --model DIR --bench humaneval --lang racket \\
        --samples 20 --temperature 0.2 --top_p 0.95
    python eval.py --model DIR --bench mbpp --lang racket,julia \\
        --mode think                                            a self-play model, asked as trained
    python eval.py --model DIR --bench translate --source python,cpp --lang racket,lua --mode chat
    python eval.py --model DIR --bench crux --lang racket \\
        --programs FILE                                         predict input, output (CRUXEval)
    python eval.py --model DIR --bench mbpp+ --lang python --mode chat      EvalPlus: more tests
    python eval.py --compare runs/eval/A runs/eval/B            paired, problem by problem
    python eval.py --compare A0,A1,A2 B0,B1,B2                  the same of several seeds a side

Every program and verdict goes to OUT/samples.jsonl; the same command continues a killed evaluation,
as long as weights, tokenizer, problems and code are what they were (runtime/content.py). evaluate()
is what train.py calls in the loop; under torchrun both spread over the ranks and give the numbers
of one process.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch

import forecast
from rewards import Judge
from runtime import content, distributed, memory
from runtime.hugging_face import find_checkpoint, load_model, read_config
from runtime.tokenizer import ChatTokenizer
from sampler import Completion, Request, Sampler
from sandbox import Pool
from sandbox.languages import Language, load_language
from selfplay import triples
from selfplay.buffers import load_puzzles
from selfplay.judge import SolveJudge
from selfplay.prompts import solve_prompt
from settings import add_flags, setting
from tasks import evalplus, faults
from tasks.data import find_data
from tasks.multipl_e import BENCHMARKS, TestJudge, load_benchmark, stops_note
from tasks.problems import load_problems, program_messages
from tasks.requests import MODES, benchmark_prompt, request_name
from tasks.statistics import compare, p_text, summary
from tasks.verdicts import Submission

# --bench crux: what is predicted -> the self-play task that asks for it.
CRUX_TASKS = {"output": "deduction", "input": "abduction"}
# Benches whose problems are asked as in training whatever the mode.
OWN_FORM = ("gsm8k", "sums", "crux")
# Settings that change no number: where things lie, and how many are sampled at once. What lies
# there does: see model_content and cell_content.
PLACES = ("model", "data", "programs", "out", "slots")
# Longest completion where nobody says: published practice for benchmarks.
NEW_TOKENS = 512
# What was found to be different, in words.
OTHER = {
    "weights": "other weights",
    "tokenizer": "another tokenizer or chat template",
    "problems": "other problems, tests or prompts",
    "request": "another request",
    "code": "another version of the code that samples and judges",
    "arithmetic": "another arithmetic",
}


@dataclass
class EvalSettings:
    """Settings of one evaluation."""

    model: str = setting("", "checkpoint folder or hub id", section="what is evaluated")
    bench: str = setting(
        "gsm8k", f"gsm8k, sums, crux, {', '.join([*BENCHMARKS, *evalplus.BENCHMARKS])}"
    )
    lang: str = setting("prolog", "language, or several with commas")
    source: str = setting(
        "python",
        "translate: source language (python, cpp, java, javascript, go, rust), "
        "or several with commas",
    )
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    out: str = setting(
        "", "folder for samples.jsonl and results.json (default: runs/eval/MODEL-BENCH)"
    )
    problems: int = setting(0, "judge a random subset of so many problems; 0 = all")
    split: str = setting(
        "test", "gsm8k, sums: test, or train to make answers that sft.py --answers learns from"
    )

    samples: int = setting(1, "completions per problem", section="sampling")
    temperature: float = setting(
        0.0,
        "0 = greedy; published practice: 0.2 with 20 samples (MultiPL-E), "
        "0.1 with 4 (arXiv 2506.11027)",
    )
    top_p: float = setting(1.0, "nucleus; published practice: 0.95")
    top_k: int = setting(0, "0 = all")
    max_new_tokens: int = setting(
        0,
        "longest completion; 0 = that of the run that trained the model, as its settings say, where "
        "it is asked as in training; else 512",
    )

    examples: int = setting(
        1, "gsm8k: worked examples in the prompt: 0, 1 or 5", section="the prompt and its data"
    )
    short_prompt: bool = setting(
        False, "gsm8k, crux: leave the long instructions out (for models trained without them)"
    )
    mode: str = setting(
        "completion",
        "humaneval, mbpp (+), translate: completion (base models), chat (instruct) "
        "or think (self-play models)",
    )
    programs: str = setting(
        "",
        "crux: JSON lines of code, input, output, or a checkpoint's selfplay.json "
        "(default: cruxeval for Python, else built-in triples)",
    )
    version: str = setting("v3", "MultiPL-E's data: v3 or v0.4")

    seed: int = setting(0, "decides every sampled token, and the subset", section="the run")
    slots: int = setting(0, "sequences sampled at once; 0 = as many as memory holds")
    sandbox: str = setting(
        "kernel", "weakest sandbox level that is accepted: portable, kernel or namespaces"
    )


@dataclass
class Cell:
    """One language of an evaluation, with what it is asked and who judges it."""

    source: str  # translate: the source language; crux: what is predicted; else ""
    language: Language
    problems: list
    judge: Judge | SolveJudge | TestJudge | evalplus.PlusJudge
    prompt: Callable  # problem -> chat messages, or a text to continue
    request: str = ""  # its name and version
    note: str = ""  # what a reader of the figures has to know


@dataclass
class InJudgement:
    """The completions of one problem, whose programs run."""

    completions: list[Completion]
    submissions: list[Submission]

    def is_done(self):
        futures = [submission.future for submission in self.submissions if submission.future]
        return all(future.done() for future in futures)


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
    """Sample n completions per problem and judge them, spread over the ranks.

    prompt(problem): chat messages, or a text to continue. temperature: 0 is greedy.
    numbers: each problem's number in the whole evaluation (default 0, 1, ...). Draws depend on
    (seed, number, sample) alone, so batches, ranks and a resume do not change them.
    on_rows(rows): called with a problem's rows as soon as they are judged, on the rank that judged.

    Returns (metrics, one row per sample, in problem order). Samples that the sandbox could not
    judge are left out of every figure and counted in sandbox/sandbox_error_frac.
    """
    if numbers is None:
        numbers = range(len(problems))
    numbered = distributed.share(list(zip(numbers, problems)))

    requests = []
    for number, problem in numbered:
        request = Request(
            prompt_ids(tokenizer, prompt(problem)),
            n,
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            stop_ids=tokenizer.stop_ids,
            stop_strings=judge.stop_strings(problem),
            seed=seed,
            id=number,
        )
        requests.append(request)

    in_judgement = {}  # position of a problem on this rank -> InJudgement
    judged_rows = [None] * len(requests)

    def start_judging(i, completions):
        """Problem i is sampled: start its programs, and finish whatever is judged by now."""
        problem = numbered[i][1]
        submissions = []
        for completion in completions:
            text = tokenizer.decode(completion.tokens)
            submissions.append(faults.submit(judge, problem, text, completion.sample))
        in_judgement[i] = InJudgement(completions, submissions)

        done = [j for j, waiting in in_judgement.items() if waiting.is_done()]
        for j in done:
            finish(j)

    def finish(i):
        problem, waiting = numbered[i][1], in_judgement.pop(i)
        verdicts = faults.collect(judge, waiting.submissions)
        rows = []
        for completion, submission, verdict in zip(
            waiting.completions, waiting.submissions, verdicts
        ):
            rows.append(judged_row(problem, completion, submission.text, verdict))
        judged_rows[i] = rows
        if on_rows:
            on_rows(rows)

    sampler.generate(requests, on_done=start_judging, decode=tokenizer.decode)
    for i in list(in_judgement):
        finish(i)

    rows = distributed.gather(chain.from_iterable(judged_rows))
    return summary(rows), rows


def prompt_ids(tokenizer, prompt):
    """Token ids of chat messages, or of a text to continue."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(prompt)


def judged_row(problem, completion, text, verdict):
    """What samples.jsonl keeps of one sample."""
    row = {
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
    if verdict.target:
        row["target"] = verdict.target
    if "base" in verdict.components:  # EvalPlus: HumanEval's or MBPP's own tests alone
        row["base"] = verdict.components["base"] == 1.0
    return row


def print_gained(before, after, count=3):
    """Programs of the first `count` problems that were wrong before and are right after.

    before, after: rows of the same samples in the same order.
    """
    gained = {}
    for old, new in zip(before, after):
        was_wrong = not old["correct"] and old["status"] != "sandbox_error"
        if new["correct"] and was_wrong:
            gained[old["id"]] = (old, new)

    for old, new in list(gained.values())[:count]:
        print(f"\n--- {old['id']}: {old['question']}")
        print(f"before ({old['status']}, value {old['value']}):\n{old['program']}")
        print(f"after (value {new['value']}):\n{new['program']}")


def before_and_after(before, after):
    """The newcomer's summary: the same held-out problems, and three programs that became right."""
    shown = (
        "greedy/pass@1",
        "pass@1",
        "pass@4",
        "pass@16",
        "completions/format_frac",
        "sandbox/wrong_frac",
        "sandbox/error_frac",
        "mean_tokens",
        "gepo/rank_accuracy",
        "gepo/winner_std",
    )
    print(f"\nheld-out problems        before      after\n{'-' * 42}")
    for name in shown:
        # A share of how programs ended is missing where it is 0, anything else where it was not
        # measured: pass@4 of one sample a problem.
        measured = name in before[0] and name in after[0]
        if measured or name.startswith("sandbox/"):
            print(f"{name:<23} {before[0].get(name, 0.0):>7.3f}   {after[0].get(name, 0.0):>8.3f}")
    print_gained(before[1], after[1])


# ---- what is asked ----


def load_cell(settings, pool, source, language):
    """The Cell of one language, and for translate and crux of one source.

    ValueError with one sentence when an interpreter, a test library or a data set is missing.
    """
    if sentence := language.missing():
        raise ValueError(sentence)
    if settings.bench in ("gsm8k", "sums"):
        return load_program_cell(settings, pool, source, language)
    if settings.split != "test":
        raise ValueError(f"--bench {settings.bench} has no --split {settings.split}: leave it out")
    if settings.bench == "crux":
        return load_crux_cell(settings, pool, source, language)

    def prompt(problem):
        return benchmark_prompt(problem, language, settings.mode)

    request = request_name(settings.bench, settings.mode)
    if settings.bench in evalplus.BENCHMARKS:
        problems = evalplus.load_problems(
            settings.bench,
            language,
            settings.data or None,
            settings.problems or None,
            settings.seed,
        )
        judge = evalplus.PlusJudge(pool, language, settings.mode)
        return Cell(source, language, problems, judge, prompt, request)

    problems = load_benchmark(
        settings.bench,
        language,
        settings.data or None,
        settings.version,
        source or settings.source,
        settings.problems or None,
        settings.seed,
    )
    judge = TestJudge(pool, language, settings.mode)
    note = stops_note(settings.bench, language, settings.mode)
    return Cell(source, language, problems, judge, prompt, request, note)


def load_program_cell(settings, pool, source, language):
    """Questions whose answer is a number that a program prints."""

    def prompt(problem):
        return program_messages(
            problem, language, settings.examples, system=not settings.short_prompt
        )

    count = settings.problems or None
    if settings.bench == "sums" and not count:
        count = 500  # the generator makes as many as are asked for: there is no "all"
    data = settings.data or None
    problems = load_problems(settings.bench, settings.split, data, count, settings.seed)
    return Cell(source, language, problems, Judge(pool, language), prompt)


def load_crux_cell(settings, pool, source, language):
    """Programs whose output (deduction) or input (abduction) is to be predicted.

    They come from --programs, for Python from CRUXEval, else from the built-in triples.
    """

    def prompt(puzzle):
        return solve_prompt(puzzle, language, settings.short_prompt)

    task = CRUX_TASKS[source]
    path = settings.programs
    if not path and language.name == "python":
        path = find_data("cruxeval/cruxeval.jsonl", settings.data or None)

    if path:
        puzzles, left_out = load_puzzles(path, task, language)
        print(
            f"{path}: {len(puzzles)} problems; "
            f"{left_out} left out, whose input or output is not a literal",
            file=sys.stderr,
        )
    else:
        count = settings.problems or 200
        puzzles = triples.held_out_triples(language, count, settings.seed, tasks=(task,))
    if not puzzles:
        raise ValueError(
            f"{path} has no program with an input and output that are literals of {language.name}"
        )

    if 0 < settings.problems < len(puzzles):
        chosen = random.Random(settings.seed).sample(range(len(puzzles)), settings.problems)
        puzzles = [puzzles[i] for i in sorted(chosen)]
    return Cell(source, language, puzzles, SolveJudge(pool, language), prompt)


def longest_prompt(tokenizer, cells):
    """Tokens of the longest prompt of all cells."""
    lengths = [0]
    for cell in cells:
        lengths += [len(prompt_ids(tokenizer, cell.prompt(problem))) for problem in cell.problems]
    return max(lengths)


def report(text):
    """Beside the progress, so that what is printed is results alone."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def token_limit(settings, folder):
    """(--max_new_tokens of this evaluation, a sentence on where it comes from).

    folder: the model's. RUN/config.json holds the settings of RUN/checkpoints/step_N and of
    RUN/warm_start.
    """
    if settings.max_new_tokens:
        return settings.max_new_tokens, "as given"
    continues_a_prompt = settings.bench not in OWN_FORM and settings.mode == "completion"
    if continues_a_prompt:
        return NEW_TOKENS, "the default of benchmarks that a model completes"

    for parent in list(Path(folder).resolve().parents)[:2]:
        file = parent / "config.json"
        of_run = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if "max_new_tokens" in of_run:
            return of_run["max_new_tokens"], f"as in the model's run, {file}"
    return NEW_TOKENS, (
        "the default, because no run's settings stand beside the model: give --max_new_tokens for "
        "one that was trained on longer answers, and the same for its base model"
    )


# ---- one cell, in files ----


def out_folder(settings):
    return Path(settings.out or f"runs/eval/{Path(settings.model).name}-{settings.bench}")


def run_cell(settings, sampler, tokenizer, cell, of_model):
    """Evaluate one cell, or continue it -> its figures, also in results.json.

    of_model: model_content's digests.
    """
    names = [name for name in (cell.source, cell.language.name) if name]
    title = " ".join([settings.bench, *names])
    folder = out_folder(settings) / "-".join(names)

    done = resume(folder, settings, cell, of_model)
    numbers = [n for n, problem in enumerate(cell.problems) if problem.id not in done]

    mine = [cell.problems[n] for n in distributed.share(numbers)]
    prompts = [prompt_ids(tokenizer, cell.prompt(problem)) for problem in mine]
    forecast.announce_evaluation(sampler, prompts, settings, report)

    with open(folder / f"partial-{distributed.rank()}.jsonl", "a", encoding="utf-8") as partial:
        if partial.tell():
            partial.write("\n")  # a kill may have left half a line
        # Also a rank that has nothing left takes part while another has.
        if any(distributed.gather([bool(numbers)])):
            evaluate(
                sampler,
                tokenizer,
                cell.judge,
                [cell.problems[n] for n in numbers],
                prompt=cell.prompt,
                n=settings.samples,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
                numbers=numbers,
                on_rows=Progress(title, partial, len(cell.problems), done),
            )
    return conclude(folder, cell, title)


def resume(folder, settings, cell, of_model):
    """{problem id: rows} that an interrupted evaluation of the same things has judged.

    SystemExit when the folder holds an evaluation of something else: nothing of it is mixed in,
    and nothing is thrown away. A collective.
    """
    refusal = None
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        wanted = asdict(settings) | {"lang": cell.language.name, "source": cell.source}
        wanted["content"] = of_model | cell_content(cell)
        if file.exists():
            refusal = what_differs(folder, json.loads(file.read_text("utf-8")), wanted)
        if not refusal:
            file.write_text(json.dumps(wanted, indent=1), "utf-8")
    distributed.stop_together(refusal)

    # A sandbox error says nothing about the program: its problem is done again.
    return distributed.broadcast(read_partial(folder, with_errors=False))


def model_content(folder, model):
    """Digests of the weights and of the tokenizer, and how the model computes."""
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    return {
        "weights": content.weights(folder),
        "tokenizer": content.tokenizer(folder),
        "arithmetic": f"{dtype} on {model.embed.weight.device.type}",
    }


def cell_content(cell):
    """Digests of what is asked (problems, tests and prompts) and of the code that judges it."""
    asked = [f"{problem!r} {cell.prompt(problem)!r}" for problem in cell.problems]
    return {
        "problems": content.of_texts(asked),
        "request": cell.request,
        "code": content.code(),
    }


def what_differs(folder, found, wanted):
    """Why an evaluation in a folder cannot be continued, in a sentence, or None.

    found, wanted: settings.json as it is, and as this evaluation would write it.
    """
    names = [name for name in wanted if name not in (*PLACES, "content")]
    changed = [name for name in names if found.get(name) != wanted[name]]
    before = found.get("content", {})
    others = [OTHER[name] for name in OTHER if before.get(name) != wanted["content"][name]]
    if changed:
        others.insert(0, f"other settings ({', '.join(changed)})")
    if not others:
        return None
    return (
        f"{folder} holds an evaluation with {', '.join(others)}: choose another --out, or remove "
        "the folder"
    )


def read_partial(folder, with_errors):
    """{problem id: rows} from partial-*.jsonl of all ranks, without half-written problems.

    with_errors: also problems with a sample that the sandbox could not judge.
    """
    found = {}
    for file in sorted(folder.glob("partial-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            try:
                rows = json.loads(line)
            except json.JSONDecodeError:  # empty, or the line at which an evaluation was killed
                continue
            if with_errors or all(row["status"] != "sandbox_error" for row in rows):
                found[rows[0]["id"]] = rows
    return found


class Progress:
    """Writes a problem's rows as one line at once, so that a kill leaves whole problems; a bar.

    On a terminal the bar moves; in a log file it is a line for every tenth of the problems.
    """

    def __init__(self, title, file, total, done):
        self.title = title
        self.file = file
        self.total = total
        self.before = len(done)
        self.count = len(done)
        self.right = sum(rows[0]["correct"] for rows in done.values())
        self.started = time.perf_counter()

    def __call__(self, rows):
        self.file.write(json.dumps(rows) + "\n")
        self.file.flush()
        self.count += 1
        self.right += rows[0]["correct"]
        if distributed.rank() == 0:
            self.show()

    def show(self):
        seconds = (time.perf_counter() - self.started) / (self.count - self.before)
        left = seconds * (self.total / distributed.world_size() - self.count)
        bar = "#" * (20 * self.count // self.total)
        line = (
            f"{self.title} [{bar:<20}] {self.count}/{self.total}"
            f"  first sample right {self.right / self.count:.3f}  {max(left, 0):.0f} s left"
        )
        if sys.stderr.isatty():
            print(f"\r{line}  ", end="", file=sys.stderr, flush=True)
        elif 10 * self.count // self.total > 10 * (self.count - 1) // self.total:
            print(line, file=sys.stderr, flush=True)


def conclude(folder, cell, title):
    """Merge what the ranks wrote into samples.jsonl, in problem order, and print the table."""
    distributed.barrier()
    found = read_partial(folder, with_errors=True)
    problems = cell.problems
    rows = list(chain.from_iterable(found[problem.id] for problem in problems))
    figures = {"problems": len(problems), **summary(rows)}
    for name in ("request", "note"):
        if text := getattr(cell, name):
            figures[name] = text

    if distributed.rank() == 0:
        replace_file(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        replace_file(folder / "results.json", json.dumps(figures, indent=1))

        print(f"\n\n{title}: {len(problems)} problems -> {folder}\n{'-' * 44}")
        for name, value in figures.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:<34}{shown:>10}")
    return {"cell": title, "folder": str(folder), **figures}


def replace_file(path, text):
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, "utf-8")
    partial.replace(path)


# ---- the tables ----


def print_matrix(bench, cells, results):
    """pass@1 of every source x target, where there is more than one -> {source: its mean}."""
    # dict.fromkeys: each name once, in the order of the command line.
    sources = dict.fromkeys(cell.source for cell in cells)
    names = dict.fromkeys(cell.language.name for cell in cells)
    rates = {}
    for cell, result in zip(cells, results):
        rates[cell.source, cell.language.name] = result["pass@1"]

    means = {}
    for source in sources:
        means[source or "all"] = sum(rates[source, name] for name in names) / len(names)
    if len(cells) < 2:
        return means

    print(f"\npass@1 {bench:<12}" + "".join(f"{name:>12}" for name in [*names, "mean"]))
    for source in sources:
        row = [*(rates[source, name] for name in names), means[source or "all"]]
        print(f"{source or 'all':<19}" + "".join(f"{rate:>12.4f}" for rate in row))
    return means


def print_comparison(side_a, side_b):
    """Two sides next to each other: which problems were gained and lost, and the difference.

    A side is an evaluation folder, or several (seeds) with commas.
    """
    folders_a, folders_b = side_a.split(","), side_b.split(",")
    for folders in (folders_a, folders_b):
        if len(set(map(Path, folders))) < len(folders):
            raise ValueError(f"--compare {','.join(folders)}: a folder is named twice")
    found = compare(list(map(read_samples, folders_a)), list(map(read_samples, folders_b)))
    requests = {read_request(folder) for folder in [*folders_a, *folders_b]}
    if len(requests) > 1:
        print(f"these were asked in different ways: {', '.join(sorted(requests))}")
    gained, lost = len(found["gained"]), len(found["lost"])

    for name in ("gained", "lost"):
        for id in found[name][:10]:
            print(f"{name:<8}{id}")

    print(f"\n{'':<12}{'A':>10}{'B':>10}{'B - A':>10}   95 % interval      p")
    label = "pass@1"
    if len(folders_a) > 1 or len(folders_b) > 1:
        print_runs(found)
        label = "mean pass@1"
    before, after, difference = found["pass@1_a"], found["pass@1_b"], found["difference"]
    low, high = found["difference_low"], found["difference_high"]
    print(
        f"{label:<12}{before:>10.4f}{after:>10.4f}{difference:>+10.4f}"
        f"   [{low:+.4f}, {high:+.4f}]   {p_text(found['p'])}"
    )
    print(
        f"{found['problems']} problems: "
        f"{gained} gained, {lost} lost, {found['unchanged']} unchanged"
    )
    print(json.dumps({**found, "gained": gained, "lost": lost}))


def print_runs(found):
    """pass@1 of every run, and the spread (standard deviation) over the runs of a side."""
    runs_a, runs_b = found["runs_a"], found["runs_b"]
    for number, (a, b) in enumerate(zip_longest(runs_a, runs_b), 1):
        print(f"{f'run {number}':<12}{_rate(a)}{_rate(b)}")
    print(f"{'spread':<12}{_rate(found.get('spread_a'))}{_rate(found.get('spread_b'))}")


def _rate(value):
    return f"{'' if value is None else f'{value:.4f}':>10}"


def read_samples(folder):
    """Rows of a finished evaluation."""
    path = Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give the folder of a finished evaluation (one language)"
        )
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_request(folder):
    """How the model of an evaluation was asked, by results.json."""
    path = Path(folder) / "results.json"
    figures = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return figures.get("request", "a request without a name")


# ---- the command ----


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two evaluation folders, side by side; several with commas: seeds of one side",
    )
    add_flags(parser, EvalSettings)
    given = vars(parser.parse_args(arguments))
    if folders := given.pop("compare"):
        return print_comparison(*folders)

    settings = EvalSettings(**given)
    if not settings.model:
        parser.error("--model is needed: a checkpoint folder or a hub id")
    if settings.max_new_tokens < 0:
        parser.error(f"--max_new_tokens {settings.max_new_tokens}: give 0 or more")
    if settings.mode not in MODES:
        raise ValueError(f"unknown mode {settings.mode!r}: use completion, chat or think")

    sources = [""]
    if settings.bench == "translate":
        sources = settings.source.split(",")
    elif settings.bench == "crux":
        sources = list(CRUX_TASKS)

    with Pool(require=settings.sandbox) as pool:  # the launchers start before CUDA does
        # What is missing is said before the model loads.
        cells = []
        for source in sources:
            for name in settings.lang.split(","):
                cells.append(load_cell(settings, pool, source, load_language(name)))

        device = distributed.setup()
        folder = find_checkpoint(settings.model)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tokenizer = ChatTokenizer(folder)
        settings.max_new_tokens, why = token_limit(settings, folder)
        longest = longest_prompt(tokenizer, cells) + settings.max_new_tokens
        samples = settings.samples * max(len(cell.problems) for cell in cells)
        rows = min(samples, memory.rows_at_once(settings.slots, device.type == "cuda"))
        memory.check_sampling(read_config(folder), longest, rows, device, report)
        sampler = Sampler(load_model(folder, dtype, device), slots=settings.slots)
        report(f"max_new_tokens {settings.max_new_tokens}: {why}")
        of_model = model_content(folder, sampler.model) if distributed.rank() == 0 else None
        results = [run_cell(settings, sampler, tokenizer, cell, of_model) for cell in cells]

    if distributed.rank() == 0:
        means = print_matrix(settings.bench, cells, results)
        figures = {"settings": asdict(settings), "results": results, "mean_pass@1": means}
        print(json.dumps(figures))
        replace_file(out_folder(settings) / "results.json", json.dumps(figures, indent=1))
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command continues where it stopped")
    except (ValueError, OSError) as problem:
        sys.exit(f"eval.py: {problem}")
