"""Problems with a numeric answer (sums, GSM8K), and the prompts that ask for a program.

load_problems() reads a task's problems, program_messages() is how one is asked. A completion that
would be right, in any language, is render.solution().
"""

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction

from sandbox.languages import language_of
from tasks import sums
from tasks.answers import written_number
from tasks.data import download_gsm8k, find_data, read_jsonl, take
from tasks.render import Step, exact_steps, solution

SUMS = 8192  # problems of "sums" when nobody says how many

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

# Worked examples of our own (no row of a data set is shown in a prompt): question, reasoning and
# the expressions of the steps v1, v2, ...
EXAMPLES = [
    (
        "A baker makes 12 trays of 20 rolls. She sells 185 rolls and shares the rest equally among "
        "5 helpers. How many rolls does each helper get?",
        "The baker makes 12 times 20 rolls. Taking away the 185 rolls sold gives the rest. One "
        "helper gets a fifth of it.",
        ["12*20", "v1-185", "v2/5"],
    ),
    (
        "Ivo rents a boat for 2.5 hours at $18 an hour and pays $7.50 for a life vest. How much "
        "does he pay?",
        "The boat costs 2.5 times 18 dollars. The life vest adds 7.5 dollars.",
        ["2.5*18", "v1+7.5"],
    ),
    (
        "A tank holds 240 liters. In the morning a quarter of it is used, in the evening 30% of "
        "what is left. How many liters remain?",
        "A quarter of 240 liters is used first. Of what is left, 30 hundredths are used, and the "
        "difference remains.",
        ["240/4", "240-v1", "v2*30/100", "v2-v3"],
    ),
    (
        "Dora is 4 years older than Emil. Emil is three times as old as Finn, who is 6. How old "
        "will Dora be in 10 years?",
        "Emil is 3 times 6 years old. Dora is 4 years older, and in 10 years she will be 10 years "
        "older than that.",
        ["3*6", "v1+4", "v2+10"],
    ),
    (
        "A school orders 36 desks for $55 each and 36 chairs for half the price of a desk. It gets "
        "$270 off. What is the bill?",
        "The desks cost 36 times 55 dollars. A chair costs half of 55 dollars and there are 36. "
        "Both costs, less 270, make the bill.",
        ["36*55", "36*(55/2)", "v1+v2-270"],
    ),
]


@dataclass(frozen=True)
class Problem:
    id: str  # stable, such as "gsm8k/train/17"
    task: str
    question: str
    answer: Fraction | None = None
    steps: list[Step] = field(default_factory=list)  # straight-line; empty when none are known
    reasoning: str = ""  # in words; render.solution() falls back on the steps


def question_of(problem):
    return problem.question


# ---- loading ----


def load_problems(task, split, data=None, count=None, seed=0):
    """list[Problem] of a task: "sums" (built in), "gsm8k" or "gsm8k_steps" (train only).

    split: "train" or "test".
    data: folder that holds gsm8k/ and gsm8k_steps/ (else RARECODE_DATA, ../shared/data, or a
        download kept in .data/).
    count: how many. sums: 8192 by default; gsm8k: all by default, else drawn by `seed`, in file
        order.
    Raises ValueError with one sentence for an unknown task or split, missing, empty or malformed
    data.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    if task == "sums":
        numbers = range(SUMS if count is None else count)
        return [_sums_problem(split, seed, number) for number in numbers]
    if task == "gsm8k":
        path = _gsm8k_path(split, data)
        read = _gsm8k_problem
    elif task == "gsm8k_steps":
        path = _steps_path(split, data)
        read = _steps_problem
    else:
        raise ValueError(f"unknown task {task!r}: use sums, gsm8k or gsm8k_steps")

    problems = read_jsonl(path, lambda index, row: read(split, index, row))
    return take(problems, count, seed)


def _sums_problem(split, seed, index):
    story = sums.make(split, seed, index)
    steps = exact_steps(story.steps)
    id = f"sums/{split}/{seed}/{index}"
    return Problem(id, "sums", story.question, steps[-1].value, steps)


def with_worked_text(problems, data=None):
    """Problems of gsm8k_steps, with the words of GSM8K's own answer as their reasoning.

    "48/2 = <<48/2=24>>24 clips\n#### 24" -> "48/2 = 24 clips". ValueError for other problems.
    """
    if any(problem.task != "gsm8k_steps" for problem in problems):
        raise ValueError("only gsm8k_steps has GSM8K's own words for its steps")
    texts = read_jsonl(_gsm8k_path("train", data), _worked_text)
    found = []
    for problem in problems:
        number = int(problem.id.rsplit("/", 1)[1])
        found.append(replace(problem, reasoning=texts[number]))
    return found


def with_known_steps(problems, data=None):
    """GSM8K's training problems with their steps, where gsm8k_steps knows them: 6,991 of 7,473."""
    known = load_problems("gsm8k_steps", "train", data)
    steps = {problem.id.replace("gsm8k_steps", "gsm8k"): problem.steps for problem in known}
    return [replace(problem, steps=steps.get(problem.id, [])) for problem in problems]


