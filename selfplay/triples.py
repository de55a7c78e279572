"""Small synthetic programs with inputs and outputs in a language, in the prompts' own form.

They are the warm start of a tiny model, which can neither propose nor solve anything without, and
the held-out input/output prediction problems. The kinds of programs are those below; a language's
TOML ([call.demos]) says how each is written.
"""

import random
import zlib
from dataclasses import replace

from sandbox.languages.calls import input_text
from sandbox.languages.values import write
from selfplay.prompts import block, propose_prompt, solve_prompt
from selfplay.puzzles import PAIRS, TASKS, Entry, Puzzle

# Of one number; "two" of two numbers; the others of a list of digits.
NUMBER_KINDS = ("add", "affine", "square")
KINDS = (*NUMBER_KINDS, "two", "front", "reverse", "shift", "above", "total")


def held_out_triples(language, count, seed=0, tasks=TASKS):
    """Puzzles from test triples, the tasks in turn."""
    puzzles = []
    for i in range(count):
        task = tasks[i % len(tasks)]
        entry = triple("test", seed, i, language, pairs_of(task))
        puzzles.append(Puzzle(f"triples/{task}/{i}", task, entry, question=entry.program))
    return puzzles


def triple(split, seed, index, language, pairs=1):
    """Entry number `index` of a split, "train" or "test".

    No program with its inputs is in both splits: every fifth, by a hash, is a test triple.
    """
    return _entry(*_draw(split, seed, index, language, pairs), language)


def _draw(split, seed, index, language, pairs):
    """(kind, its constants k and l, arguments of each call)."""
    rng = random.Random(f"{split}/{seed}/{index}")
    kinds = [kind for kind in KINDS if kind in language.call["demos"]]
    while True:
        kind = rng.choice(kinds)
        k = rng.randint(1, 5)
        l = rng.randint(0, 3)
        calls = [_draw_arguments(kind, rng) for _ in range(pairs)]
        entry = _entry(kind, k, l, calls, language)
        is_test = zlib.crc32(f"{entry.program}{entry.inputs}".encode()) % 5 == 0
        if is_test == (split == "test"):
            return kind, k, l, calls


def _entry(kind, k, l, calls, language):
    program = language.call["demos"][kind].strip("\n")
    program = program.replace("{k}", str(k)).replace("{l}", str(l))
    inputs = tuple(input_text(arguments, language) for arguments in calls)
    values = [_output(kind, k, l, *arguments) for arguments in calls]
    outputs = tuple(write(value, language) for value in values)
    return Entry(program, inputs, outputs, message=kind if len(calls) > 1 else "")


def pairs_of(task):
    return PAIRS if task == "induction" else 1


def _draw_arguments(kind, rng):
    if kind in NUMBER_KINDS:
        return [rng.randint(0, 9)]
    if kind == "two":
        return [rng.randint(0, 5), rng.randint(0, 5)]
    length = rng.randint(1, 3)
    return [[rng.randint(0, 5) for _ in range(length)]]


def _output(kind, k, l, a, b=0):
    """What a program of a kind with the constants k and l gives."""
    match kind:
        case "add":
            return a + k
        case "affine":
            return a * k + l
        case "square":
            return a * a + k
        case "two":
            return a + b * k
        case "front":
            return [k, *a]
        case "reverse":
            return [*a[::-1], k]
        case "shift":
            return [x + k for x in a]
        case "above":
            return [x for x in a if x > k]
        case "total":
            return sum(a) + k


def _work(kind, k, l, a, b=0):
    """The numbers of _output in the order in which they are used: affine of 7 is "7 * 2 + 1".

    A solver that writes them down first has little to learn but to copy; without, 3,000 supervised
    steps left output prediction at 0.08.
    """
    match kind:
        case "add":
            return f"{a} + {k}"
        case "affine":
            return f"{a} * {k} + {l}"
        case "square":
            return f"{a} * {a} + {k}"
        case "two":
            return f"{a} + {b} * {k}"
        case "front":
            return f"{k} | {_joined(a)}"
        case "reverse":
            return f"{_joined(a)} reversed | {k}"
        case "shift":
            return ", ".join(f"{x} + {k}" for x in a)
        case "above":
            return ", ".join(f"{x} > {k}" for x in a)
        case "total":
            return " + ".join(map(str, [*a, k]))


def _joined(numbers):
    return " ".join(map(str, numbers))


def demonstrations(language, count, seed, references, short, mistakes=0.0):
    """[(prompt, completion)]: the six prompts, answered with train triples.

    references: most earlier programs in a proposer's prompt, as in the training run.
    mistakes: share of the solver's answers that are worked out for the program with k + 1 where the
        prompt shows the one with k; the others are right.
    """
    found = []
    for index in range(count):
        found.append(_demonstration(language, index, seed, references, short, mistakes))
    return found


def _demonstration(language, index, seed, references, short, mistakes):
    task = TASKS[index % 3]
    solve = index // 3 % 6 > 0  # five of six: answers take more learning than proposals
    kind, k, l, calls = _draw("train", seed, index, language, pairs_of(task))
    entry = _entry(kind, k, l, calls, language)
    program = block(language.fence[0], entry.program)

    if solve:
        if random.Random(f"mistakes/{seed}/{index}").random() < mistakes:
            k += 1
        worked = replace(_entry(kind, k, l, calls, language), program=entry.program)
        thought = f"{_work(kind, k, l, *calls[0])} = {worked.outputs[0]}"
        prompt = solve_prompt(Puzzle("", task, worked), language, short)
        answers = {
            "deduction": block("output", worked.outputs[0]),
            "abduction": block("input", worked.inputs[0]),
            "induction": program,
        }
        return prompt, _completion(answers[task], thought)

    inputs = [block("input", text) for text in entry.inputs]
    if task == "induction":
        prompt = propose_prompt(task, language, [entry], short=short)
        answer = "\n".join([*inputs, block("message", entry.message)])
        return prompt, _completion(answer)

    rng = random.Random(f"references/{seed}/{index}")
    others = []
    for _ in range(rng.randint(min(1, references), references)):
        others.append(triple("train", seed, rng.randrange(10**6), language))
    prompt = propose_prompt(task, language, others, short=short)
    return prompt, _completion(f"{program}\n{inputs[0]}")


def _completion(answer, thought="ok"):
    return f"{thought}</think>\n<answer>\n{answer}\n</answer>"
