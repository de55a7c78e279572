"""Translation: real data, hidden tests, real interpreters; what is no translation earns nothing."""

import json
import math
import random
import re
from dataclasses import replace

import pytest

from sandbox import Pool
from sandbox.languages import language_names, load_language
from tasks import contamination, translate, translate_data
from tasks.data import find_data, read_jsonl
from tasks.translate import (
    TranslateJudge,
    interface,
    load_translations,
    parse_translation,
    translation_messages,
)
from tasks.translate_data import Case, Translation

MBPP = "multipl_e/v3/mbpp-py-reworded.jsonl"

needs_data = pytest.mark.skipif(
    find_data("transcoder_gfg/gfg.jsonl") is None, reason="no data folder: set RARECODE_DATA"
)


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=1) as pool:
        yield pool


def needs(language):
    if sentence := load_language(language).missing():
        pytest.skip(sentence)


def verdicts(pool, problem, texts):
    judge = TranslateJudge(pool)
    return judge.collect([judge.submit(problem, text) for text in texts], 60)


def verdict(pool, problem, text):
    return verdicts(pool, problem, [text])[0]


def answer(code, language):
    return f"Here it is.\n```{load_language(language).fence[0]}\n{code.strip()}\n```"


def prompt(problem):
    return translation_messages(problem)[0]["content"]


# ---- interpreters ----

# Total of a list, and whether it is above a limit, as one list: numbers, strings, lists and truth
# values in and out.
MIXED = Translation(
    "t/mixed",
    "cpp",
    "",
    "describe",
    (
        Case(([1, 2, 3], 'say "hi"\\n', 2.5), ['say "hi"\\n', 6, True, 2.5]),
        Case(([], "", -0.5), ["", 0, True, -0.5]),
        Case(([-5], "é", 1.0), ["é", -5, False, 1.0]),
    ),
)
DESCRIBE = {
    "python": """
def f(values, text, limit):
    return (text, sum(values), sum(values) > limit, limit)
""",
    "lua": """
function f(values, text, limit)
  local sum = 0
  for _, v in ipairs(values) do sum = sum + v end
  return {text, sum, sum > limit, limit}
end
""",
    "racket": """
(define (f values text limit)
  (define sum (apply + values))
  (list text sum (> sum limit) limit))
""",
    "scheme": """
(define (f values text limit)
  (let ((sum (apply + values)))
    (list text sum (> sum limit) limit)))
""",
    "lisp": """
(defun f (values text limit)
  (let ((sum (reduce #'+ values)))
    (list text sum (> sum limit) limit)))
""",
    "julia": """
function f(values, text, limit)
    total = isempty(values) ? 0 : sum(values)
    Any[text, total, total > limit, limit]
end
""",
    "javascript": """
function f(values, text, limit) {
  const sum = values.reduce((x, y) => x + y, 0);
  return [text, sum, sum > limit, limit];
}
""",
    "ruby": """
def f(values, text, limit)
  sum = values.sum
  [text, sum, sum > limit, limit]
end
""",
    "r": """
f <- function(values, text, limit) {
  total <- sum(values)
  list(text, total, total > limit, limit)
}
""",
    "prolog": """
f(Values, Text, Limit, [Text, Sum, Above, Limit]) :-
    sum_list(Values, Sum),
    ( Sum > Limit -> Above = true ; Above = false ).
""",
}


@pytest.mark.parametrize("language", DESCRIBE)
def test_a_function_is_called_with_literals_of_its_language(pool, language):
    needs(language)
    problem = replace(MIXED, target=language)
    assert interface(problem, load_language(language)) == "call"
    wrong = DESCRIBE[language].replace(">", "<")
    texts = [answer(DESCRIBE[language], language), answer(wrong, language)]
    right, wrong = verdicts(pool, problem, texts)
    assert (right.reward, right.status) == (1.0, "ok"), right.value
    assert right.components["tests_passed"] == 1.0
    assert wrong.reward == 0.0


