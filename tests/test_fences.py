"""Fenced blocks: the wrapping of a program says nothing about it."""

import re
import time

import pytest

from sandbox.languages import language_names, load_language
from sandbox.languages.definitions import find_definition
from tasks.fences import defining_block, fenced_blocks

CODE = "def f(x):\n    return x"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{CODE}\n```",
        f"Here it is:\n\n```python\n{CODE}\n```\nThat is all.",
        f"```python \t\n{CODE}\n``` ",
        f"```python title=f.py\n{CODE}\n```",
        f"```python {{.line-numbers}}\n{CODE}\n```",
        f"```{{python}}\n{CODE}\n```",
        f"```Python\n{CODE}\n```",
        f"``` python\n{CODE}\n```",
        f"~~~python\n{CODE}\n~~~",
        f"````python\n{CODE}\n````",
        f"```python\n{CODE}\n````",  # closed by more
        f"```python\n{CODE}",  # not closed
        f"```python\n{CODE}```",
        f"Code: ```python\n{CODE}\n```",
        f"<answer>```python\n{CODE}\n```</answer>",
        "1. So:\n   ```python\n   def f(x):\n       return x\n   ```",
        f"Use ``` for blocks.\n```python\n{CODE}\n```",  # prose about fences
        f"Use ```f``` so:\n```python\n{CODE}\n```",
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_block_is_found_in_any_wrapping(text, line_end):
    (block,) = fenced_blocks(text.replace("\n", line_end))
    assert block.code == CODE
    assert block.tag == "python"


@pytest.mark.parametrize(
    "text, codes",
    [
        ("no block", []),
        ("```\n```", [""]),
        ("```lua\na\n```\nthen\n```\nb\n```", ["a", "b"]),  # whatever their tags
        ("~~~\n```\na\n```\n~~~", ["```\na\n```"]),  # other fences are code
        ("````\n```\na\n```\n````", ["```\na\n```"]),
        ("```lua\n-- ```\na\n```", ["-- ```\na"]),  # a comment
        ("```lua\na\n```lua\nb\n```", ["a", "b"]),  # the first is not closed
        ("```lua\na\n```\nand\n```lua\nb", ["a", "b"]),
        # A docstring with an example: one block.
        ('```julia\n"""\n```jldoctest\nf()\n```\n"""\nf() = 1\n```\nend', [
            '"""\n```jldoctest\nf()\n```\n"""\nf() = 1'
        ]),
    ],
)  # fmt: skip
def test_blocks_come_in_order(text, codes):
    assert [block.code for block in fenced_blocks(text)] == codes


@pytest.mark.parametrize(
    "info, tag", [("", ""), ("c++", "c++"), ("C#", "c#"), ("{.r}", "r"), ("lua:main.lua", "lua")]
)
def test_the_tag_is_the_first_word(info, tag):
    (block,) = fenced_blocks(f"```{info}\na\n```")
    assert block.tag == tag


@pytest.mark.parametrize("bad", ["`" * 10000 + "a`", "```a\n" * 5000, "a```" * 5000, ":`" * 5000])
def test_a_degenerate_completion_takes_no_time(bad):
    started = time.perf_counter()
    fenced_blocks(bad)
    assert time.perf_counter() - started < 1


# ---- the block that defines the asked function ----

# A definition of add in every language of MultiPL-E, and a use of it.
DEFINED = {
    "bash": ("add() {\n  echo $(($1 + $2))\n}", 'echo "$(add 1 2)"'),
    "c": ("long *add(long *x, int n) {\n  return x;\n}", "int main() { return add(x, 2); }"),
    "clojure": ("(defn add [x y] (+ x y))", "(println (add 1 2))"),
    "csharp": ("public static long add(long x, long y) {", "Console.WriteLine(add(1, 2));"),
    "cpp": ("std::vector<long> add(std::vector<long> x) {\n  return x;\n}", "if (add(x) == y) {"),
    "elixir": ("def add(x, y) do\n  x + y\nend", "IO.inspect(HumanEval.add(1, 2))"),
    "fortran": ("integer function add(x, y)", "print *, add(1, 2)"),
    "go": ("func add(x int, y int) int {\n\treturn x + y\n}", "fmt.Println(add(1, 2))"),
    "haskell": ("add :: Int -> Int -> Int\nadd x y = x + y", "main = print (add 1 2)"),
    "java": ("public static long add(long x, long y) {", "System.out.println(add(1, 2));"),
    "javascript": ("const add = (x, y) => x + y;", "console.log(add(1, 2) === 3)"),
    "julia": ("add(x, y) = x + y", "@assert add(1, 2) == 3"),
    "lisp": ("(defun add (x y) (+ x y))", "(print (add 1 2))"),
    "llvm-ir": ("define i64 @add(i64 %x) {", "%a = call i64 @add(i64 1)"),
    "lua": ("local function add(x, y) return x + y end", "print(add(1, 2) == 3)"),
    "ocaml": ("let rec add x y = x + y", "let () = print_int (add 1 2)"),
    "perl": ("sub add {\n    my ($x, $y) = @_;\n}", "print add(1, 2);"),
    "php": ("function add($x, $y) {\n    return $x + $y;\n}", "echo add(1, 2);"),
    "prolog": ("add(X, Y, Z) :- Z is X + Y.", "?- add(1, 2, Z)."),
    "python": ("def add(x, y):\n    return x + y", "assert add(1, 2) == 3"),
    "r": ("add <- function(x, y) x + y", "print(add(1, 2) == 3)"),
    "racket": ("(define (add x y) (+ x y))", "(displayln (add 1 2))"),
    "ruby": ("def add(x, y)\n  x + y\nend", "puts add(1, 2) == 3"),
    "rust": ("fn add(x: isize, y: isize) -> isize {", 'println!("{}", add(1, 2));'),
    "scala": ("def add(x: Long, y: Long): Long = {", "println(Problem.add(1, 2))"),
    "scheme": ("(define (add x y) (+ x y))", "(display (add 1 2))"),
    "typescript": (
        "export const add = (x: number, y: number): number => x + y;",
        "const five: number = add(2, 3); // add: twice = 4",
    ),
}


@pytest.mark.parametrize("name", language_names())
def test_a_definition_is_told_from_a_use(name):
    definition, use = DEFINED[name]
    pattern = load_language(name).defines.replace("NAME", "add")
    assert re.search(pattern, definition)
    assert not re.search(pattern, use)
    assert not re.search(pattern, definition.replace("add", "added"))


def test_the_block_that_defines_the_function_is_taken():
    lua = load_language("lua")
    text = (
        "```lua\nfunction add(x, y) return x end\n```\nCorrected:\n"
        "```\nfunction add(x, y) return x + y end\n```\nUse:\n"
        "```lua\nprint(add(1, 2))\n```\nOutput:\n```\n3\n```"
    )
    blocks = fenced_blocks(text)
    assert defining_block(blocks, "add", lua) == blocks[1]
    assert defining_block(blocks, "subtract", lua) == blocks[2]  # none: the last in Lua
    assert defining_block(blocks[1::2], "subtract", lua) == blocks[3]  # without a tag: the last
    assert defining_block([], "add", lua) is None
    assert find_definition(text, "", lua) is None  # a whole program: no function is asked for
