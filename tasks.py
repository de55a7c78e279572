"""Problems, prompts, and right answers as programs.

A Problem is what the model is asked; messages() is how it is asked; solution() is a completion that would be right, in any
language whose TOML has a [render] table (for the warm start).
"""

import ast
import gzip
import hashlib
import json
import os
import random
import urllib.request
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import sums
from sandbox.languages import load_language

REPO = Path(__file__).resolve().parent
GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    "/grade_school_math/data/{split}.jsonl"
)
GSM8K_SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


@dataclass(frozen=True)
class Step:
    var: str  # v1, v2, ...
    expr: str  # + - * / ( ), decimals and earlier variables, such as "48+v1"
    value: Fraction  # exact


@dataclass(frozen=True)
class Problem:
    id: str  # stable, such as "gsm8k/train/17"
    task: str
    question: str
    answer: Fraction | None = None
    steps: list[Step] = field(
        default_factory=list
    )  # straight-line solution; empty when none is known
    reasoning: str = ""  # in words; solution() falls back on the steps


# ---- loading ----


def load_problems(task, split, data=None, count=None, seed=0):
    """list[Problem] of a task: "sums" (built in), "gsm8k" or "gsm8k_steps" (train only); split "train" or "test".

    data: folder that holds gsm8k/ and gsm8k_steps/ (else RARECODE_DATA, ../shared/data, or a download kept in .data/).
    count: how many (sums: 8192 by default; gsm8k: all by default, else a sample drawn by `seed`, in file order).
    Raises ValueError with one sentence for an unknown task or split, missing, empty or malformed data.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    if task == "sums":
        return [
            _sums_problem(split, seed, index) for index in range(8192 if count is None else count)
        ]
    if task not in ("gsm8k", "gsm8k_steps"):
        raise ValueError(f"unknown task {task!r}: use sums, gsm8k or gsm8k_steps")
    if task == "gsm8k_steps" and split != "train":
        raise ValueError(
            "gsm8k_steps has a train split only: its steps come from the training answers"
        )
    path = find_data(f"{task}/{split}.jsonl", data) or _download_gsm8k(task, split)
    read = _gsm8k_problem if task == "gsm8k" else _steps_problem
    problems = read_jsonl(path, lambda index, row: read(split, index, row))
    if count is None or count >= len(problems):
        return problems
    return [
        problems[index] for index in sorted(random.Random(seed).sample(range(len(problems)), count))
    ]


def in_passes(items, numbers, key):
    """The items that stand at these numbers 0, 1, 2, ... of endless passes over the data, each in a new order that depends on key and pass alone."""
    orders, picked = {}, []
    for number in numbers:
        turn = number // len(items)
        if turn not in orders:
            orders[turn] = list(range(len(items)))
            random.Random(f"{key}/{turn}").shuffle(orders[turn])
        picked.append(items[orders[turn][number % len(items)]])
    return picked


def find_data(name, data=None):
    """Path of a data file, plain or .gz: in `data` when that is given, else the first of RARECODE_DATA, ../shared/data, .data; or None."""
    named = [folder for folder in (data, os.environ.get("RARECODE_DATA")) if folder]
    for folder in named:
        if not Path(folder).is_dir():
            raise ValueError(f"data folder {folder} does not exist: check --data and RARECODE_DATA")
    for root in [data] if data else [*named, REPO.parent / "shared" / "data", REPO / ".data"]:
        for path in (Path(root) / name, Path(root) / (name + ".gz")):
            if path.is_file():
                return path
    if data:
        raise ValueError(
            f"{name} (or {name}.gz) is not in {data}: put it there, or leave out --data"
        )
    return None


def read_jsonl(path, read):
    """[read(line number from 0, object)] of a JSON-lines file, gzipped or not. ValueError names an empty file or the bad line."""
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(
            path, "rt", encoding="utf-8"
        ) as lines:
            for index, line in enumerate(lines):
                if line.strip():
                    rows.append(_read_row(path, index, line, read))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from None
    if not rows:
        raise ValueError(f"{path} is empty: fetch it again")
    return rows


def _read_row(path, index, line, read):
    try:
        return read(index, json.loads(line))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        SyntaxError,
        ZeroDivisionError,
    ) as error:
        raise ValueError(
            f"{path}, line {index + 1} is malformed ({type(error).__name__}: {error}): fix or remove it"
        ) from None


def _download_gsm8k(task, split):
    if task != "gsm8k":
        raise ValueError(
            f"{task} needs {task}/{split}.jsonl: put it under --data, RARECODE_DATA or ../shared/data"
        )
    url, path = GSM8K_URL.format(split=split), REPO / ".data" / "gsm8k" / f"{split}.jsonl"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise ValueError(
            f"gsm8k/{split}.jsonl is not here and {url} cannot be reached ({error}): put the file under --data"
        ) from None
    if hashlib.sha256(content).hexdigest() != GSM8K_SHA256[split]:
        raise ValueError(
            f"{url} does not have the expected sha256 {GSM8K_SHA256[split]}: nothing was kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # several ranks may fetch at once
    partial.write_bytes(content)
    partial.replace(path)
    return path


def _sums_problem(split, seed, index):
    _, _, question, steps = sums.make(split, seed, index)
    steps = exact_steps(steps)
    return Problem(f"sums/{split}/{seed}/{index}", "sums", question, steps[-1].value, steps)


def _gsm8k_problem(split, index, row):
    gold = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
    return Problem(f"gsm8k/{split}/{index}", "gsm8k", row["question"], Fraction(gold))


def _steps_problem(split, index, row):
    steps = exact_steps([(step["var"], step["expr"]) for step in row["steps"]])
    answer = Fraction(str(row["answer"]))
    if steps[-1].value != answer:
        raise ValueError(f"steps give {steps[-1].value}, answer is {answer}")
    return Problem(
        f"gsm8k_steps/{split}/{row['id'].rsplit('-', 1)[1]}",
        "gsm8k_steps",
        row["question"],
        answer,
        steps,
    )


# ---- straight-line programs ----


def exact_steps(pairs):
    """[(var, expr)] -> list[Step] with exact values: [("v1", "12/60"), ("v2", "v1*50")] has the values 1/5 and 10."""
    steps, values = [], {}
    for var, expr in pairs:
        values[var] = _value(ast.parse(expr, mode="eval").body, values)
        steps.append(Step(var, expr, values[var]))
    return steps


def _value(node, values):
    if isinstance(node, ast.Constant):
        return Fraction(repr(node.value))
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, values)
    left, right = _value(node.left, values), _value(node.right, values)
    operation = {
        ast.Add: left.__add__,
        ast.Sub: left.__sub__,
        ast.Mult: left.__mul__,
        ast.Div: left.__truediv__,
    }
    return operation[type(node.op)](right)


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def render_expression(expr, form):
    """A step's expression in a language: "(1+v1)*2" -> "(1 + V1) * 2" or "(* (+ 1 v1) 2)". form: the [render] table."""
    return _render(ast.parse(expr, mode="eval").body, form)[0]


