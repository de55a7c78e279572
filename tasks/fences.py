"""Fenced blocks of Markdown as models write them: the one reader for all tasks.

    Here it is:
    ```lua title=twice
    function f(x) return 2 * x end
    ```

    fenced_blocks(text)  ->  [Block("lua title=twice", "function f(x) return 2 * x end", "")]

A fence is three or more backticks or tildes, closed by as many or more of the same. The wrapping
says nothing about the code: tag, title, indentation, line ends, what stands before a fence on its
line ("Code: ```lua") or beside the one that closes it ("end```", "```</answer>").

A fence with a tag inside a block opens one within it (an example in a docstring): that is code. A
block that is not closed ends at the next fence that opens one, else with the text.
"""

import re
from dataclasses import dataclass

from sandbox.languages.definitions import find_definition

_FENCE = r"(?P<before>.*?)(?<![`~])(?P<fence>`{3,}+|~{3,}+)"  # ++: never tried again, shorter
_OPENS = re.compile(_FENCE + r"(?P<info>[^`]*)")
_CLOSES = re.compile(_FENCE + r"\s*(</\w+>.*)?")


@dataclass(frozen=True)
class Block:
    info: str  # what stands after the opening fence: "lua title=twice"
    code: str
    before: str  # what stands before the opening fence on its line

    @property
    def tag(self):
        """The first word of the info in lower case: "lua"; "r" of {r}, "c++" of C++."""
        return re.match(r"\W*([\w+#-]*)", self.info)[1].lower()


def fenced_blocks(text):
    """list[Block] in order, whatever their tags."""
    lines = unix_lines(text).split("\n")
    opening, closing = _fences(lines)
    starts = list(opening)
    next_starts = [*starts[1:], len(lines)]

    blocks = []
    end = 0
    for start, next_start in zip(starts, next_starts):
        if start < end:
            continue  # within the last block
        fence = opening[start]
        end, last_line = closing.get(start, (next_start, ""))
        code = [_dedented(line, fence["before"]) for line in lines[start + 1 : end]]
        if last_line.strip():
            code.append(last_line)
        blocks.append(Block(fence["info"].strip(), "\n".join(code), fence["before"]))
    return blocks


def _fences(lines):
    """Which lines open a block, and which close it.

    -> {line that opens: match}, {line that opens: (line that closes, what stands before its fence)}
    """
    opening, closing = {}, {}
    still_open = []  # lines, the innermost last
    for number, line in enumerate(lines):
        outer = opening[still_open[-1]] if still_open else None
        closes = _CLOSES.fullmatch(line)
        opens = _OPENS.fullmatch(line)

        if closes and outer and _can_close(closes, outer):
            closing[still_open.pop()] = number, closes["before"]
        elif opens and _can_open(opens, outer):
            opening[number] = opens
            still_open.append(number)
    return opening, closing


def _can_close(match, outer):
    """As many or more of the same, alone or right behind the code; "# ```" is a comment."""
    before, fence = match["before"], match["fence"]
    if not fence.startswith(outer["fence"]):
        return False
    is_behind_code = before[-1:].strip() != "" and "`" in fence
    return is_behind_code or not before.strip()


def _can_open(match, outer):
    """Within a block only with a tag; behind text with a tag or nothing ("Use ``` so" is prose)."""
    before, fence = match["before"], match["fence"]
    words = len(match["info"].split())
    starts_line = not before.strip()
    if outer:
        return starts_line and words > 0 and fence == outer["fence"]
    is_behind_text = before[-1:] in (" ", "\t", ":", ">") and words < 2 and "`" in fence
    return starts_line or is_behind_text


def _dedented(line, indent):
    """A line without the indentation that the fence has too."""
    own = len(line) - len(line.lstrip(" \t"))
    return line[min(own, len(indent)) :] if indent.isspace() else line


def unix_lines(text):
    """Text with every line end as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def defining_block(blocks, name, language):
    """The last block that defines a function; None without any block.

    What follows it shows its use or its output. Where none does, the function's body may stand
    alone: the last block tagged as the language (or else without a tag) that does not use the name.
    """
    defining = [block for block in blocks if find_definition(block.code, name, language)]
    if defining:
        return defining[-1]
    tags = (language.name, *language.fence, *language.aliases)

    def rank(block):
        is_use = re.search(rf"\b{re.escape(name)}\b", block.code) is not None
        return block.tag in tags, not block.tag, not is_use

    return max(reversed(blocks), key=rank, default=None)
