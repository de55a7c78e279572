"""Translation: real data, hidden tests, real interpreters; what is no translation earns nothing."""

import json
import math
import random
import re

import pytest

from sandbox import Pool
from sandbox.languages import language_names, load_language
from sandbox.languages.values import Map, Symbol
from tasks import translate, translate_data
from tasks.data import find_data
from tasks.translate import TranslateJudge, form, load_translations, translation_messages
from tasks.translate_data import Case, Translation

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


def verdict(pool, problem, text):
    judge = TranslateJudge(pool)
    return judge.collect([judge.submit(problem, text)], 60)[0]


def answer(code, language):
    return f"Here it is.\n```{load_language(language).fence[0]}\n{code.strip()}\n```"


# total of a list, and whether it is above a limit, as one list: numbers, strings, lists and truth values in and out
MIXED = Translation(
    "t/mixed",
    "python",
    "",
    "describe",
    (
        Case(([1, 2, 3], 'say "hi"\\n', 2.5), ['say "hi"\\n', 6, True, 2.5]),
        Case(([], "", -0.5), ["", 0, True, -0.5]),
        Case(([-5], "é", 1.0), ["é", -5, False, 1.0]),
    ),
)
DESCRIBE = {
    "python": "def f(values, text, limit):\n    return (text, sum(values), sum(values) > limit, limit)",
    "lua": "function f(values, text, limit)\n  local sum = 0\n  for _, v in ipairs(values) do sum = sum + v end\n  return {text, sum, sum > limit, limit}\nend",
    "racket": "(define (f values text limit)\n  (define sum (apply + values))\n  (list text sum (> sum limit) limit))",
    "lisp": "(defun f (values text limit)\n  (let ((sum (reduce #'+ values)))\n    (list text sum (> sum limit) limit)))",
    "julia": "f(values, text, limit) = Any[text, isempty(values) ? 0 : sum(values), (isempty(values) ? 0 : sum(values)) > limit, limit]",
    "prolog": "f(Values, Text, Limit, [Text, Sum, Above, Limit]) :- sum_list(Values, Sum), ( Sum > Limit -> Above = true ; Above = false ).",
}


@pytest.mark.parametrize("language", DESCRIBE)
def test_a_function_is_called_with_literals_of_its_language(pool, language):
    needs(language)
    problem = Translation(**{**vars(MIXED), "target": language, "source_language": "cpp"})
    assert form(problem, load_language(language)) == "call"
    right = verdict(pool, problem, answer(DESCRIBE[language], language))
    assert (right.reward, right.status, right.components["tests_passed"]) == (1.0, "ok", 1.0), (
        right.value
    )
    wrong = DESCRIBE[language].replace(">", "<")
    assert verdict(pool, problem, answer(wrong, language)).reward == 0.0


PRIMES = Translation(
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
    "bash": 'read -a v; read w; s=${#w}; for x in "${v[@]}"; do s=$((s+x)); done; echo $s',
    "perl": 'my @v = split " ", <STDIN>; chomp(my $w = <STDIN>); my $s = length $w; $s += $_ for @v; print "$s\\n";',
    "javascript": 'const [a, w] = require("fs").readFileSync(0, "utf8").split("\\n"); console.log(a.split(" ").map(Number).reduce((x, y) => x + y, 0) + w.length);',
    "ruby": "v = gets.split.map(&:to_i)\nputs v.sum + gets.chomp.length",
    "php": '<?php\n$v = array_map("intval", explode(" ", trim(fgets(STDIN))));\necho array_sum($v) + strlen(trim(fgets(STDIN))), "\\n";',
    "c": '#include <stdio.h>\n#include <string.h>\nint main() { char line[999], w[99]; int s = 0, x, n; fgets(line, 999, stdin); scanf("%s", w); for (char *p = line; sscanf(p, "%d%n", &x, &n) == 1; p += n) s += x; printf("%d\\n", s + (int)strlen(w)); }',
    "cpp": "#include <iostream>\n#include <sstream>\nint main() { std::string line, w; std::getline(std::cin, line); std::cin >> w; std::istringstream in(line); int s = w.size(), x; while (in >> x) s += x; std::cout << s << std::endl; }",
    "java": "import java.util.*;\npublic class Main { public static void main(String[] a) { Scanner in = new Scanner(System.in); int s = 0; for (String x : in.nextLine().split(\" \")) s += Integer.parseInt(x); System.out.println(s + in.nextLine().length()); } }",
    "scheme": '(use-modules (ice-9 rdelim))\n(define (numbers line) (map string->number (string-tokenize line)))\n(let* ((v (numbers (read-line))) (w (read-line))) (display (+ (apply + v) (string-length w))) (newline))',
    "ocaml": 'let () = let v = List.map int_of_string (String.split_on_char \' \' (read_line ())) in let w = read_line () in print_int (List.fold_left (+) (String.length w) v)',
    "r": 'x <- readLines("stdin"); cat(sum(as.numeric(strsplit(x[1], " ")[[1]])) + nchar(x[2]), "\\n")',
}  # fmt: skip


