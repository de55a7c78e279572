"""Completions of self-play taken apart: proposals (program, inputs, message) and answers."""

import re

from sandbox.languages.calls import input_text
from sandbox.languages.literals import read
from sandbox.languages.values import MAX_TEXT
from selfplay.proposals import PAIRS, Entry, Refused


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
