"""EvalPlus: own solutions pass, wrong programs and forgers fail; values and tolerances by hand."""

import ast
import json
import time
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest

import known_programs
from sandbox import Pool
from tasks import evalplus
from tasks.evalplus import PlusJudge, in_form, is_right
from tasks.evalplus_run import decode, encode, result
from tasks.multipl_e import program
from tasks.requests import benchmark_prompt

pytestmark = pytest.mark.skipif(
    not (known_programs.DATA / "evalplus").is_dir(), reason="../shared/data is not here"
)


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def by_name(bench):
    """{"mbpp_2_similar_elements": problem}"""
    return {row.id.split("/")[2]: row for row in evalplus.load_problems(bench, "python")}


@pytest.fixture(scope="module")
def humaneval():
    return by_name("humaneval+")


@pytest.fixture(scope="module")
def mbpp():
    return by_name("mbpp+")


def judged(pool, cases, mode="chat"):
    """Verdicts of (problem, whole program) pairs."""
    judge = PlusJudge(pool, "python", mode)
    submissions = []
    for row, code in cases:
        text = code if mode == "completion" else f"```python\n{code}\n```"
        submissions.append(judge.submit(row, text))
    return judge.collect(submissions)


def outcomes(pool, row, *codes):
    """(right on the base inputs, right on all) of programs."""
    verdicts = judged(pool, [(row, code) for code in codes])
    return [(verdict.components["base"] == 1, verdict.correct) for verdict in verdicts]


# ---- own solutions ----


def check_own_solutions(pool, rows):
    verdicts = judged(pool, [(row, row.solution) for row in rows])
    wrong = [(v.problem, v.status, v.value) for v in verdicts if not v.correct]
    print(f"{len(rows) - len(wrong)} of {len(rows)} own solutions pass")
    assert not wrong
    assert all(verdict.components["base"] == 1 for verdict in verdicts)


def test_own_solutions_pass(pool, humaneval, mbpp):
    rows = [*humaneval.values(), *mbpp.values()]
    assert (len(humaneval), len(mbpp)) == (164, 378)
    check_own_solutions(pool, rows[7::70])


@pytest.mark.slow
@pytest.mark.parametrize("bench, count", [("humaneval+", 164), ("mbpp+", 378)])
def test_all_own_solutions_pass(bench, count, pool):
    rows = evalplus.load_problems(bench, "python")
    assert len(rows) == count
    check_own_solutions(pool, rows)


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["humaneval+", "mbpp+"])
def test_spoilt_solutions_fail(bench, pool):
    """Of every third problem, with what it returns put into a list."""
    cases = []
    for row in evalplus.load_problems(bench, "python")[::3]:
        spoilt = f"{row.solution}\n_own = {row.entry}\ndef {row.entry}(*a):\n    return [_own(*a)]"
        cases.append((row, spoilt))
    passed = [verdict.problem for verdict in judged(pool, cases) if verdict.correct]
    # A match or none is asked for there, and a list is something.
    assert all(name.endswith(evalplus.SOMETHING_OR_NONE) for name in passed), passed


# ---- wrong programs ----


def test_right_on_the_base_inputs_alone(pool, humaneval):
    """HumanEval asks for the decimals of three numbers; HumanEval+ of many."""
    row = humaneval["HumanEval_2_truncate_number"]
    assert [decode(call) for call in row.calls[: row.base]] == [[3.5], [1.33], [123.456]]
    right = "def truncate_number(number):\n    return number % 1.0"
    knows_three = "def truncate_number(number):\n    return round(number % 1.0, 3)"
    wrong = "def truncate_number(number):\n    return number"
    found = outcomes(pool, row, right, knows_three, wrong)
    assert found == [(True, True), (True, False), (False, False)]


