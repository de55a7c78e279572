"""Problems, prompts, and right answers as programs.

A Problem is what the model is asked; program_messages() is how it is asked; solution() is a completion that would be right, in any
language whose TOML has a [render] table (for the warm start).
"""

import random
from dataclasses import dataclass, field
from fractions import Fraction

from sandbox.languages import language_of
from tasks import sums
from tasks.data import download_gsm8k, find_data, read_jsonl
from tasks.render import Step, exact_steps, solution


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
    path = find_data(f"{task}/{split}.jsonl", data) or download_gsm8k(task, split)
    read = _gsm8k_problem if task == "gsm8k" else _steps_problem
    problems = read_jsonl(path, lambda index, row: read(split, index, row))
    if count is None or count >= len(problems):
        return problems
    return [
        problems[index] for index in sorted(random.Random(seed).sample(range(len(problems)), count))
    ]


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


def program_messages(problem, language, examples=1, system=True):
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