def _render(node, form):
    """Text and precedence (9: never needs parentheses)."""
    if isinstance(node, ast.Constant):
        number = form["integer"] if isinstance(node.value, int) else form["decimal"]
        return number.format(node.value), 9
    if isinstance(node, ast.Name):
        return form["variable"].format(node.id[1:]), 9
    if isinstance(node, ast.UnaryOp):  # -x becomes 0 - x: every language can say it
        node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
    symbol = SYMBOL[type(node.op)]
    operator = form.get("operators", {}).get(symbol, symbol)
    (left, left_rank), (right, right_rank) = _render(node.left, form), _render(node.right, form)
    if form["notation"] == "prefix":
        return f"({operator} {left} {right})", 9
    rank = PRECEDENCE[symbol]
    left = f"({left})" if left_rank < rank else left
    right = f"({right})" if right_rank <= rank else right  # a-(b-c), a*(b/c)
    return f"{left} {operator} {right}", rank


def _step_lines(step, form):
    """A step as one line, or in three-address code ("ssa", LLVM IR) as one line per operation."""
    target = form.get("target", form["variable"]).format(step.var[1:])
    if form["notation"] != "ssa":
        return [form["step"].format(target=target, expression=render_expression(step.expr, form))]
    lines = []

    def visit(node, target):
        if isinstance(node, (ast.Constant, ast.Name)):
            return _render(node, form)[0]
        if isinstance(node, ast.UnaryOp):
            node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
        left, right = visit(node.left, target + "a"), visit(node.right, target + "b")
        lines.append(
            form["step"].format(
                target=target,
                operator=form["operators"][SYMBOL[type(node.op)]],
                left=left,
                right=right,
            )
        )
        return target

    body = ast.parse(step.expr, mode="eval").body
    visit(
        body
        if isinstance(body, (ast.BinOp, ast.UnaryOp))
        else ast.BinOp(body, ast.Add(), ast.Constant(0)),
        target,
    )
    return lines


