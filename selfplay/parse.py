"""What self-play reads: proposals and answers in completions, and values that programs print."""

import re

from sandbox.languages.calls import input_text
from sandbox.languages.definitions import find_definition
from sandbox.languages.headers import with_header, without_header
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import MAX_TEXT
from selfplay.puzzles import PAIRS, Entry, Refused
from tasks.fences import fenced_blocks
from tasks.verdicts import ANSWER_END, first_answer

MAX_MESSAGE = 1000  # characters of an induction proposal's message that are kept


def parse_proposal(text, task, language, program="", composed=()):
    """Completion -> Entry without outputs; Refused with the reason.

    program: the one that an induction proposal is about.
    composed: programs that the new one must call as g_0, g_1, ...
    """
    answer = answer_of(text)
    inputs = blocks(answer, ["input"])
    message = ""
    if task == "induction":
        messages = blocks(answer, ["message"])
        if len(inputs) < PAIRS:
            raise Refused("few_inputs")
        if not messages or not messages[0].strip():
            raise Refused("no_message")
        inputs = inputs[-PAIRS:]
        message = messages[0].strip()[:MAX_MESSAGE]
    else:
        program = compose(code_of(answer, language), composed, language)
        if not inputs:
            raise Refused("no_input")
        inputs = inputs[:1]

    calls = [inputs_of(one, language) for one in inputs]
    canonical = tuple(input_text(arguments, language) for arguments in calls)
    return Entry(program, canonical, (), message)


# ---- parts of a completion ----


def answer_of(text):
    """What stands between the first answer tags of a completion of "... <think>".

    Refused unless it has both tags in order.
    """
    thought, _, rest = first_answer(text).partition("</think>")
    answer = rest.lstrip()
    has_tags = answer.startswith("<answer>") and answer.endswith(ANSWER_END)
    if not has_tags or "<answer>" in thought:
        raise Refused("format")
    return answer.removeprefix("<answer>").removesuffix(ANSWER_END)


def blocks(answer, tags):
    """Contents of the fenced blocks with one of these tags."""
    return [block.code for block in fenced_blocks(answer) if block.tag in tags]


def code_of(answer, language):
    """The first program of an answer."""
    found = [code for code in blocks(answer, language.fence) if code.strip()]
    if not found:
        raise Refused("no_program")
    return found[0].strip("\n")


def inputs_of(text, language):
    """Arguments of f from an input block; Refused when they are not literals."""
    if len(text.strip()) > MAX_TEXT:
        raise Refused("too_long")
    try:
        found = read(text, language)
    except ValueError:
        raise Refused("input_no_value") from None
    if not found:
        raise Refused("input_no_value")
    return found


def value_of(outcome, language):
    """What a call printed (an Outcome of calls.py), as data; Refused with the reason."""
    if outcome.kind != "value":
        raise Refused(outcome.kind)
    if len(outcome.text) > MAX_TEXT:
        raise Refused("too_long")
    try:
        return read_one(outcome.text, language)
    except ValueError:
        raise Refused("no_value") from None


# ---- programs as text ----


def compose(code, composed, language):
    """The new f behind the earlier programs, which are called g_0, g_1, ...

    Refused unless it calls every one, or when it defines one again.
    """
    if not composed:
        return code

    code = without_header(code, language)
    for i in range(len(composed)):
        is_called = re.search(_whole_word(f"g_{i}"), code)
        if not is_called or find_definition(code, f"g_{i}", language):
            raise Refused("no_composite")

    parts = [renamed(program, i, language) for i, program in enumerate(composed)]
    return with_header("\n".join([*parts, code]), language)


def renamed(program, number, language):
    """An earlier program with its f called g_NUMBER, without the line that names the language."""
    return re.sub(_whole_word("f"), f"g_{number}", without_header(program, language))


def _whole_word(name):
    """A regular expression that matches a name of any language as a whole word."""
    return rf"(?<![\w\-!?*]){re.escape(name)}(?![\w\-!?*])"


def normalised(program, language):
    """Source without comments and white space differences: what makes two programs the same."""
    comment = rf"(?<![\\\"']){re.escape(language.comment)}.*"
    lines = [re.sub(comment, "", line) for line in program.splitlines()]
    return " ".join(" ".join(lines).split())