ADD = "def add(x, y):\n    return x + y\n"
# Right programs in odd clothes.
HONEST = {
    "prints": "def add(x, y):\n    print('rarecode-result [0, 1]')\n    return x + y",
    "prints while it is loaded": f"print('x' * 10**6)\n{ADD}",
    "has a main": f"{ADD}\nif __name__ == '__main__':\n    raise SystemExit(3)",
    "is a class with a call": (
        "class Add:\n    def __call__(self, x, y):\n        return x + y\nadd = Add()"
    ),
    "changes what it is given": "def add(*a):\n    a = list(a)\n    return a.pop() + a.pop()",
    "returns a fraction": (
        "from fractions import Fraction\ndef add(x, y):\n    return Fraction(x) + y"
    ),
}
FORGERS = {
    "equals everything": "class Any:\n    __eq__ = lambda *a: True\nadd = lambda x, y: Any()",
    "a number that equals everything": (
        "class Any(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\n"
        "add = lambda x, y: Any(7)"
    ),
    "leaves": "import os\nadd = lambda x, y: os._exit(0)",
    "leaves while it is loaded": "raise SystemExit(0)",
    "has no function": "def sub(x, y):\n    return x + y",
    "prints results": (
        "import sys\nfor _ in range(2000):\n"
        "    sys.__stdout__.write('rarecode-result [0, 1]\\n')\nadd = lambda x, y: 0"
    ),
    "changes the calls": (
        "import sys\nmain = sys.modules['__main__']\nmain.result = lambda value: True\n"
        "add = lambda x, y: 0"
    ),
    "ends the results": "import sys\nadd = lambda x, y: sys.__stdout__.close() or x + y",
    "no data": "def add(x, y):\n    return (x + y for _ in [0])",
    "huge": "def add(x, y):\n    return [x + y] * 10**6",
    "endless data": "def add(x, y):\n    a = []\n    a.append(a)\n    return a",
    "an integer of a million digits": "def add(x, y):\n    return 10**1000000",
    "a text": "def add(x, y):\n    return str(x + y)",
    "raises": "def add(x, y):\n    raise KeyboardInterrupt",
}


def test_a_models_own_examples_do_not_decide(pool, humaneval):
    """MBPP+ asks with an assertion, and models write more of them, wrong ones too.

    Of the real Qwen2.5-Coder-0.5B's 378 answers 199 ended while they were loaded.
    """
    row = humaneval["HumanEval_53_add"]
    behind = ["assert add(1, 2) == 4", "print(add(1, 2)[0])", "input()", "while True: pass"]
    right = (
        "ONE = 1\nUNUSED = input()\ndef less(x): return x - ONE\n"
        "def add(x, y): return less(x + y + ONE)"
    )
    codes = [f"{right}\n{line}" for line in behind]
    wrong = "def add(x, y): return x - y\nassert add(1, 2) == -1"
    unread = f"{right}\nassert add(1"
    assert outcomes(pool, row, *codes, wrong, unread) == [(True, True)] * 4 + [(False, False)] * 2


def test_right_programs_pass_however_they_look(pool, humaneval):
    found = outcomes(pool, humaneval["HumanEval_53_add"], *HONEST.values())
    assert dict(zip(HONEST, found)) == {name: (True, True) for name in HONEST}


def test_forgers_fail(pool, humaneval):
    found = outcomes(pool, humaneval["HumanEval_53_add"], *FORGERS.values())
    assert dict(zip(FORGERS, found)) == {name: (False, False) for name in FORGERS}


def test_no_expected_result_is_in_the_sandbox(pool, humaneval):
    """What a program could read there: the calls, and the code that makes them."""
    row = humaneval["HumanEval_53_add"]
    job = PlusJudge(pool, "python")._job(row, ADD, [1.0] * len(row.calls), 60.0, 1 << 16, 99)
    assert sorted(job.files) == ["calls.json", "main.py", "solution.py"]
    calls = json.loads(job.files["calls.json"])
    assert calls.pop("calls") == [[call, 1.0] for call in row.calls]
    assert calls == {"entry": "add", "longest": 99}
    assert "return x + y" not in job.files["main.py"]


def test_a_call_that_takes_too_long_is_wrong_whatever_it_catches(pool, humaneval):
    """The limit is 1 s where the own solution needs less; it is CPU time."""
    loops = (
        "def add(x, y):\n    while True:\n        try:\n            1 + 1\n"
        "        except Exception:\n            pass"
    )
    (verdict,) = judged(pool, [(humaneval["HumanEval_53_add"], loops)])
    assert (verdict.correct, verdict.status) == (False, "cpu_limit")


