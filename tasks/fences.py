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

    blocks, end = [], 0
    for start, following in zip(starts, [*starts[1:], len(lines)]):
        if start < end:
            continue  # within the last block
        fence = opening[start]
        end, last_line = following, []
        if start in closing:
            end, last_line = closing[start]
        code = [_dedented(line, fence["before"]) for line in lines[start + 1 : end]]
        block = Block(fence["info"].strip(), "\n".join(code + last_line), fence["before"])
        blocks.append(block)
    return blocks


def _fences(lines):
    """Which lines open and which close a block.

    -> {line that opens: its match}, {line that opens: (line that closes, code before its fence)}
    """
    opening, closing = {}, {}
    is_open = []  # lines, the innermost last
    for number, line in enumerate(lines):
        outer = opening[is_open[-1]] if is_open else None
        closes, opens = _CLOSES.fullmatch(line), _OPENS.fullmatch(line)

        if outer and closes and _can_close(closes, outer):
            code = [closes["before"]] if closes["before"].strip() else []
            closing[is_open.pop()] = number, code
        elif opens and _can_open(opens, outer):
            opening[number] = opens
            is_open.append(number)
    return opening, closing


def _can_close(match, outer):
    """As many or more of the same, alone or right behind the code; "# ```" is a comment."""
    before = match["before"]
    is_behind_code = bool(before) and not before[-1].isspace() and "`" in match["fence"]
    return match["fence"].startswith(outer["fence"]) and (not before.strip() or is_behind_code)


def _can_open(match, outer):
    """Outside of a block with a tag, a title or nothing; within one only with a tag."""
    before, info = match["before"], match["info"].strip()
    if outer:
        return not before.strip() and match["fence"] == outer["fence"] and bool(info)
    # "Use ``` for blocks" is prose.
    is_behind_text = before[-1:] in (" ", "\t", ":", ">") and not re.search(r"\s", info)
    return not before.strip() or is_behind_text and "`" in match["fence"]


def _dedented(line, indent):
    """A line without the indentation that the fence has too."""
    own = len(line) - len(line.lstrip(" \t"))
    return line[min(own, len(indent)) :] if indent.isspace() else line


def unix_lines(text):
    """Text with every line end as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def defining_block(blocks, name, language):
    """The last block that defines a function, else the last; None without any.

    What follows the function's block shows its use or its output.
    """
    definition = language.defines.replace("NAME", re.escape(name))
    defining = [block for block in blocks if definition and re.search(definition, block.code)]
    return next(reversed(defining or blocks), None)