@pytest.mark.parametrize("language", TOTAL)
def test_any_other_language_reads_standard_input(pool, language):
    needs(language)
    problem = Translation(
        **{
            **vars(PRIMES),
            "target": language,
            "source_language": "cpp" if language == "python" else "python",
        }
    )
    assert (
        form(problem, load_language(language)) == "stdin"
        and "one per line" in translation_messages(problem)[0]["content"]
    )
    assert verdict(pool, problem, answer(TOTAL[language], language)).reward == 1.0


@pytest.mark.parametrize("language", sorted(language_names()))
def test_every_language_of_the_sandbox_is_a_target(pool, language):
    """The language's own fixtures: `pass` doubles the number on standard input, `wrong` prints 41, `error` fails."""
    needs(language)
    fixtures = load_language(language).fixtures
    source = "cpp" if language == "python" else "python"
    problem = Translation(
        "t/twice",
        source,
        "print(2 * int(input()))",
        "",
        (Case(stdin=fixtures["stdin"], stdout="42"),),
        language,
    )
    judge = TranslateJudge(pool)
    verdicts = judge.collect(
        [
            judge.submit(problem, answer(fixtures[kind], language))
            for kind in ("pass", "wrong", "error")
        ],
        60,
    )
    assert [v.reward for v in verdicts] == [1.0, 0.0, 0.0] and verdicts[2].status in (
        "error",
        "compile_error",
    )
    function = Translation(
        "t/f", source, "def g(x): return 2 * x", "g", (Case((21,), 42),), language
    )
    assert (
        form(function, load_language(language)) in ("call", "stdin")
        and translation_messages(function)[0]["content"].count("```") >= 3
    )


def test_what_is_no_translation_earns_nothing(pool):
    problem = Translation(**{**vars(PRIMES), "target": "lua"})
    code = "function f(values, word)\n  local s = #word\n  for _, v in ipairs(values) do s = s + v end\n  return s\nend"
    assert verdict(pool, problem, answer(code, "lua")).reward == 1.0
    for text, correct, status in [
        (code, False, "no_program"),  # no block
        (
            answer(code, "lua") + "\nDone.",
            True,
            "ok",
        ),  # right, but text after the block: the form is part of the reward
        (answer(code, "lua").replace("```lua", "```python"), True, "ok"),
        (answer(code, "lua") + "\n" + answer(code, "lua"), True, "ok"),
        (
            answer("return 1 +", "lua"),
            False,
            "ok",
        ),  # does not compile: self-play's harness reports it
        (answer(code.replace("return s", "return s + 1"), "lua"), False, "ok"),
        (answer("function f() while true do end end", "lua"), False, "cpu_limit"),
        (answer('function f() print("9\\n7\\n104"); os.exit(0) end', "lua"), False, None),
        (answer('function f() return "9" end', "lua"), False, "ok"),  # a string is no number
    ]:
        found = verdict(pool, problem, text)
        assert found.reward == 0.0, text
        assert found.correct == correct, text
        assert status is None or found.status == status, (text, found.status)
    assert (
        verdict(
            pool,
            Translation(**{**vars(PRIMES), "target": "c"}),
            answer("int main() { return x; }", "c"),
        ).status
        == "compile_error"
    )


def test_a_sandbox_that_could_not_judge_is_masked(pool):
    judge = TranslateJudge(pool)
    slow = judge.submit(
        Translation(**{**vars(PRIMES), "target": "lua"}),
        answer("function f() while true do end end", "lua"),
    )
    (late,) = judge.collect([slow], deadline=0.0)
    assert math.isnan(late.reward) and late.status == "sandbox_error" and not late.correct
    judge.collect([slow])


def test_random_reward_is_a_coin_that_the_seed_fixes(pool):
    coins = [TranslateJudge(pool, random_reward=True, seed=seed) for seed in (0, 0, 1)]
    drawn = [
        [v.reward for v in j.collect([j.submit(PRIMES_LUA, "nothing", n) for n in range(40)])]
        for j in coins
    ]
    assert drawn[0] == drawn[1] != drawn[2] and 8 < sum(drawn[0]) < 32


