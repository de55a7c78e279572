"""Self-play's dealings with programs: completions -> checked proposals, completions -> judged answers.

A proposal is run in two processes of its own before it may enter a buffer; every refusal has one of the REASONS below and is counted. Values go in and out as data (values.py, literals.py), so no text of
the model but its program stands in a program, and the right answer of a puzzle is in no process at all.
"""

import concurrent.futures
import hmac
import math
import os
import re
import time
from dataclasses import dataclass

from literals import read, read_one
from rewards import Parsed, Submission, Verdict
from sandbox import Job
from values import MAX_TEXT, same, table_of, write

TASKS = ("deduction", "abduction", "induction")
PAIRS, SHOWN = (
    10,
    5,
)  # induction: inputs of a proposal; the solver sees the first five and is judged on the others

REASONS = {
    "format": "not <think>...</think> <answer>...</answer>",
    "no_program": "no code block in the language",
    "no_input": "no input block",
    "few_inputs": f"induction with fewer than {PAIRS} input blocks",
    "no_message": "induction without a message block",
    "no_composite": "does not call the functions it was asked to build on, or defines them again",
    "input_no_value": "an input is no literal",
    "too_long": f"an input or output has more than {MAX_TEXT} characters (never cut)",
    "syntax": "does not parse",
    "banned": "uses randomness, time, files, processes, evaluation or another banned construct, under whatever name",
    "no_f": "defines no f",
    "error": "fails on an input",
    "no_value": "an output has no literal (a function, an infinite number)",
    "not_deterministic": "two processes gave different outputs",
    "no_round_trip": "an output changes when it is written and read back",
    "cpu_limit": "",
    "wall_limit": "",
    "memory_limit": "",
    "output_limit": "",
    "file_limit": "",
    "crash": "",
    "compile_error": "",
    "sandbox_error": "the sandbox could not judge: masked, not refused",
}
_STOPS = ("syntax", "banned", "no_f")


class Refused(Exception):
    """Its text is the reason."""


@dataclass(frozen=True)
class Entry:
    """A checked program with inputs and outputs as canonical text; induction has PAIRS of them and a message."""

    program: str
    inputs: tuple
    outputs: tuple
    message: str = ""
    step: int = 0


@dataclass(frozen=True)
class Puzzle:
    """What a solver is given."""

    id: str
    task: str  # one of TASKS
    entry: Entry
    question: str = ""  # the prompt, for samples.jsonl
    answer: str | None = None


# ---- completions ----


def answer_of(text):
    """What stands between the answer tags of a completion of "... <think>"; Refused unless it has both tags in order."""
    thought, _, rest = text.partition("</think>")
    answer, end, _ = rest.lstrip().partition("</answer>")
    if not end or not answer.startswith("<answer>") or "<answer>" in thought:
        raise Refused("format")
    return answer.removeprefix("<answer>")


def blocks(answer, names):
    """Contents of all ```name blocks."""
    found = re.findall(
        rf"```(?:{'|'.join(map(re.escape, names))})[ \t]*\n(.*?)```",
        answer,
        re.DOTALL | re.IGNORECASE,
    )
    return [text.rstrip(" \t").removesuffix("\n") for text in found]


def code_of(answer, language):
    found = [code for code in blocks(answer, language.fence) if code.strip()]
    if not found:
        raise Refused("no_program")
    return found[0].strip("\n")


def inputs_of(text, language):
    """Arguments of f from an input block; Refused when they are no literals."""
    if len(text.strip()) > MAX_TEXT:
        raise Refused("too_long")
    try:
        found = read(text, language)
    except ValueError:
        raise Refused("input_no_value") from None
    if not found:
        raise Refused("input_no_value")
    return found


def input_text(arguments, language):
    joint = " " if table_of(language)["family"] == "lists" else ", "
    return joint.join(write(v, language) for v in arguments)


