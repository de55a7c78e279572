"""A program with blanks for its comments and strings: what is left is code."""

import functools
import re


def blanked(program, language):
    """The program with a blank for each character of a comment or string; line ends stay.

    Places stay too: what is found at a place of the result stands there in the program.
    Python's `x = "{"  # {` gives `x =` and blanks to the same length.
    """
    opens, closes = language.block_comment or (None, None)
    starts = _starts(language.quotes, language.comment, opens)
    parts = []
    end = 0
    while found := starts.search(program, end):
        parts.append(program[end : found.start()])
        end = found.end()
        if found[0] == opens:
            end = _comment_end(program, end, opens, closes, language.nested_comments)
        parts.append(re.sub(r"[^\n]", " ", program[found.start() : end]))
    return "".join([*parts, program[end:]])


@functools.cache
def _starts(quotes, comment, opens):
    """Regular expression for a string, a comment to the line's end, an escaped character, or what
    opens a block comment.

    What comes first in a text wins: a quote in a comment opens no string.
    """
    kinds = [
        r"#\\.|\\[^(\s]",  # outside strings: Racket's #\{, Bash's \"; R's \(x) is a function
        r"'(?:\\[^\n]{1,10}?|[^'\\\n])'",  # one character, also where ' opens no string
    ]
    if opens:
        kinds.append(re.escape(opens))
    before = r"(?<![$\w{])" if comment == "#" else ""  # Bash's $# and ${#name} are no comments
    kinds.append(rf"{before}{re.escape(comment)}[^\n]*")
    for quote in quotes:
        kinds.append(rf"{quote * 3}[\s\S]*?{quote * 3}")
        kinds.append(rf"{quote}(?:\\[\s\S]|[^\\{quote}])*{quote}")
    return re.compile("|".join(kinds))


def _comment_end(program, start, opens, closes, nested):
    """Where a block comment ends that was opened just before `start`; the text's end if nowhere."""
    depth = 1
    marks = re.compile(f"{re.escape(opens)}|{re.escape(closes)}")
    for mark in marks.finditer(program, start):
        if mark[0] == closes:
            depth -= 1
        elif nested:
            depth += 1
        if depth == 0:
            return mark.end()
    return len(program)