def solution(problem, language):
    """The full right completion of a problem with steps: reasoning, code and query, as the language's [render] table says."""
    language = language_of(language)
    form = language.render
    if not form:
        raise ValueError(
            f"{language.name} cannot be trained on sums or gsm8k: its TOML has no [render] table"
        )
    if not problem.steps:
        raise ValueError(
            f"{problem.id} has no steps to render: use sums or gsm8k_steps for supervised training"
        )
    reasoning = problem.reasoning or ", ".join(
        f"{step.var} = {step.expr}" for step in problem.steps
    )
    names = [form["variable"].format(step.var[1:]) for step in problem.steps]
    lines = [line for step in problem.steps for line in _step_lines(step, form)]
    code = form["program"].format(
        steps=form["separator"].join(lines), result=names[-1], variables=", ".join(names)
    )
    return completion(reasoning, code, form["query"], language)


def completion(reasoning, code, query, language):
    """The three parts in their tags, as rewards.parse reads them back."""
    tag = language_of(language).answer["tag"]
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<code>\n{code}\n</code>\n<{tag}>\n{query}\n</{tag}>"


def language_of(language):
    """A Language, from itself or its name."""
    return load_language(language) if isinstance(language, str) else language


# ---- prompts ----

SYSTEM = """Write a {title} program that solves the problem.
Follow these steps:
1. Reason about the problem.
2. Write a correct {title} program. The program does the arithmetic, not you.
3. Write {ask}.
Answer in exactly this form and write nothing else:
<reasoning>
...
</reasoning>
<code>
...
</code>
<{tag}>
...
</{tag}>
The {word} stands only inside <{tag}></{tag}>, not in <code></code>."""

# Worked examples of our own (no row of a data set is shown in a prompt): question, reasoning, steps.
EXAMPLES = [
    (
        "A baker makes 12 trays of 20 rolls. She sells 185 rolls and shares the rest equally among 5 helpers. "
        "How many rolls does each helper get?",
        "The baker makes 12 times 20 rolls. Taking away the 185 rolls sold gives the rest. One helper gets a fifth of it.",
        "12*20",
        "v1-185",
        "v2/5",
    ),
    (
        "Ivo rents a boat for 2.5 hours at $18 an hour and pays $7.50 for a life vest. How much does he pay?",
        "The boat costs 2.5 times 18 dollars. The life vest adds 7.5 dollars.",
        "2.5*18",
        "v1+7.5",
    ),
    (
        "A tank holds 240 liters. In the morning a quarter of it is used, in the evening 30% of what is left. "
        "How many liters remain?",
        "A quarter of 240 liters is used first. Of what is left, 30 hundredths are used, and the difference remains.",
        "240/4",
        "240-v1",
        "v2*30/100",
        "v2-v3",
    ),
    (
        "Dora is 4 years older than Emil. Emil is three times as old as Finn, who is 6. How old will Dora be in 10 years?",
        "Emil is 3 times 6 years old. Dora is 4 years older, and in 10 years she will be 10 years older than that.",
        "3*6",
        "v1+4",
        "v2+10",
    ),
    (
        "A school orders 36 desks for $55 each and 36 chairs for half the price of a desk. It gets $270 off. "
        "What is the bill?",
        "The desks cost 36 times 55 dollars. A chair costs half of 55 dollars and there are 36. Both costs, less 270, make the bill.",
        "36*55",
        "36*(55/2)",
        "v1+v2-270",
    ),
]


def messages(problem, language, examples=1, system=True):
    """Chat messages [{"role", "content"}] that ask for a program in `language`.

    examples: 0, 1 or 5 worked examples. system: with the full instructions and the examples in the system message, for
    instruct models; without (tiny models), the question alone, and each example as an earlier turn.
    """
    language = language_of(language)
    if examples not in (0, 1, 5):
        raise ValueError(f"examples is {examples}: use 0, 1 or 5")
    worked = [worked_example(number) for number in range(examples)]
    turn = {"role": "user", "content": problem.question}
    if not system:
        turns = [
            [("user", example.question), ("assistant", solution(example, language))]
            for example in worked
        ]
        return [{"role": role, "content": text} for pair in turns for role, text in pair] + [turn]
    words = language.answer
    content = SYSTEM.format(
        title=language.title, ask=words["ask"], tag=words["tag"], word=words["word"]
    )
    for number, example in enumerate(worked, 1):
        content += f"\n\n## Example {number}\n\nQuestion:\n{example.question}\n\n{solution(example, language)}"
    return [{"role": "system", "content": content}, turn]


def worked_example(number):
    question, reasoning, *expressions = EXAMPLES[number]
    steps = exact_steps([(f"v{n}", expr) for n, expr in enumerate(expressions, 1)])
    return Problem(f"example/{number}", "example", question, steps[-1].value, steps, reasoning)
