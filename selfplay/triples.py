"""Small synthetic (program, input, output) triples in a language, in the prompts' own form: the warm start of a tiny model, and held-out
input/output prediction problems. A model of one million parameters can neither propose nor solve anything without.

The kinds of programs are those below; a language's TOML ([call.demos]) says how each is written.
"""

import random
import zlib

from sandbox.languages.calls import input_text
from sandbox.languages.values import write
from selfplay.prompts import block, propose_prompt, solve_prompt
from selfplay.proposals import PAIRS, TASKS, Entry, Puzzle

# name: (inputs by a generator, output). k and l are the program's constants.
KINDS = {
    "add": (lambda r: [r.randint(0, 9)], lambda k, l, a: a + k),
    "affine": (lambda r: [r.randint(0, 9)], lambda k, l, a: a * k + l),
    "square": (lambda r: [r.randint(0, 9)], lambda k, l, a: a * a + k),
    "two": (lambda r: [r.randint(0, 5), r.randint(0, 5)], lambda k, l, a, b: a + b * k),
    "front": (lambda r: [_digits(r)], lambda k, l, a: [k] + a),
    "reverse": (lambda r: [_digits(r)], lambda k, l, a: a[::-1] + [k]),
    "shift": (lambda r: [_digits(r)], lambda k, l, a: [x + k for x in a]),
    "above": (lambda r: [_digits(r)], lambda k, l, a: [x for x in a if x > k]),
    "total": (lambda r: [_digits(r)], lambda k, l, a: sum(a) + k),
}


def _digits(rng):
    return [rng.randint(0, 5) for _ in range(rng.randint(1, 3))]


def triple(split, seed, index, language, pairs=1):
    """Entry number `index` of a split; no program with its inputs is in both splits (every fifth, by a hash, is a test triple)."""
    rng = random.Random(f"{split}/{seed}/{index}")
    names = [name for name in KINDS if name in language.call["demos"]]
    while True:
        name, k, l = rng.choice(names), rng.randint(1, 5), rng.randint(0, 3)
        inputs_of, function = KINDS[name]
        program = (
            language.call["demos"][name].replace("{k}", str(k)).replace("{l}", str(l)).strip("\n")
        )
        arguments = [inputs_of(rng) for _ in range(pairs)]
        inputs = tuple(input_text(a, language) for a in arguments)
        if (zlib.crc32(f"{program}{inputs}".encode()) % 5 == 0) == (split == "test"):
            break
    outputs = tuple(write(function(k, l, *a), language) for a in arguments)
    return Entry(program, inputs, outputs, name if pairs > 1 else "")


def demonstrations(language, count, seed, references, short):
    """[(prompt, completion)]: the six prompts, answered rightly with train triples. `references` as in the training run."""
    return [_demonstration(language, index, seed, references, short) for index in range(count)]


def _demonstration(language, index, seed, references, short):
    task, solve = (
        TASKS[index % 3],
        index // 3 % 3 > 0,
    )  # two of three solve: answers take more learning than proposals
    entry = triple("train", seed, index, language, PAIRS if task == "induction" else 1)
    if solve:
        puzzle = Puzzle("", task, entry)
        name, text = {
            "deduction": ("output", entry.outputs[0]),
            "abduction": ("input", entry.inputs[0]),
            "induction": (language.fence[0], entry.program),
        }[task]
        return solve_prompt(puzzle, language, short), completion(block(name, text))
    if task == "induction":
        answer = "\n".join(
            [*(block("input", i) for i in entry.inputs), block("message", entry.message)]
        )
        return propose_prompt(task, language, [entry], short=short), completion(answer)
    rng = random.Random(f"references/{seed}/{index}")
    others = [
        triple("train", seed, rng.randrange(10**6), language)
        for _ in range(rng.randint(min(1, references), references))
    ]
    return propose_prompt(task, language, others, short=short), completion(
        f"{block(language.fence[0], entry.program)}\n{block('input', entry.inputs[0])}"
    )


def completion(answer):
    return f"ok</think>\n<answer>\n{answer}\n</answer>"


def held_out_triples(language, count, seed=0, tasks=TASKS):
    """Puzzles from test triples, the tasks in turn."""
    kinds = [tasks[i % len(tasks)] for i in range(count)]
    entries = [
        triple("test", seed, i, language, PAIRS if kind == "induction" else 1)
        for i, kind in enumerate(kinds)
    ]
    return [
        Puzzle(f"triples/{kind}/{i}", kind, entry, entry.program)
        for i, (kind, entry) in enumerate(zip(kinds, entries))
    ]