PRIMES_LUA = Translation(**{**vars(PRIMES), "target": "lua"})


def test_no_expected_value_enters_prompt_or_sandbox():
    secret = 987654321
    for target in ("lua", "prolog", "perl"):
        problem = Translation(
            "t/s",
            "python",
            "def g(x):\n    return x + 1",
            "g",
            (Case((secret - 1,), secret), Case((1,), "hidden text")),
            target,
        )
        jobs = translate.case_jobs(problem, load_language(target), "code", "nonce")
        texts = [
            translation_messages(problem)[0]["content"],
            *(str(j.files) + str(j.stdin) for j in jobs),
        ]
        assert (
            not any(str(secret) in t or "hidden text" in t for t in texts)
            and str(secret - 1) not in texts[0]
        )


@pytest.mark.parametrize(
    "value,expected,same",
    [
        (3, 3, True),
        (3.0, 3, True),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        (1, True, False),
        (True, 1, False),
        ([1, [2]], [1, [2]], True),
        ((1, 2), [1, 2], True),
        ([1, 2], [2, 1], False),
        ([], [], True),
        ([], False, True),
        ([], None, True),
        (None, [], True),
        (False, [], False),
        ([], 0, False),
        ([], "", False),
        (None, "", False),
        (False, 0, False),
        ("a", "a", True),
        (Symbol("a"), "a", False),
        (Map((("a", 1),)), {"a": 1}, True),
        (Map((("a", 2),)), {"a": 1}, False),
        (Map(()), [], True),
        (Map(()), {}, True),
        (False, None, False),
        (False, False, True),
        (True, False, False),
        ("1", 1, False),
    ],
)
def test_same_value(value, expected, same):
    assert translate.same_value(value, expected) is same


@pytest.mark.parametrize(
    "printed,wanted,same",
    [
        ("3\n", "3", True),
        ("3 \n\n", "3", True),
        ("3.0", "3", True),
        ("0.30000000000000004", "0.3", True),
        ("0.31", "0.3", False),
        ("True", "true", True),
        ("1 2\n3", "1 2\n3", True),
        ("1  2", "1 2", True),
        ("1 2 3", "1 2\n3", False),
        ("10000000000000001", "10000000000000002", False),
        ("a b", "ab", False),
        ("", "0", False),
        ("nan", "nan", True),
        ("Yes", "yes", False),
    ],
)
def test_same_output(printed, wanted, same):
    assert translate.same_output(printed, wanted) is same


# ---- data ----


def source_is_right(pool, problems):
    """Ids of Python problems whose own source fails its cases (the source as its translation to Python)."""
    judge = TranslateJudge(pool)
    text = lambda p: f"```python\n{p.question}\nf = {p.entry}\n```"
    python = [Translation(**{**vars(p), "target": "python"}) for p in problems]
    return [
        v.problem
        for v in judge.collect([judge.submit(p, text(p)) for p in python], 300)
        if v.reward != 1.0
    ]


@needs_data
def test_every_exercism_case_is_passed_by_the_python_example(pool):
    problems = translate_data._exercism(None)
    assert len(problems) == 72 and source_is_right(pool, problems) == []


@needs_data
def test_sources_pass_their_own_cases(pool):
    """A sample; BENCHMARKS.md has the count over all of them."""
    problems = [
        p
        for p in translate_data.built_in()
        if p.source_language == "python" and form(p, load_language("python")) == "call"
    ]
    assert (
        len(problems) > 1500
        and len(source_is_right(pool, random.Random(1).sample(problems, 60))) <= 1
    )


@needs_data
def test_no_benchmark_row_is_reachable_from_translation():
    """By MBPP id, by name, and by 13 words in a row of a prompt or canonical solution; held-out functions are in no training prompt."""
    targets = [load_language(name) for name in ("lua", "racket", "java")]
    train, test = (
        load_translations("train", targets),
        load_translations("test", targets, count=10**6),
    )
    assert len(train) > 1500 and len(test) > 100
    title = lambda p: p.id.split("/")[2]
    assert not {title(p) for p in train} & {title(p) for p in test}
    for p in train + test:
        number = re.fullmatch(r"translate/mbxp/(\d+)/\w+", p.id)
        assert not number or int(number[1]) not in BENCHMARK_IDS, p.id
    rows = [
        json.loads(line)
        for f in ("humaneval", "mbpp")
        for line in read(f"multipl_e/v3/{f}-py-reworded.jsonl")
    ]
    names = {r["name"].split("_", 2)[2].lower() for r in rows} - {"f"}
    assert not {p.entry.lower() for p in train + test} & names
    solved = [json.loads(line) for line in read("humaneval/HumanEval.jsonl")]
    known = set().union(
        *(
            translate_data.grams(t, 13)
            for t in [r["prompt"] for r in rows]
            + [r["prompt"] + r["canonical_solution"] for r in solved]
        )
    )
    assert len(known) > 5000 and not [
        p.id for p in train + test if translate_data.grams(p.question, 13) & known
    ]