# The sum of a list plus the length of a word.
TOTAL_OF = Translation(
    "t/sum",
    "python",
    "def total(values, word):\n    return sum(values) + len(word)",
    "total",
    (
        Case(([1, 2, 3], "abc"), 9),
        Case(([-4, 10], "x"), 7),
        Case(([100], "four"), 104),
    ),
)
TOTAL = {
    "bash": """
read -a values
read word
sum=${#word}
for x in "${values[@]}"; do sum=$((sum + x)); done
echo $sum
""",
    "php": r"""
<?php
$values = array_map("intval", explode(" ", trim(fgets(STDIN))));
echo array_sum($values) + strlen(trim(fgets(STDIN))), "\n";
""",
    "c": r"""
#include <stdio.h>
#include <string.h>
int main() {
    char line[999], word[99];
    int sum = 0, x, n;
    fgets(line, 999, stdin);
    scanf("%s", word);
    for (char *p = line; sscanf(p, "%d%n", &x, &n) == 1; p += n) sum += x;
    printf("%d\n", sum + (int)strlen(word));
}
""",
    "cpp": """
#include <iostream>
#include <sstream>
int main() {
    std::string line, word;
    std::getline(std::cin, line);
    std::cin >> word;
    std::istringstream in(line);
    int sum = word.size(), x;
    while (in >> x) sum += x;
    std::cout << sum << std::endl;
}
""",
    "java": """
import java.util.*;
public class Main {
    public static void main(String[] arguments) {
        Scanner in = new Scanner(System.in);
        int sum = 0;
        for (String x : in.nextLine().split(" ")) sum += Integer.parseInt(x);
        System.out.println(sum + in.nextLine().length());
    }
}
""",
    "typescript": """
import * as readline from "readline";

const lines: string[] = [];
const input = readline.createInterface({ input: process.stdin });
input.on("line", (line: string) => lines.push(line));
input.on("close", () => {
    const values: number[] = lines[0].split(" ").map(Number);
    console.log(values.reduce((x, y) => x + y, lines[1].length));
});
""",
    "scala": """
object Solution extends App {
  val values = scala.io.StdIn.readLine().split(" ").map(_.toInt)
  println(values.sum + scala.io.StdIn.readLine().length)
}
""",
    "csharp": """
using System;
using System.Linq;

class Solution {
    static void Main(string[] args) {
        var values = Console.ReadLine().Split(' ').Select(int.Parse).ToList();
        Console.WriteLine(values.Sum() + Console.ReadLine().Length);
    }
}
""",
}


@pytest.mark.parametrize("language", TOTAL)
def test_any_other_language_reads_standard_input(pool, language):
    needs(language)
    problem = replace(TOTAL_OF, target=language)
    assert interface(problem, load_language(language)) == "stdin"
    assert "one per line" in prompt(problem)
    assert verdict(pool, problem, answer(TOTAL[language], language)).reward == 1.0


@pytest.mark.parametrize("language", sorted(language_names()))
def test_every_language_of_the_sandbox_is_a_target(pool, language):
    """The language's own fixtures.

    `pass` doubles the number on standard input, `wrong` prints 41, `error` fails.
    """
    needs(language)
    fixtures = load_language(language).fixtures
    source = "cpp" if language == "python" else "python"
    cases = (Case(stdin=fixtures["stdin"], stdout="42"),)
    problem = Translation("t/twice", source, "print(2 * int(input()))", "", cases, language)
    texts = [answer(fixtures[kind], language) for kind in ("pass", "wrong", "error")]
    right, wrong, failed = verdicts(pool, problem, texts)
    assert (right.reward, wrong.reward, failed.reward) == (1.0, 0.0, 0.0)
    assert failed.status in ("error", "compile_error")

    cases = (Case((21,), 42),)
    function = Translation("t/f", source, "def g(x): return 2 * x", "g", cases, language)
    assert interface(function, load_language(language)) in ("call", "stdin")
    assert prompt(function).count("```") >= 3


# ---- the judge ----

TOTAL_LUA = replace(TOTAL_OF, target="lua")
LUA = """function f(values, word)
  local s = #word
  for _, v in ipairs(values) do s = s + v end
  return s
end"""
LEAVES = 'function f() print("9\\n7\\n104"); os.exit(0) end'