def parse_proposal(text, task, language, program="", composed=()):
    """Completion -> Entry without outputs; Refused with the reason. program: the one that an induction proposal is about; composed:
    programs that the new one must call as g_0, g_1, ..."""
    answer = answer_of(text)
    given = blocks(answer, ["input"])
    message = ""
    if task == "induction":
        messages = blocks(answer, ["message"])
        if len(given) < PAIRS:
            raise Refused("few_inputs")
        if not messages or not messages[0].strip():
            raise Refused("no_message")
        given, message = given[-PAIRS:], messages[0].strip()[:1000]
    else:
        program = compose(code_of(answer, language), composed, language)
        if not given:
            raise Refused("no_input")
        given = given[:1]
    return Entry(
        program, tuple(input_text(inputs_of(one, language), language) for one in given), (), message
    )


def named(name):
    """A regular expression that matches a name of any language as a whole word."""
    return rf"(?<![\w\-!?*]){re.escape(name)}(?![\w\-!?*])"


def renamed(program, number, language):
    """An earlier program with its f called g_NUMBER, without the line that names the language."""
    return re.sub(named("f"), f"g_{number}", _bare(program, language))


def _bare(program, language):
    return re.sub(r"^\s*#lang .*\n", "", program) if language.call.get("header") else program


def compose(code, composed, language):
    """The new f with the earlier programs under the names g_0, g_1, ... before it; Refused unless it calls every one."""
    if not composed:
        return code
    parts = [renamed(part, i, language) for i, part in enumerate(composed)]
    code = _bare(code, language)
    for i in range(len(composed)):
        if not re.search(named(f"g_{i}"), code) or re.search(
            language.call["defines"].replace("NAME", f"g_{i}"), code
        ):
            raise Refused("no_composite")
    return "\n".join([*filter(None, [language.call.get("header")]), *parts, code])


def normalised(program, language):
    """Source without comments and white space differences: what makes two programs the same."""
    lines = [
        re.sub(rf"(?<![\\\"']){re.escape(language.comment)}.*", "", line)
        for line in program.splitlines()
    ]
    return " ".join(" ".join(lines).split())


# ---- programs ----


def call_files(language, program, calls, nonce):
    """{file name: text} of a job that checks a program for banned constructs, then prints f of every element of calls (argument lists).

    The [call] table: main is the harness, with {nonce}, {inputs} (every call's literals in the form `arguments`), {banned}, {modules},
    {mentions} and {macros} (lists of strings); files hold {code}. It prints lines NONCE KIND NUMBER TEXT NONCE: syntax, banned or no_f (and ends), and for
    each call value, error or no_value. identity and hello are the first seed, rules a sentence for the prompts, defines finds a definition of NAME.
    """
    call = language.call
    header = call.get("header", "")
    if header and not program.lstrip().startswith(header.split()[0]):
        program = f"{header}\n{program}"
    words = {"{code}": program, "{nonce}": nonce}
    words["{inputs}"] = ("\n" if table_of(language)["family"] == "lists" else ", ").join(
        call["arguments"].format(input_text(arguments, language)) for arguments in calls
    )
    for name in ("banned", "modules", "mentions", "macros"):
        words[f"{{{name}}}"] = _strings(call.get(name, []), language)
    templates = {language.file: call["main"], **call.get("files", {})}
    return {
        name: re.sub("|".join(map(re.escape, words)), lambda match: words[match[0]], text)
        for name, text in templates.items()
    }


def _strings(names, language):
    """A list of strings in the language, for the harness."""
    if language.name == "prolog":
        return "[" + ", ".join(write(name, language) for name in names) + "]"
    text = write(list(names), language, limit=math.inf)
    return text[1:] if language.name == "lisp" else text


def outcomes(result, nonce, count):
    """[(kind, text)] of the count calls of a job: kind "value", or why there is none (a key of REASONS)."""
    printed = result.stdout.decode(errors="surrogateescape")
    found = re.findall(rf"^{nonce} (\w+) (\d+) (.*?) {nonce}$", printed, re.DOTALL | re.MULTILINE)
    for kind, _, text in found:
        if kind in _STOPS:
            return [(kind, text)] * count
    if result.status != "ok":
        return [(result.status, "")] * count
    by_number = {int(number): (kind, text) for kind, number, text in found}
    return [by_number.get(number, ("error", "")) for number in range(count)]


