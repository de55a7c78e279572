"""The six prompts of self-play: propose and solve, for deduction, abduction and induction.

All end in "Assistant: <think>". The long form follows Absolute Zero's structure in words of our
own; the short one is for tiny models that were warm-started on it (triples.py).
"""

from selfplay.parse import renamed
from selfplay.puzzles import PAIRS, SHOWN

END = "Assistant: <think>"

WRAPPER = """A conversation between User and Assistant. The user asks a question, and the \
assistant solves it. The assistant first thinks about the reasoning process and then gives the \
answer. The reasoning process and the answer are enclosed within <think> </think> and <answer> \
</answer> tags, that is, <think> reasoning process here </think> <answer> answer here </answer>.
User: {task}
Assistant: <think>"""

RULES = """# Code requirements
- {rules}
- The program is written in {title}, parses and runs as it stands, and uses the standard library \
only.
- It is deterministic: the same input always gives the same output, in every process.
- No randomness, clocks, files, network, processes, input from the keyboard, evaluation of text, \
or printing.
- It ends within {seconds:g} seconds."""

PROPOSE = {
    "deduction": """# Task: write a new {title} program and one input whose OUTPUT is hard to \
predict from the program and the input.
Think of it as a question of an intelligence test for programmers: it should need several steps \
of reasoning about state, and it must have one right answer.""",
    "abduction": """# Task: write a new {title} program and one input such that the input is hard \
to find from the program and its OUTPUT.
Think of it as a question of an intelligence test for programmers: going backwards should need \
several steps of reasoning. Any input that gives the output will count.""",
    "induction": """# Task: write {pairs} different inputs for the {title} program below, and a \
short message.
Another programmer will see some of the inputs with their outputs and the message, and must write \
the program. Together the inputs should show everything the program does, and the message should \
help without giving the program away. Make it hard but possible.""",
}

SOLVE = {
    "deduction": (
        "# Task: give the output of the {title} program below for the given input, as a "
        "{title} literal."
    ),
    "abduction": (
        "# Task: give one input for which the {title} program below returns the given "
        "output. Several inputs may do; one is enough."
    ),
    "induction": (
        "# Task: write the {title} program that maps every input below to its output, and "
        "other inputs likewise."
    ),
}

PROPOSE_FORM = """# Format of the answer
Inside <answer> </answer> write the program in ```{fence} and its input in ```input:
```{fence}
{identity}
```
```input
{hello}
```
The program will be judged by whether it runs, by how hard it is, and by how it differs from the \
examples. First plan the program, then write it."""

INDUCTION_FORM = """# Format of the answer
Inside <answer> </answer> write {pairs} blocks of the form
```input
{hello}
```
and one block
```message
a hint
```"""

BUILD_ON = """# Build on these, which are defined for you: `f` must call {names} (do not define \
them again)
{functions}"""

SOLVE_FORM = """# Format of the answer
Inside <answer> </answer> write one block that starts with ```{wanted} and ends with ```. {rules}"""


def propose_prompt(task, language, references, composed=(), short=False):
    """What a proposer is asked.

    references: Entries to differ from; for induction the one Entry whose program it is about.
    composed: programs to build on.
    """
    fence = language.fence[0]
    examples = []
    for entry in references:
        example = block(fence, entry.program)
        if task != "induction":
            example += "\n" + block("input", entry.inputs[0])
        examples.append(example)
    functions = [block(fence, renamed(program, i, language)) for i, program in enumerate(composed)]
    if short:
        return "\n".join([f"propose {task}", *functions, *examples, END])

    call = language.call
    words = {
        "title": language.title,
        "fence": fence,
        "pairs": PAIRS,
        "identity": call["identity"],
        "hello": call["hello"],
        "rules": call["rules"],
        "seconds": language.limits.cpu,
    }
    if task == "induction":
        parts = [form.format(**words) for form in (PROPOSE[task], INDUCTION_FORM)]
        parts.append(f"# The program\n{examples[0]}")
        return WRAPPER.format(task="\n\n".join(parts))

    parts = [form.format(**words) for form in (PROPOSE[task], RULES, PROPOSE_FORM)]
    if functions:
        names = ", ".join(f"g_{i}" for i in range(len(functions)))
        parts.append(BUILD_ON.format(names=names, functions="\n".join(functions)))
    parts.append("# Examples to differ from\n" + "\n\n".join(examples))
    return WRAPPER.format(task="\n\n".join(parts))


def solve_prompt(puzzle, language, short=False):
    """What a solver is asked. The output of a deduction, the input of an abduction, and of an
    induction the program and the pairs it is judged on are not in it."""
    entry = puzzle.entry
    fence = language.fence[0]
    if puzzle.task == "deduction":
        wanted = "output"
        given = [block(fence, entry.program), block("input", entry.inputs[0])]
    elif puzzle.task == "abduction":
        wanted = "input"
        given = [block(fence, entry.program), block("output", entry.outputs[0])]
    else:
        wanted = fence
        given = []
        for one, output in zip(entry.inputs[:SHOWN], entry.outputs[:SHOWN]):
            given += [block("input", one), block("output", output)]
        given.append(block("message", entry.message))
    if short:
        return "\n".join([f"solve {puzzle.task}", *given, END])

    parts = [
        SOLVE[puzzle.task].format(title=language.title),
        SOLVE_FORM.format(wanted=wanted, rules=language.call["rules"]),
        "# Given\n" + "\n".join(given),
    ]
    return WRAPPER.format(task="\n\n".join(parts))


def block(name, text):
    return f"```{name}\n{text}\n```"
