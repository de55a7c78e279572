"""Chat answers become whole programs, whatever form a model gives them.

The forms are made from one right program in each language (tests/right_programs), so that each is
tried in all of them; the forms that only some languages have stand in OWN.
"""

import re

import pytest

import known_programs
from sandbox import Pool
from sandbox.languages import language_names, load_language
from sandbox.languages.comments import blanked
from sandbox.languages.definitions import find_definition
from tasks.evalplus import load_problems
from tasks.multipl_e import TestJudge, load_benchmark
from tasks.whole_programs import answer_code, whole_program

LANGUAGES = [name for name in language_names() if "tests" in load_language(name).answer]
# Seconds a program to compile or to start.
SLOW = (
    "clojure",
    "cpp",
    "elixir",
    "go",
    "haskell",
    "java",
    "julia",
    "ocaml",
    "r",
    "racket",
    "rust",
    "scala",
    "typescript",
)
needs_data = pytest.mark.skipif(
    not known_programs.DATA.is_dir(), reason="../shared/data is not here"
)

# HumanEval_53_add: the body behind the prompt's begun function, as written by a model that closes
# what it has opened, with a variable whose name holds the function's.
BODY = {
    "bash": '    local added=$(($1 + $2))\n    echo "$added"\n}',
    "clojure": "  (let [added (+ x y)]\n    added))",
    "cpp": "    long added = x + y;\n    return added;\n}",
    "elixir": "    added = x + y\n    added\n  end\nend",
    "go": "\tadded := x + y\n\treturn added\n}",
    "haskell": "  let added = x + y in added",
    "java": "        long added = x + y;\n        return added;\n    }\n}",
    "javascript": "    let added = x + y;\n    return added;\n}",
    "julia": "    added = x + y\n    return added\nend",
    "lua": "    local added = x + y\n    return added\nend",
    "ocaml": "  let added = x + y in\n  added",
    "perl": "    my $added = $x + $y;\n    return $added;\n}",
    "php": "    $added = $x + $y;\n    return $added;\n}",
    "python": "    added = x + y\n    return added",
    "r": "    added <- x + y\n    return(added)\n}",
    "racket": "  (let ((added (+ x y)))\n    added))",
    "ruby": "    added = x + y\n    added\nend",
    "rust": "    let added = x + y;\n    added\n}",
    "scala": "        val added = x + y\n        added\n    }\n}",
    "csharp": "        long added = x + y;\n        return added;\n    }\n}",
    "typescript": "    let added: number = x + y;\n    return added;\n}",
}
USE = {  # of the function, as an example that a model shows
    "bash": "add 2 3  # 5",
    "clojure": "(println (add 2 3)) ; 5",
    "elixir": "IO.puts(HumanEval.add(2, 3)) # 5",
    "javascript": "console.log(add(2, 3)); // 5",
    "julia": "println(add(2, 3)) # 5",
    "lua": "print(add(2, 3)) -- 5",
    "ocaml": 'let () = Printf.printf "%d\\n" (add 2 3)',
    "perl": 'print add(2, 3), "\\n"; # 5',
    "php": 'echo add(2, 3), "\\n"; // 5',
    "python": "print(add(2, 3))  # 5",
    "r": "print(add(2, 3)) # 5",
    "racket": "(displayln (add 2 3)) ; 5",
    "ruby": "puts add(2, 3) # 5",
    "typescript": "console.log(add(2, 3)); // 5",
    # These have no code outside functions; what stands beside a class is a block of its own.
    "scala": "println(Problem.add(2, 3)) // 5",
    "csharp": "Console.WriteLine(Problem.Add(2, 3)); // 5",
    "java": "System.out.println(Problem.add(2, 3)); // 5",
    "cpp": "int main() {\n    std::cout << add(2, 3) << std::endl;\n    return 0;\n}",
    "go": "func main() {\n\tfmt.Println(add(2, 3))\n}",
    "haskell": "main :: IO ()\nmain = print (add 2 3)",
    "rust": 'fn main() {\n    println!("{}", add(2, 3));\n}',
}
BESIDE = ("csharp", "java", "scala")
OWN = {  # language -> whole programs of other shapes
    "bash": ["#!/bin/sh\nfunction add {\n  plus $1 $2\n}\nplus() { echo $(($1 + $2)); }\nadd 1 2"],
    "csharp": [
        "using System;\n\npublic class Solution {\n    public static long Add(long x, long y) {\n"
        "        return x + y;\n    }\n    public static void Main(string[] args) {\n"
        "        Console.WriteLine(Add(1, 2));\n    }\n}",
        "public static long Add(long x, long y) => Plus(x, y);\n"
        "static long Plus(long x, long y) { return x + y; }",
        "using System;\nusing System.Linq;\nnamespace Sums\n{\n    using System.Text;\n"
        "    static class Adder\n    {\n        static long Add(long x, long y)\n        {\n"
        '            using (var file = new System.IO.StringReader("")) return new[] { x, y }.Sum();\n'
        "        }\n    }\n}",
    ],
    "cpp": [
        "#include <iostream>\nusing namespace std;\nlong add(long x, long y)\n{ return x + y; }\n"
        "int main(int argc, char **argv) { cout << add(1, 2) << endl; }",
        "auto add = [](long x, long y) { return x + y; };",
    ],
    "elixir": [
        'defmodule Solution do\n  @doc "adds"\n  def add(x, y), do: x + y\nend',
        "def add(x, y) do\n  x + y\nend",
    ],
    "go": [
        'package main\n\nimport "fmt"\n\nfunc add(x int, y int) int {\n\treturn x + y\n}\n\n'
        "func main() { fmt.Println(add(1, 2)) }",
        'package add_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\n// adds\n'
        "func add(x int, y int) int {\n\treturn x + y\n}",
        'import (\n\t"math"\n\tf "fmt"\n)\nfunc add(x int, y int) int {\n\tf.Println(math.Pi)\n\treturn x + y\n}',
    ],
    "haskell": [
        "add :: Num a => a -> a -> a\nadd x y = x + y",
        "{-# LANGUAGE ScopedTypeVariables #-}\nmodule Add (add, main) where\n\nimport Data.List\n\n"
        "add :: Int -> Int -> Int\nadd x y = foldl' (+) 0 [x, y]\n\nmain :: IO ()\nmain = print (add 1 2)",
    ],
    "java": [
        "public class Solution {\n    public static long add(long x, long y) {\n        return x + y;\n    }\n"
        "    public static void main(String[] args) {\n        System.out.println(add(1, 2));\n    }\n}",
        "public static long add(long x, long y) {\n    return plus(x, y);\n}\n"
        "private static long plus(long x, long y) { return x + y; }",
        "class Outer {\n    static class Inner {\n        private static long add(long x, long y) {\n"
        "            return x + y;\n        }\n    }\n}",
        "package sums;\nimport java.util.List;\nclass Pair { long a, b; }\nfinal class Adder {\n"
        "    private Adder(int x) { }\n    static long add(long x, long y) { return x + y; }\n}",
    ],
    "javascript": [
        "const add = (x, y) => x + y;\nmodule.exports = add;",
        "const plus = (x, y) => x + y;\nconst add = plus;",
        "export default function add(x, y) {\n  return x + y;\n}",
        "const add = async => async; { var sum = 0 }\nfunction plus(x, y) { return x + y; }\n"
        "function add(x, y) { return plus(x, y); }\nexport { add };".split("\n", 1)[1],
        "function add(x, y) {\n  const text = `{${x}`;\n  return x + y; // }\n}",
    ],
    "julia": ["add(x::Int64, y::Int64)::Int64 = x + y", "const add = (x, y) -> x + y"],
    "lua": ["local add = function(x, y) return x + y end\nreturn add"],
    "ocaml": ["let rec add x y = x + y;;\n\nadd 2 3;;", "let add = fun x y -> x + y"],
    "php": [
        "<?php\n\nfunction add($x, $y) {\n    return $x + $y;\n}\n\n?>\n",
        "<?php function add($x, $y) { return $x + $y; } ?>",
    ],
    "python": [
        "from typing import *\n\ndef add(x, y):\n    return x + y\n\n"
        'if __name__ == "__main__":\n    print(add(1, 2))',
        "add = lambda x, y: x + y",
    ],
    "r": ["add = function(x, y) x + y\ncat(add(1, 2))", "add <- \\(x, y) x + y"],
    "racket": [
        "#lang racket/base\n(define add (lambda (x y) (+ x y)))",
        "(define (add x y) (+ x y))",
    ],
    "rust": [
        "use std::collections::{HashMap, HashSet};\npub fn add(x: isize, y: isize) -> isize {\n    x + y\n}\n"
        "fn main() {}",
    ],
    "scala": [
        "object Solution extends App {\n  def add(x: Long, y: Long): Long = x + y\n  println(add(1, 2))\n}",
        "def add(x: Long, y: Long): Long = {\n  plus(x, y)\n}\n\n"
        "private def plus(x: Long, y: Long) = x + y",
        "package sums\n\nimport scala.collection.mutable\nimport scala.math.{max, min}\n\n"
        "case class Pair(a: Long, b: Long)\nobject Adder {\n  val add = (x: Long, y: Long) => x + y\n"
        "  def main(args: Array[String]): Unit = println(add(1, 2))\n}",
    ],
    "typescript": [
        "const add = (x: number, y: number): number => x + y;\nexport default add;",
        "type Sum = (x: number, y: number) => number;\nconst add: Sum = (x, y) => x + y;",
        "const add: (x: number, y: number) => number = function (x, y) {\n  return x + y;\n};",
        "export function add<T extends number>(x: T, y: T): number {\n  return x + y;\n}",
        "interface Pair { x: number; y: number }\nfunction plus({ x, y }: Pair) { return x + y; }\n"
        "function add(x: number, y: number): number { return plus({ x, y }); }\nexport { add };",
    ],
}


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def add_row(name):
    return next(row for row in load_benchmark("humaneval", name) if "HumanEval_53_add" in row.id)


