"""What is proposed and solved in self-play, and every reason for refusing a completion.

A completion of the proposer becomes a Candidate (parse.py), which is checked by running its program
(proposals.py). What passes is an Entry of a buffer, and an Entry makes a Puzzle of each task.
"""

from dataclasses import dataclass

from sandbox.languages.values import MAX_TEXT

TASKS = ("deduction", "abduction", "induction")
ROLES = ("propose", "solve")
PAIRS = 10  # induction: inputs of a proposal
SHOWN = 5  # of these the solver sees the first five with their outputs; it is judged on the others

REASONS = {
    "format": "not <think>...</think> <answer>...</answer>",
    "no_program": "no code block in the language",
    "no_input": "no input block",
    "few_inputs": f"induction with fewer than {PAIRS} input blocks",
    "no_message": "induction without a message block",
    "duplicate": "copies a reference or what the buffer has already (--refuse_copies)",
    "no_composite": "does not call the functions it was asked to build on, or defines them again",
    "input_no_value": "an input is not a literal",
    "too_long": f"an input or output has more than {MAX_TEXT} characters (never cut)",
    "syntax": "does not parse",
    "banned": "uses randomness, time, files, processes, evaluation or another banned construct",
    "no_f": "defines no f",
    "error": "fails on an input",
    "no_value": "an output has no literal (a function, an infinite number)",
    "not_deterministic": "two processes gave different outputs",
    "no_round_trip": "an output changes when it is written and read back",
    "cpu_limit": "",
    "wall_limit": "",
    "memory_limit": "",
    "output_limit": "",
    "file_limit": "",
    "crash": "",
    "compile_error": "",
    "sandbox_error": "the sandbox could not judge: masked, not refused",
    "judge_fault": "the judge failed on it (tasks/faults.py)",
}
# What a penalty can be for: a solver's answer may also be wrong, or have no output.
NOBODYS = ("sandbox_error", "judge_fault")
PROPOSE_REASONS = tuple(reason for reason in REASONS if reason not in NOBODYS)
SOLVE_REASONS = ("wrong", "no_output", *PROPOSE_REASONS)
# Refused for what the completion looks like; no_output is a solver's, the others are in REASONS.
OUT_OF_FORM = ("format", "no_program", "no_input", "no_output", "few_inputs", "no_message")


class Refused(Exception):
    """A completion that cannot be used. reason: a key of REASONS, or no_output."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Entry:
    """A program with inputs and outputs as canonical text; induction has PAIRS of them."""

    program: str
    inputs: tuple
    outputs: tuple
    message: str = ""  # induction: a hint for the solver
    step: int = 0  # in which it was proposed


@dataclass(frozen=True)
class Candidate:
    """A proposal on its way into a buffer: an entry, or the reason why there is none."""

    entry: Entry | None = None  # without outputs until its program has run
    reason: str = "ok"  # or a key of REASONS


@dataclass(frozen=True)
class Puzzle:
    """What a solver is given."""

    id: str
    task: str  # one of TASKS
    entry: Entry
    question: str = ""  # the prompt, for samples.jsonl
    answer: str | None = None
