"""Where a program defines a function: `defines` of the language's TOML, outside comments and texts."""

import re

from sandbox.languages.comments import blanked

ANY_NAME = r"([\w'?!-]+)"


def find_definition(program, name, language):
    """Match of the last definition of a function; None without one, and where no name is given."""
    found = list(_definitions(program, re.escape(name), language)) if name else []
    return found[-1] if found else None


def last_defined(program, language):
    """The name that a program defines last; "" without one.

    "// Twice.\\nlong twice(long x) {" of C++ gives "twice".
    """
    names = [
        next(filter(None, match.groups())) for match in _definitions(program, ANY_NAME, language)
    ]
    return names[-1] if names else ""


def _definitions(program, name, language):
    if not language.defines:
        return iter(())
    return re.finditer(language.defines.replace("NAME", name), blanked(program, language))
