"""The line that a program of some languages must begin with: #lang racket, <?php, package main.

A language's TOML names it (`header`). A program may bring its own, in another variant too (#lang
racket/base), below blank lines and comments.
"""

import re


def with_header(program, language):
    """The program, below its language's header line unless it brings one."""
    if not language.header or _own_header(program, language):
        return program
    return f"{language.header}\n{program}"


def without_header(program, language):
    """The program without its own header line, to stand below other code."""
    header = _own_header(program, language)
    if header is None:
        return program
    return program[: header.start()] + program[header.end() :]


def _own_header(program, language):
    """The match of the program's own header line, None without one."""
    if not language.header:
        return None
    first_word = re.escape(language.header.split()[0])
    line = re.compile(rf"^[ \t]*{first_word}\b.*\n?", re.MULTILINE | re.IGNORECASE)
    return line.search(_with_blank_comments(program, language))


def _with_blank_comments(program, language):
    """A program with blanks for its comments, every line and place as it was.

    Strings are not known: what looks like a comment in one is blank too.
    """
    opens, closes = language.block_comment or (None, None)
    marks = [mark for mark in (opens, closes, language.comment) if mark]
    any_mark = "|".join(map(re.escape, ["\n", *marks]))

    parts = []
    depth, to_line_end = 0, False
    for part in re.split(f"({any_mark})", program):
        if part == "\n":
            to_line_end = False
        elif to_line_end:
            pass
        elif part == opens:
            depth = depth + 1 if language.nested_comments else 1
        elif part == closes:
            depth = max(depth - 1, 0)
        elif part == language.comment:
            to_line_end = depth == 0

        is_comment = part in marks or to_line_end or depth > 0
        parts.append(" " * len(part) if is_comment and part != "\n" else part)
    return "".join(parts)