def forms(name):
    """{what it is: a right answer} in every shape that models give it."""
    language = load_language(name)
    tag = language.fence[0]
    prompt = add_row(name).prompt.rstrip()
    body = BODY[name]
    whole = f"{prompt}\n{body}"
    use = USE[name]
    bare = blanked(whole, language).split("\n")
    code_alone = "\n".join(line for line, rest in zip(whole.split("\n"), bare) if rest.strip())
    return {
        "in one block": f"Here is the function:\n\n```{tag}\n{whole}\n```",
        "then its use": f"```{tag}\n{whole}\n```\nUse it so:\n```{tag}\n{use}\n```",
        "then its output": f"```{tag}\n{whole}\n```\nIt prints:\n```\n5\n```\n```console\n$ run\n```",
        "with its use": f"```{tag}\n{whole}\n\n{'' if name in BESIDE else use}\n```",
        "a body": f"```{tag}\n{body}\n```",
        "a body that is left open": f"```{tag}\n{opened(body)}\n```",
        "a body, then its use": f"```{tag}\n{body}\n```\nFor example:\n```{tag}\n{use}\n```\n```\n5\n```",
        "not fenced": f"Here is the completed code:\n\n{code_alone}\n\nThis adds both numbers.",
        "a body, not fenced": f"{body}\n\nThis adds both numbers.",
        "fenced by tildes": f"~~~{tag} title=add\r\n{whole}\r\n~~~\r\n".replace("\n", "\r\n"),
        "in a list": "1. Code:\n\n" + f"   ```{tag}\n{whole}\n   ```".replace("\n", "\n   "),
        "without a tag, not closed": f"Code:\n```\n{whole}",
        "with another tag": f"```text\n{whole}\n```",
        "after reasoning": f"<think>```{tag}\nnot this\n```</think>\n```{tag}\n{whole}\n```",
    }


