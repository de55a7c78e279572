"""Programs made from a template of a language's TOML."""

import re


def filled(template, words):
    """The template with each {name} of `words` replaced.

    In one pass: a name inside a program stays as it is. "{code} {tests}" with code "{tests}" and
    tests "1" gives "{tests} 1".
    """
    slots = "|".join(re.escape(f"{{{name}}}") for name in words)
    return re.sub(slots, lambda slot: words[slot[0][1:-1]], template)