@pytest.mark.parametrize(
    "text,correct,status",
    [
        (LUA, False, "no_program"),  # no block
        # The form is part of the reward: text after the block, another mark, two blocks.
        (answer(LUA, "lua") + "\nDone.", True, "ok"),
        (answer(LUA, "lua").replace("```lua", "```python"), True, "ok"),
        (answer(LUA, "lua") + "\n" + answer(LUA, "lua"), True, "ok"),
        # Does not compile: self-play's harness reports it.
        (answer("return 1 +", "lua"), False, "ok"),
        (answer(LUA.replace("return s", "return s + 1"), "lua"), False, "ok"),
        (answer("function f() while true do end end", "lua"), False, "cpu_limit"),
        (answer(LEAVES, "lua"), False, None),
        (answer('function f() return "9" end', "lua"), False, "ok"),  # a string is no number
    ],
)
def test_what_is_no_translation_earns_nothing(pool, text, correct, status):
    found = verdict(pool, TOTAL_LUA, text)
    assert found.reward == 0.0
    assert found.correct == correct
    assert status in (None, found.status)


def test_the_right_translation_earns_one(pool):
    assert verdict(pool, TOTAL_LUA, answer(LUA, "lua")).reward == 1.0


@pytest.mark.parametrize(
    "text",
    [
        answer(LUA, "lua").replace("\n", "\r\n"),
        answer(LUA, "lua").replace("```lua", "``` lua \t"),
        answer(LUA, "lua") + " \n\n",
        answer(LUA, "lua").replace("```lua", "```LUA"),
    ],
)
def test_line_ends_and_blanks_do_not_make_a_right_form_wrong(pool, text):
    assert verdict(pool, TOTAL_LUA, text).reward == 1.0


@pytest.mark.parametrize(
    "text",
    [
        answer(LUA, "lua").replace("```", "~~~"),
        answer(LUA, "lua").replace("```", "````"),
        answer(LUA, "lua").replace("```lua", "```lua title=f"),
        answer(LUA, "lua").replace("it is.\n", "it is: "),
        answer(LUA, "lua").replace("\n", "\n  "),
        answer(LUA, "lua").replace("end\n```", "end```"),
        answer(LUA, "lua").removesuffix("```"),
        answer(LUA, "lua") + "\n```lua\nprint(f({1}, 'a'))\n```",  # its use
        answer(LUA, "lua") + "\n```\n9\n```",  # its output
    ],
)
def test_another_form_is_read_but_not_rewarded(text):
    parsed = parse_translation(text, load_language("lua"), "f")
    assert parsed.code == LUA
    assert not parsed.format_ok


@pytest.mark.parametrize("header", ["", "; sum\n#lang racket/base\n"])
def test_a_racket_program_needs_no_header_of_its_own(pool, header):
    needs("racket")
    cases = (Case(stdin="21", stdout="42"),)
    problem = Translation("t/twice", "python", "print(2 * int(input()))", "", cases, "racket")
    text = answer(f"{header}(display (* 2 (read)))", "racket")
    assert verdict(pool, problem, text).reward == 1.0


def test_a_compiler_that_refuses_is_told(pool):
    problem = replace(TOTAL_OF, target="c")
    refused = verdict(pool, problem, answer("int main() { return x; }", "c"))
    assert refused.status == "compile_error"


def test_a_sandbox_that_could_not_judge_is_masked(pool):
    judge = TranslateJudge(pool)
    slow = judge.submit(TOTAL_LUA, answer("function f() while true do end end", "lua"))
    (late,) = judge.collect([slow], deadline=0.0)
    assert math.isnan(late.reward)
    assert not late.judged
    assert late.status == "sandbox_error"
    assert not late.correct
    (done,) = judge.collect([slow])
    assert done.judged


def test_random_reward_is_a_coin_that_the_seed_fixes(pool):
    def coins(seed):
        judge = TranslateJudge(pool, random_reward=True, seed=seed)
        submissions = [judge.submit(TOTAL_LUA, "nothing", sample) for sample in range(40)]
        return [found.reward for found in judge.collect(submissions)]

    drawn = coins(0)
    assert drawn == coins(0) != coins(1)
    assert 8 < sum(drawn) < 32