def opened(body):
    """A body without what closes its function."""
    return re.sub(r"(\s*(\}|\bend))+\Z|(?<=[\w)])\)\Z", "", body)


@needs_data
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LANGUAGES]
)
def test_right_answers_pass_in_every_form_and_wrong_ones_in_none(name, pool):
    language = load_language(name)
    if language.missing():
        pytest.skip(language.missing())
    try:
        judge = TestJudge(pool, language, "chat")
    except ValueError as missing:
        pytest.skip(str(missing))

    row = add_row(name)
    answers = forms(name)
    for number, code in enumerate(OWN.get(name, [])):
        answers[f"own {number}"] = f"```{language.fence[0]}\n{code}\n```"
    submissions = [judge.submit(row, text) for text in answers.values()]
    # A wrong program stays wrong in its first two forms, and so does a use alone.
    wrong = [text.replace("+", "-") for text in list(answers.values())[:5]]
    wrong.append(f"```{language.fence[0]}\n{USE[name]}\n```")
    submissions += [judge.submit(row, text) for text in wrong]

    verdicts = judge.collect(submissions, 500)
    failed = [form for form, verdict in zip(answers, verdicts) if not verdict.correct]
    assert not failed
    assert not any(verdict.correct for verdict in verdicts[len(answers) :])