@pytest.mark.slow
def test_a_call_that_sleeps_is_wrong_in_seconds(pool, humaneval):
    sleeps = "import time\nadd = lambda x, y: time.sleep(1000)"
    started = time.monotonic()
    (verdict,) = judged(pool, [(humaneval["HumanEval_53_add"], sleeps)])
    assert (verdict.correct, verdict.status) == (False, "cpu_limit")
    assert time.monotonic() - started < 30  # 5 times the limit of 1 s


def test_a_problem_whose_own_solution_fails_here_is_not_judged(pool, humaneval):
    row = replace(humaneval["HumanEval_53_add"], id="broken", solution="import no_such_module")
    (verdict,) = judged(pool, [(row, ADD)])
    assert verdict.status == "sandbox_error" and not verdict.judged


# ---- values ----

VALUES = [
    *(None, True, 3, -(2**70), 2**5000, 0.1, float("inf"), "a\nb", "\ud800", b"\x00", 1 + 2j),
    *([], [1, [2.5, "x"]], (1,), ({1, 2}, [()]), {1: (2,), "a": None}, frozenset({(1, 2)})),
    *(Fraction(1, 3), Decimal("1.5")),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(type(value).__name__))
def test_values_cross_the_border_as_they_are(value):
    found = decode(json.loads(json.dumps(encode(value))))
    assert found == value
    assert isinstance(value, (Decimal, set)) or type(found) is type(value)


def test_what_is_no_data_equals_nothing():
    for value in (object(), print, (x for x in [1]), range(3)):
        assert decode(encode(value)) != value
        assert decode(encode(value)) != decode(encode(value))


def test_equal_values_have_equal_digests_where_they_are_long():
    count = 30_000
    ones = result([1] * count)
    assert ones[1][0] == "long"
    assert result([1.0] * count) == result([True] * count) == ones
    assert result([1] * (count - 1) + [2]) != ones
    assert result((1,) * count) != ones
    words = [str(n) for n in range(count)]
    assert result(set(words)) == result(set(reversed(words)))
    assert result(dict.fromkeys(words, 0)) == result(dict.fromkeys(reversed(words), 0.0))
    # As long as they are equal: 11,000 characters as integers, 33,000 as floats.
    assert result([1.0] * 5_500)[1][0] == "list"


# ---- what is right ----


def right(value, expected, tolerance=0, entry="f", arguments=()):
    try:
        return is_right(entry, arguments, value, expected, tolerance)
    except Exception:
        return False


def test_equality_is_pythons():
    assert right(1, True) and right(1.0, 1) and right({1}, frozenset({1}))
    assert not right([1], (1,)) and not right("1", 1) and not right(None, 0)


def test_tolerance_by_hand():
    assert right(0.3333, 1 / 3, 1e-4)  # 3.3e-5 away
    assert not right(0.333, 1 / 3, 1e-4)  # 3.3e-4
    assert right([1.0, 2.0000001], [1.0, 2.0], 1e-6)
    assert not right((1.0, 2.0000001), [1.0, 2.0], 1e-6)  # another type
    assert not right([1.0], [1.0, 2.0], 1e-6)
    assert not right(10, 10.0000001, 1e-6)  # no float, and not equal
    assert right(1e9 + 10, 1e9, 1e-6)  # 1e-7 of a thousand million is 100


def test_floats_have_a_tolerance_of_their_own(pool, humaneval):
    """1e-6 where the expected result is a float, though the problem's is 0."""
    row = humaneval["HumanEval_4_mean_absolute_deviation"]
    near = row.solution.replace("return ", "return 1e-7 + ", 1)
    far = row.solution.replace("return ", "return 1e-4 + ", 1)
    tight = replace(row, id="tight", tolerance=0)
    assert row.tolerance > 0 and near != row.solution
    assert outcomes(pool, tight, near, far) == [(True, True), (False, False)]