@pytest.mark.parametrize("target", ["lua", "prolog", "perl"])
def test_no_expected_value_enters_prompt_or_sandbox(target):
    secret = 987654321
    cases = (Case((secret - 1,), secret), Case((1,), "hidden text"))
    problem = Translation("t/s", "python", "def g(x):\n    return x + 1", "g", cases, target)
    jobs = translate.case_jobs(problem, load_language(target), "code", "nonce")
    texts = [prompt(problem), *(str(job.files) + str(job.stdin) for job in jobs)]
    for text in texts:
        assert str(secret) not in text
        assert "hidden text" not in text
    assert str(secret - 1) not in prompt(problem)


# ---- data ----


def failing(pool, problems):
    """Ids of Python problems whose own source, as its translation to Python, fails its cases."""
    judge = TranslateJudge(pool)
    submissions = []
    for problem in problems:
        text = f"```python\n{problem.question}\nf = {problem.entry}\n```"
        submissions.append(judge.submit(replace(problem, target="python"), text))
    return [found.problem for found in judge.collect(submissions, 300) if found.reward != 1.0]


@needs_data
def test_every_exercism_case_is_passed_by_the_python_example(pool):
    problems = translate_data._exercism(None)
    assert len(problems) == 72
    assert failing(pool, problems) == []


@needs_data
def test_sources_pass_their_own_cases(pool):
    """A sample; BENCHMARKS.md has the count over all of them."""
    python = load_language("python")
    problems = []
    for problem in translate_data.built_in():
        if problem.source_language == "python" and interface(problem, python) == "call":
            problems.append(problem)
    assert len(problems) > 1500
    assert len(failing(pool, random.Random(1).sample(problems, 60))) <= 1


@pytest.fixture(scope="module")
def split():
    """(training problems, held-out problems) of three targets."""
    targets = [load_language(name) for name in ("lua", "racket", "java")]
    return load_translations("train", targets), load_translations("test", targets)


@needs_data
def test_held_out_functions_are_in_no_training_prompt(split):
    train, test = split
    assert len(train) > 1500
    assert len(test) > 100
    titles = {problem.id.split("/")[2] for problem in train}
    assert not titles & {problem.id.split("/")[2] for problem in test}


def rows(name):
    return read_jsonl(find_data(name), lambda _, row: row)


@needs_data
def test_no_benchmark_row_is_reachable_from_translation(split):
    """By MBPP id, by name, and by 13 words in a row of a prompt or canonical solution."""
    benchmark = rows("multipl_e/v3/humaneval-py-reworded.jsonl") + rows(MBPP)
    solved = rows("humaneval/HumanEval.jsonl")
    texts = [row["prompt"] for row in benchmark]
    texts += [row["prompt"] + row["canonical_solution"] for row in solved]
    known = set().union(*(contamination.grams(text, 13) for text in texts))
    assert len(known) > 5000
    names = {row["name"].split("_", 2)[2].lower() for row in benchmark} - {"f"}
    mbpp_ids = {int(row["name"].split("_")[1]) for row in rows(MBPP)}

    for problem in [*split[0], *split[1]]:
        number = re.fullmatch(r"translate/mbxp/(\d+)/\w+", problem.id)
        assert not number or int(number[1]) not in mbpp_ids, problem.id
        assert problem.entry.lower() not in names, problem.id
        assert not contamination.grams(problem.question, 13) & known, problem.id


@needs_data
def test_every_target_gets_its_share(split):
    for target in ("lua", "racket", "java"):
        assert sum(problem.target == target for problem in split[0]) > 300


@needs_data
def test_prompts_hide_the_tests(split):
    for problem in split[0]:
        text = prompt(problem)
        assert not re.search(r"^\s*>>> ", text, re.MULTILINE), problem.id
        assert "assert candidate" not in text, problem.id
        for case in problem.cases:
            call = f"{problem.entry}({', '.join(map(repr, case.args))})"
            assert call not in text, problem.id