# ---- the parts ----


@pytest.mark.parametrize(
    "name, program, code",
    [
        ("python", 'x = "{"  # {', "x =         "),
        (
            "python",
            'def f():\n    """def g(): it\'s"""\n    y',
            "def f():\n                       \n    y",
        ),
        ("bash", 'echo ${#x} "$#" # }', "echo ${#x}         "),
        ("racket", "(f #\\) ) ; )\n#| ( #| ) |# ( |# 'a", "(f     )    \n                  'a"),
        ("rust", "f::<'a>('{') // {", "f::<'a>(   )     "),
        ("javascript", "f(`{\n${x}`) /* { */ + 1", "f(  \n     )         + 1"),
        ("lua", "x = 1 --[[ {\n]] y = '--' z", "x = 1       \n   y =      z"),
        ("ocaml", '(* (* { *) } *) let x\' = "*)"', "                let x' =     "),
    ],
)
def test_comments_and_texts_are_no_code(name, program, code):
    assert blanked(program, load_language(name)) == code


@pytest.mark.parametrize("name", language_names())
def test_blanking_takes_linear_time_and_keeps_places(name):
    language = load_language(name)
    marks = [
        language.comment,
        *language.block_comment,
        "'",
        '"',
        "`",
        '"""',
        "\\",
        "'\\",
        "{",
        "\n",
    ]
    for mark in marks:
        text = mark * 20_000
        assert len(blanked(text, language)) == len(text)
        assert blanked(text, language).count("\n") == text.count("\n")
        find_definition(text, "add", language)


@needs_data
@pytest.mark.parametrize("name", LANGUAGES)
def test_the_asked_function_is_what_the_tests_call(name):
    language = load_language(name)
    for bench in ("humaneval", "mbpp"):
        for row in load_benchmark(bench, language):
            called = row.prompt if name == "elixir" else row.tests  # candidate(...), do: NAME(...)
            assert re.search(rf"(?<![\w'-]){re.escape(row.entry)}(?![\w'-])", called), row.id


@needs_data
def test_a_helper_of_the_prompt_comes_with_it():
    """HumanEval's palindrome problem: the prompt has a function that the asked one may call."""
    rows = load_problems("humaneval+", "python")
    row = next(row for row in rows if row.entry == "make_palindrome")
    code = "def make_palindrome(string: str) -> str:\n    return is_palindrome(string)"
    whole = whole_program(row, code, load_language("python"))
    assert whole.count("def is_palindrome(") == 1
    again = whole_program(row, whole, load_language("python"))
    assert again.rstrip() == whole.rstrip()  # the answer brings it


def test_prose_alone_is_no_program():
    lua = load_language("lua")
    assert answer_code("I cannot do that: add is not known.", "add", lua) == ""
    assert answer_code("", "add", lua) == ""
    assert answer_code("no code", "add", lua) == ""
