"""Small synthetic programs with inputs and outputs in a language, in the prompts' own form.

They are the warm start of a tiny model, which can neither propose nor solve anything without, and
the held-out input/output prediction problems. The kinds of programs are those below; a language's
TOML ([call.demos]) says how each is written.
"""

import random
import zlib

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
    rng = random.Random(f"{split}/{seed}/{index}")
    demos = language.call["demos"]
    kinds = [kind for kind in KINDS if kind in demos]
    while True:
        kind = rng.choice(kinds)
        k = rng.randint(1, 5)
        l = rng.randint(0, 3)
        program = demos[kind].strip("\n").replace("{k}", str(k)).replace("{l}", str(l))
        calls = [_draw_arguments(kind, rng) for _ in range(pairs)]
        inputs = tuple(input_text(arguments, language) for arguments in calls)
        is_test = zlib.crc32(f"{program}{inputs}".encode()) % 5 == 0
        if is_test == (split == "test"):
            break

    values = [_output(kind, k, l, *arguments) for arguments in calls]
    outputs = tuple(write(value, language) for value in values)
    return Entry(program, inputs, outputs, message=kind if pairs > 1 else "")


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


def demonstrations(language, count, seed, references, short):
    """[(prompt, completion)]: the six prompts, answered rightly with train triples.

    references: most earlier programs in a proposer's prompt, as in the training run.
    """
    found = []
    for index in range(count):
        found.append(_demonstration(language, index, seed, references, short))
    return found


def _demonstration(language, index, seed, references, short):
    task = TASKS[index % 3]
    solve = index // 3 % 3 > 0  # two of three: answers take more learning than proposals
    entry = triple("train", seed, index, language, pairs_of(task))
    program = block(language.fence[0], entry.program)

    if solve:
        prompt = solve_prompt(Puzzle("", task, entry), language, short)
        answers = {
            "deduction": block("output", entry.outputs[0]),
            "abduction": block("input", entry.inputs[0]),
            "induction": program,
        }
        return prompt, _completion(answers[task])

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


def _completion(answer):
    return f"ok</think>\n<answer>\n{answer}\n</answer>"