@pytest.mark.parametrize(
    "source,entry,shown",
    [
        ("if (x == 14) return true; else if (x == 12) return false;", "isNumKeith", True),
        ("// g(12) is false\nbool g(int x);", "g", True),
        ("bool g(int x) { return x == 14; }", "g", False),  # one of two
    ],
)
def test_a_source_that_holds_its_tests_is_left_out(source, entry, shown):
    cases = (Case((14,), True), Case((12,), False))
    problem = Translation("a/b/cpp", "cpp", source, entry, cases)
    assert contamination.shows_cases(problem) is shown


def test_docstrings_go_and_code_stays():
    source = '''def f(x):
    """Twice.
    >>> f(1)
    2
    """
    def g():
        "only this"
    return 2 * x  # stays'''
    kept = """def f(x):
    def g():
        pass
    return 2 * x  # stays"""
    assert translate_data.without_docstrings(source) == kept


# ---- the user's own problems, in the form of docs/oorl.md ----

# 30 whole programs and one function.
PRODUCT = {
    "source_language": "cpp",
    "source": "int main() { int a, b; std::cin >> a >> b; std::cout << a * b; }",
    "tests": [
        {"stdin": "3 4\n", "stdout": "12\n"},
        {"stdin": "5\n6", "stdout": "30"},
        {"stdin": "2 0", "stdout": "0"},
    ],
}
FUNCTION = {
    "id": "call",
    "source_language": "python",
    "source": "def g(d): return d['a']",
    "entry": "g",
    "tests": [{"args": [{"a": n}], "expected": n} for n in range(3)],
}
WORDS = {
    "id": "words",
    "source_language": "text",
    "source": "Read two numbers and print their product.",
    "tests": PRODUCT["tests"],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_users_own_problems(tmp_path, pool):
    path = tmp_path / "mine.jsonl"
    write(path, [{"id": f"apps-{n}", **PRODUCT} for n in range(30)] + [FUNCTION])
    lua, bash = load_language("lua"), load_language("bash")
    train = load_translations("train", [lua], path=path)
    test = load_translations("test", [lua], path=path)
    assert test
    assert len(train) + len(test) == 31

    problem = next(problem for problem in train if "apps" in problem.id)
    assert "reads the same standard input" in prompt(problem)
    product = answer('print(io.read("n") * io.read("n"))', "lua")
    assert verdict(pool, problem, product).reward == 1.0
    assert verdict(pool, problem, answer("print(12)", "lua")).reward == 0.0

    # No dictionary on one line of standard input.
    for problem in load_translations("train", [bash], path=path):
        assert "apps" in problem.id


def test_a_problem_in_words_is_a_program_to_write(tmp_path, pool):
    path = tmp_path / "words.jsonl"
    write(path, [{**WORDS, "id": str(n)} for n in range(30)])
    problem = load_translations("train", [load_language("python")], path=path)[0]
    assert "Translate" not in prompt(problem)
    assert WORDS["source"] in prompt(problem)
    product = answer(
        "import sys\na, b = map(int, sys.stdin.read().split())\nprint(a * b)", "python"
    )
    assert verdict(pool, problem, product).reward == 1.0


# ---- which cases tell ----


def test_cases_come_by_new_outputs_first():
    """Outputs 1 1 1 0 2 1 of inputs 0 .. 5: first 1 0 2 (of 0, 3, 4), then the other ones."""
    cases = [Case(args=(n,), expected=output) for n, output in enumerate([1, 1, 1, 0, 2, 1])]
    order = [case.args[0] for case in translate.by_novelty(cases)]
    assert order == [0, 3, 4, 1, 2, 5]


def test_the_cases_that_count_are_those_with_new_outputs(tmp_path):
    """1 for 0 to 9, then 2 and 3: by the first ten alone a constant would pass."""
    tests = [{"args": [n], "expected": max(1, n - 8)} for n in range(12)]
    path = tmp_path / "late.jsonl"
    write(path, [{**FUNCTION, "id": str(n), "tests": tests} for n in range(30)])
    problem = load_translations("train", [load_language("lua")], path=path)[0]
    cases = translate.tried_cases(problem, load_language("lua"))
    assert [args[0] for args, _ in cases] == [0, 10, 11, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "cases, telling",
    [
        ([((1,), 1), ((2,), 4), ((3,), 9)], True),
        ([((1,), 1), ((2,), 4)], False),  # too few
        ([((1,), 1), ((2,), 4), ((2,), 4)], False),  # different ones
        ([((1,), 7), ((2,), 7), ((3,), 7)], False),  # a constant passes
        ([((1,), 1), ((2,), 2), ((3,), 3)], False),  # the identity passes
        ([((0, 1), 1), ((0, 2), 2), ((0, 3), 3)], False),  # its second argument
        ([((0, 1), 1), ((2, 1), 2), ((0, 3), 3)], True),  # now one, now the other: max
        ([((1,), True), ((0,), False), ((2,), True)], True),  # True is not 1
        ([("3\n", "3"), ("4\n", "4\n"), ("5", "5")], False),
        ([("3 4", "4 3"), ("4\n", "4"), ("5", "5")], True),
        ([("8\n", "08"), ("2\n", "02"), ("99\n", "99")], False),  # the same numbers
        ([("a\nx\n", "x"), ("b\ny\n", "y"), ("c\nz\n", "z")], False),  # its second line
        ([((1,), 0.5), ((2,), 0.5 + 1e-9), ((3,), 0.5)], False),  # 0.5 is near enough
        ([(({"a": n},), {"a": n}) for n in range(3)], False),
        ([(({"a": n},), {"a": n + 1}) for n in range(3)], True),
    ],
)
def test_cases_that_an_empty_program_passes_are_told(cases, telling):
    assert translate.is_telling(cases) == telling


@needs_data
def test_no_problem_is_passed_by_a_program_that_computes_nothing(split, capsys):
    """5.4 % of training problems (142 of 2,622) were passed by a constant, 8.0 % of the held out."""
    for problems in split:
        for problem in problems:
            cases = translate.tried_cases(problem, load_language(problem.target))
            assert translate.is_telling(cases)
            assert len({repr(output) for _, output in cases}) > 1
    load_translations("test", [load_language("lua")])
    assert "problems left out whose tests a constant" in capsys.readouterr().out


def test_a_program_that_returns_the_same_for_all_is_called_constant(pool):
    cases = tuple(Case(args=(n,), expected=n * n) for n in (1, 2, 3))
    problem = Translation("t/a/python", "python", "def g(x): return x * x", "g", cases, "lua")
    same, right, wrong = verdicts(
        pool,
        problem,
        [
            answer("function f(x) return 4 end", "lua"),
            answer("function f(x) return x * x end", "lua"),
            answer("function f(x) return x end", "lua"),
        ],
    )
    assert (same.constant, right.constant, wrong.constant) == (True, False, False)
    assert same.components["tests_passed"] == pytest.approx(1 / 3)


def test_targets_are_drawn_by_the_seed(tmp_path):
    path = tmp_path / "mine.jsonl"
    write(path, [{"id": f"apps-{n}", **PRODUCT} for n in range(200)])
    targets = [load_language(name) for name in ("lua", "racket", "java", "bash")]
    problems = load_translations("train", targets, path=path)
    assert problems == load_translations("train", targets, path=path)
    assert problems != load_translations("train", targets, path=path, seed=1)
    # Some 180 problems, a quarter for each.
    for target in targets:
        assert sum(problem.target == target.name for problem in problems) > 25


@pytest.mark.parametrize(
    "bad,words",
    [
        ({"tests": []}, "at least one"),
        ({"tests": [{"args": [1], "expected": 2}]}, "need entry"),
        ({"source_language": "perl"}, "use python, cpp or text"),
        ({"source_language": "text", "entry": "f", "tests": FUNCTION["tests"]}, "in words needs"),
        ({"tests": [*PRODUCT["tests"], {"args": [1], "expected": 2}]}, "must all be"),
        ({"source": None}, "source"),
    ],
)
def test_a_row_that_cannot_be_used_has_a_sentence(tmp_path, bad, words):
    path = tmp_path / "mine.jsonl"
    write(path, [{"id": "bad", **PRODUCT, **bad}])
    with pytest.raises(ValueError, match=words):
        load_translations("train", [load_language("lua")], path=path)