def read(name):
    import gzip

    path = find_data(name)
    return (
        (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8")
        .read()
        .splitlines()
    )


BENCHMARK_IDS = (
    {
        int(json.loads(line)["name"].split("_")[1])
        for line in read("multipl_e/v3/mbpp-py-reworded.jsonl")
    }
    if find_data("multipl_e/v3/mbpp-py-reworded.jsonl")
    else set()
)


@needs_data
def test_prompts_hide_the_tests_and_targets_are_drawn():
    targets = [load_language(name) for name in ("lua", "racket", "java", "bash")]
    problems = load_translations("train", targets)
    counts = {t.name: sum(p.target == t.name for p in problems) for t in targets}
    assert min(counts.values()) > 300 and problems == load_translations(
        "train", targets
    ) != load_translations("train", targets, seed=1)
    for p in problems:
        text = translation_messages(p)[0]["content"]
        assert not re.search(r"^\s*>>> ", text, re.MULTILINE) and "assert candidate" not in text, (
            p.id
        )
        shown = [c for c in p.cases if f"{p.entry}({', '.join(map(repr, c.args))})" in text]
        assert not shown, p.id


def test_a_source_that_holds_its_tests_is_left_out():
    cases = (Case((14,), True), Case((12,), False))
    source = "bool isNumKeith(int x) { if (x == 14) return true; else if (x == 12) return false; }"
    assert translate_data.shows_cases(Translation("a/b/cpp", "cpp", source, "isNumKeith", cases))
    assert translate_data.shows_cases(
        Translation("a/b/cpp", "cpp", "// g(12) is false\nbool g(int x);", "g", cases)
    )
    assert not translate_data.shows_cases(
        Translation("a/b/cpp", "cpp", "bool g(int x) { return x == 14; }", "g", cases)
    )


def test_docstrings_go_and_code_stays():
    source = 'def f(x):\n    """Twice.\n    >>> f(1)\n    2\n    """\n    def g():\n        "only this"\n    return 2 * x  # stays'
    assert (
        translate_data.without_docstrings(source)
        == "def f(x):\n    def g():\n        pass\n    return 2 * x  # stays"
    )


def test_the_users_own_problems(tmp_path, pool):
    """The form of README: cases as args and expected, or stdin and stdout of a whole program."""
    rows = [
        {
            "id": f"apps-{n}",
            "source_language": "cpp",
            "source": "int main() { int a, b; std::cin >> a >> b; std::cout << a * b; }",
            "tests": [{"stdin": "3 4\n", "stdout": "12\n"}, {"stdin": "5\n6", "stdout": "30"}],
        }
        for n in range(30)
    ]
    rows += [
        {
            "id": "call",
            "source_language": "python",
            "source": "def g(d): return d['a']",
            "entry": "g",
            "tests": [{"args": [{"a": 1}], "expected": 1}],
        }
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lua, bash = load_language("lua"), load_language("bash")
    train, test = (
        load_translations("train", [lua], path=path),
        load_translations("test", [lua], path=path, count=100),
    )
    assert len(train) + len(test) == 31 and test
    problem = next(p for p in train if "apps" in p.id)
    assert "reads the same standard input" in translation_messages(problem)[0]["content"]
    assert verdict(pool, problem, answer('print(io.read("n") * io.read("n"))', "lua")).reward == 1.0
    assert verdict(pool, problem, answer("print(12)", "lua")).reward == 0.0
    assert all(
        "apps" in p.id for p in load_translations("train", [bash], path=path)
    )  # no dictionary on one line of standard input
    for bad, words in [
        ({"tests": []}, "at least one"),
        ({"tests": [{"args": [1], "expected": 2}]}, "need entry"),
        ({"source_language": "perl"}, "use python or cpp"),
        ({"tests": [{"stdin": "", "stdout": ""}, {"args": [1], "expected": 2}]}, "must all be"),
        ({"source": None}, "source"),
    ]:
        path.write_text(json.dumps(rows[0] | bad))
        with pytest.raises(ValueError, match=words):
            load_translations("train", [lua], path=path)