def value_of(kind, text, language):
    """A printed value as data; Refused with its reason."""
    if kind != "value":
        raise Refused(kind)
    if len(text) > MAX_TEXT:
        raise Refused("too_long")
    try:
        return read_one(text, language)
    except ValueError:
        raise Refused("no_value") from None


class Runner:
    """Runs f of programs on inputs in the sandbox. Equal runs have equal nonces, so that the pool's cache runs them once."""

    def __init__(self, pool, language):
        if "main" not in language.call:
            raise ValueError(
                f"{language.name} cannot be used for self-play: its TOML has no [call] table"
            )
        self.pool, self.language, self._secret = pool, language, os.urandom(16)

    def start(self, program, calls, run=1):
        """(future, nonce, number of calls)."""
        text = "\0".join([program, str(run), *(input_text(c, self.language) for c in calls)])
        nonce = hmac.new(self._secret, text.encode(errors="replace"), "sha256").hexdigest()[:24]
        files = call_files(self.language, program, calls, nonce)
        return self.pool.submit(Job(self.language.name, files)), nonce, len(calls)

    def finish(self, started):
        """[(kind, text)] per call; sandbox_error for a job that is not done."""
        future, nonce, count = started
        if not future.done():
            return [("sandbox_error", "")] * count
        return outcomes(future.result(), nonce, count)


def wait(started, deadline=None):
    concurrent.futures.wait([s[0] for s in started if s], timeout=deadline)


# ---- checking proposals ----


def begin(runner, proposal):
    """Start the first run of a proposal, which check() waits for; None for one that is refused already."""
    return (
        runner.start(proposal.program, _calls(proposal, runner.language))
        if isinstance(proposal, Entry)
        else None
    )


def _calls(proposal, language):
    return [read(text, language) for text in proposal.inputs]


def check(runner, proposals, deadline=None, first=None):
    """[Entry without outputs, or Refused] -> [Entry with outputs, or Refused], each run in two processes of its own. first: what begin() gave.

    The second starts when every first one has ended, and calls f twice on every input, in reverse order first: a clock, a counter kept
    between calls or an address shows as a difference. Then all outputs pass through the identity function, and must come back as they were.
    """
    language = runner.language
    first = [begin(runner, p) for p in proposals] if first is None else first
    wait(first, deadline)
    time.sleep(1 - time.time() % 1)  # so that even a clock of whole seconds shows
    values = [_values(runner, s) if s else p for p, s in zip(proposals, first)]
    again = lambda p: _calls(p, language)[::-1] + _calls(p, language)
    second = [
        runner.start(p.program, again(p), 2) if isinstance(v, list) else None
        for p, v in zip(proposals, values)
    ]
    wait(second, deadline)
    for i, started in enumerate(second):
        if started:
            found = _values(runner, started)
            if isinstance(found, Refused):
                values[i] = found if str(found) == "sandbox_error" else Refused("not_deterministic")
            elif not all(same(a, b, language) for a, b in zip(values[i][::-1] + values[i], found)):
                values[i] = Refused("not_deterministic")
    returned = round_trip(
        runner, [v for value in values if isinstance(value, list) for v in value], deadline
    )
    return [_checked(p, value, returned, language) for p, value in zip(proposals, values)]


def _values(runner, started):
    try:
        return [value_of(kind, text, runner.language) for kind, text in runner.finish(started)]
    except Refused as reason:
        return reason


def _checked(proposal, values, returned, language):
    if isinstance(values, Refused):
        return values
    texts = [write(v, language) for v in values]
    bad = {returned[text] for text in texts} - {True}
    if bad:
        return Refused("sandbox_error" if "sandbox_error" in bad else "no_round_trip")
    return Entry(proposal.program, proposal.inputs, tuple(texts), proposal.message)


