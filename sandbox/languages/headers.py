"""The line that a program of some languages must begin with: #lang racket, <?php, package main.

A language's TOML names it (`header`). A program may bring its own, in another variant too (#lang
racket/base), below blank lines and comments.
"""

import re

from sandbox.languages.comments import blanked


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
    return line.search(blanked(program, language))