def test_problems_that_ask_for_less_than_equality():
    # x**2 - 1 has two zeros.
    assert right(-1.0, 1.0, 1e-4, "find_zero", ([-1, 0, 1],))
    assert not right(0.9, 1.0, 1e-4, "find_zero", ([-1, 0, 1],))
    assert right([4, 3], (3, 4), 0, "similar_elements")
    assert not right([4], (3, 4), 0, "similar_elements")
    assert right("a match", True, 0, "check_str") and right(None, False, 0, "check_str")
    assert not right(False, True, 0, "check_str")
    # 123 and 256: 1 + 3 + 3.
    assert right(7, 133, 0, "digit_distance_nums", (123, 256))
    # Base 3, height 4: 9 + 2 * 3 * sqrt(1.5**2 + 16) = 34.6.
    assert right(35, 33, 1e-4, "surface_Area", (3, 4))
    assert not right(34, 33, 0, "surface_Area", (3, 4))


# ---- rows and prompts ----

# Where EvalPlus's base inputs are not the arguments of MBPP's assertions, and why.
DIFFERENT = {
    **dict.fromkeys((98, 104, 140, 145), "lists for tuples"),
    596: "lists for the inner tuples",
    **dict.fromkeys((737, 781, 787), "another order"),
    87: "fewer keys",
    301: "JSON's keys are texts",
}


def test_inputs_have_the_types_of_mbpps_own_assertions():
    """The base inputs, in order, are the arguments of MBPP's assertions."""
    same, other = 0, set()
    for row in known_programs.rows("evalplus/MbppPlus.jsonl.gz"):
        number = int(row["task_id"].split("/")[1])
        given = asserted_arguments(row)
        found = [in_form(number, arguments) for arguments in row["base_input"]]
        if found == given:
            same += 1
        elif given is not None:
            other.add(number)
    assert other == set(DIFFERENT)
    assert same == 367  # of 378: 803 calls with 2**10


def asserted_arguments(row):
    """Arguments of every call in a row's assertions; None where one is more than a literal."""
    given = []
    for node in ast.walk(ast.parse(row["assertion"])):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == row["entry_point"]:
            try:
                given.append([ast.literal_eval(argument) for argument in node.args])
            except ValueError:
                return None
    return given


def test_forms_by_hand():
    assert in_form(75, [[[1, 2], [3]], 4]) == [[(1, 2), (3,)], 4]
    assert in_form(580, [[1, [2, [3]]]]) == [(1, (2, (3,)))]
    assert in_form(722, [{"a": [1]}, [2], 3]) == [{"a": (1,)}, [2], 3]
    assert in_form(124, ["0", "1j"]) == [0.0, 1j]
    assert in_form(3, [[1]]) == [[1]]


def test_prompts_and_programs_of_the_modes(humaneval, mbpp):
    row = humaneval["HumanEval_53_add"]
    assert benchmark_prompt(row, "python", "completion") == row.prompt.rstrip()
    text = "\n    return x + y\n\ndef main():\n    exit()"
    whole = program(row, text, "python", "completion")
    assert whole.rstrip() == f"{row.prompt.rstrip()}\n    return x + y"

    asked, begun = benchmark_prompt(mbpp["mbpp_2_similar_elements"], "python", "chat")
    assert "similar_elements" in asked["content"]
    assert begun["role"] == "assistant" and begun["content"].endswith("\n```python\n")
    goes_on = "def add(x, y):\n    return x + y"
    for answer in (goes_on, f"{goes_on}\n```\nIt adds.", f"```python\n{goes_on}\n```"):
        assert program(row, answer, "python", "chat").strip() == goes_on
    assert benchmark_prompt(row, "python", "think").endswith("Assistant: <think>")


def test_only_python_and_only_where_the_data_is(tmp_path):
    with pytest.raises(ValueError, match=r"humaneval\+ has Python programs only"):
        evalplus.load_problems("humaneval+", "racket")
    with pytest.raises(ValueError, match="MbppPlus.jsonl"):
        evalplus.load_problems("mbpp+", "python", data=tmp_path)