def with_few_steps(problems, most):
    """Those with known steps, and at most so many. ValueError where there is none."""
    found = [problem for problem in problems if 0 < len(problem.steps) <= most]
    if not found:
        raise ValueError(f"no problem has at most {most} known steps: raise --max_known_steps")
    return found


def _worked_text(_, row):
    return re.sub(r"<<[^<>]*>>", "", row["answer"].rsplit("####", 1)[0]).strip()


def _gsm8k_path(split, data):
    return find_data(f"gsm8k/{split}.jsonl", data) or download_gsm8k(split)


def _gsm8k_problem(split, index, row):
    gold = row["answer"].rsplit("####", 1)[1]
    return Problem(f"gsm8k/{split}/{index}", "gsm8k", row["question"], _gold_number(gold))


def _gold_number(text):
    """The right answer of a row. What is not clearly one number would train on a wrong one."""
    number = written_number(text)
    if number is None:
        raise ValueError(f"the answer {text.strip()!r} is not a number such as 42, 1,200 or -0.5")
    return number


def _steps_path(split, data):
    if split != "train":
        raise ValueError(
            "gsm8k_steps has a train split only: its steps come from the training answers"
        )
    path = find_data("gsm8k_steps/train.jsonl", data)
    if path is None:
        raise ValueError(
            "gsm8k_steps needs gsm8k_steps/train.jsonl: "
            "put it under --data, RARECODE_DATA or ../shared/data"
        )
    return path


def _steps_problem(split, index, row):
    steps = exact_steps([(step["var"], step["expr"]) for step in row["steps"]])
    answer = _gold_number(str(row["answer"]))
    if steps[-1].value != answer:
        raise ValueError(f"steps give {steps[-1].value}, answer is {answer}")
    number = row["id"].rsplit("-", 1)[1]
    return Problem(f"gsm8k_steps/{split}/{number}", "gsm8k_steps", row["question"], answer, steps)


# ---- prompts ----


def program_messages(problem, language, examples=1, system=True):
    """Chat messages [{"role", "content"}] that ask for a program in `language`.

    examples: 0, 1 or 5 worked examples.
    system: for instruct models, instructions and examples in the system message. Without it (tiny
        models) the question alone, and each example as an earlier turn.
    """
    language = language_of(language)
    if examples not in (0, 1, 5):
        raise ValueError(f"examples is {examples}: use 0, 1 or 5")
    worked = [worked_example(number) for number in range(examples)]
    question = {"role": "user", "content": problem.question}

    if not system:
        turns = []
        for example in worked:
            turns.append({"role": "user", "content": example.question})
            turns.append({"role": "assistant", "content": solution(example, language)})
        return [*turns, question]

    words = language.answer
    content = SYSTEM.format(
        title=language.title, ask=words["ask"], tag=words["tag"], word=words["word"]
    )
    for number, example in enumerate(worked, 1):
        content += f"\n\n## Example {number}\n\nQuestion:\n{example.question}"
        content += f"\n\n{solution(example, language)}"
    return [{"role": "system", "content": content}, question]


def worked_example(number):
    """Number 0 to 4 of our own examples as a Problem."""
    question, reasoning, expressions = EXAMPLES[number]
    steps = exact_steps([(f"v{n}", expr) for n, expr in enumerate(expressions, 1)])
    return Problem(f"example/{number}", "example", question, steps[-1].value, steps, reasoning)