def round_trip(runner, values, deadline=None, chunk=40):
    """{canonical text: True, False or "sandbox_error"}: is the value, written into a program, printed as the same value again?"""
    language = runner.language
    distinct = {write(v, language): v for v in values}
    parts = [list(distinct.items())[i : i + chunk] for i in range(0, len(distinct), chunk)]
    started = [
        runner.start(language.call["identity"], [[v] for _, v in part], run=3) for part in parts
    ]
    wait(started, deadline)
    found = {}
    for part, one in zip(parts, started):
        for (text, value), (kind, printed) in zip(part, runner.finish(one)):
            found[text] = (
                kind if kind == "sandbox_error" else _returns(kind, printed, value, language)
            )
    return found


def _returns(kind, printed, value, language):
    try:
        return same(value_of(kind, printed, language), value, language)
    except Refused:
        return False


# ---- judging answers ----


class SolveJudge:
    """Judges answers to puzzles, with submit and collect as rewards.Judge. The reward is equation (2) of Inoue & Tsuruoka:
    1 right, 0 wrong, -0.5 in form but no value or a program that fails, -1 out of form; nan when the sandbox could not judge."""

    def __init__(self, pool, language):
        self.runner, self.language = Runner(pool, language), language

    def submit(self, puzzle, text, sample=0):
        """Starts what has to run: nothing for deduction, f of the answer for abduction, the answer on the hidden inputs for induction."""
        program, started = "", None
        try:
            answer = answer_of(text)
            program = self._answer(puzzle, answer)
            status = "ok"
            if puzzle.task == "abduction":
                started = self.runner.start(
                    puzzle.entry.program, [inputs_of(program, self.language)]
                )
            elif puzzle.task == "induction":
                hidden = [read(i, self.language) for i in puzzle.entry.inputs[SHOWN:]]
                started = self.runner.start(program, hidden)
        except Refused as reason:
            status = str(reason)
        parsed = Parsed(
            "", program, "", status not in ("format", "no_program", "no_input", "no_output")
        )
        return _Answer(
            puzzle,
            sample,
            text,
            parsed,
            "",
            started[0] if started else None,
            started=started,
            status=status,
        )

    def _answer(self, puzzle, answer):
        if puzzle.task == "induction":
            return code_of(answer, self.language)
        kind = {"deduction": "output", "abduction": "input"}[puzzle.task]
        found = blocks(answer, [kind])
        if not found:
            raise Refused(f"no_{kind}")
        return found[0]

    def collect(self, submissions, deadline=None):
        wait([s.started for s in submissions], deadline)
        return [self._verdict(s) for s in submissions]

    def _verdict(self, submission):
        status, correct, value = submission.status, False, None
        if status == "ok":
            try:
                correct, value = self._compare(submission)
            except Refused as reason:
                status = str(reason)
        reward = (
            math.nan
            if status == "sandbox_error"
            else solver_reward(submission.parsed.format_ok, status == "ok", correct)
        )
        program, parsed = submission.parsed.code, submission.parsed
        return Verdict(
            submission.problem.id,
            reward,
            {"correct": float(correct)},
            correct,
            status,
            value,
            program,
            parsed,
            False,
            False,
        )

    def _compare(self, submission):
        entry, language = submission.problem.entry, self.language
        if submission.started is None:
            texts = [("value", submission.parsed.code)]
        else:
            texts = self.runner.finish(submission.started)
        outputs = entry.outputs[SHOWN:] if submission.problem.task == "induction" else entry.outputs
        values = [value_of(kind, text, language) for kind, text in texts]
        return all(
            same(v, read_one(o, language), language) for v, o in zip(values, outputs)
        ), "; ".join(write(v, language) for v in values)


@dataclass(frozen=True)
class _Answer(Submission):
    started: tuple | None = None
    status: str = ""


def solver_reward(formatted, runnable, correct):
    """Equation (2): accuracy if the answer can be read and run, -0.5 if only its form is right, else -1.

    The public implementation gives -0.5 to a wrong answer in the right form; the paper's equation, and its text, give it accuracy 0.
    """
    if not formatted:
        return -1.0
    return float(correct) if runnable else -0.5
