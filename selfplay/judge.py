"""Answers to puzzles, judged: the reward is equation (2) of Inoue & Tsuruoka."""

import math
from dataclasses import dataclass

from sandbox.languages.calls import Runner, wait
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import same, write
from selfplay.parse import answer_of, blocks, code_of, inputs_of
from selfplay.proposals import SHOWN, Refused, value_of
from tasks.verdicts import Parsed, Submission, Verdict


class SolveJudge:
    """Judges answers to puzzles, with submit and collect as rewards.Judge. The reward is equation (2) of Inoue & Tsuruoka:
    1 right, 0 wrong, -0.5 in form but no value or a program that fails, -1 out of form; nan when the sandbox could not judge."""

    def __init__(self, pool, language):
        self.runner, self.language = Runner(pool, language), language

    def submit(self, puzzle, text, sample=0):
        """Starts what has to run: nothing for deduction, f of the answer for abduction, the answer on the hidden inputs for induction."""
        program, started = "", None
        try:
            answer = answer_of(text)
            program = self._answer(puzzle, answer)
            status = "ok"
            if puzzle.task == "abduction":
                started = self.runner.start(
                    puzzle.entry.program, [inputs_of(program, self.language)]
                )
            elif puzzle.task == "induction":
                hidden = [read(i, self.language) for i in puzzle.entry.inputs[SHOWN:]]
                started = self.runner.start(program, hidden)
        except Refused as reason:
            status = str(reason)
        parsed = Parsed(
            "", program, "", status not in ("format", "no_program", "no_input", "no_output")
        )
        return _Answer(
            puzzle,
            sample,
            text,
            parsed,
            "",
            started[0] if started else None,
            started=started,
            status=status,
        )

    def _answer(self, puzzle, answer):
        if puzzle.task == "induction":
            return code_of(answer, self.language)
        kind = {"deduction": "output", "abduction": "input"}[puzzle.task]
        found = blocks(answer, [kind])
        if not found:
            raise Refused(f"no_{kind}")
        return found[0]

    def collect(self, submissions, deadline=None):
        wait([s.started for s in submissions], deadline)
        return [self._verdict(s) for s in submissions]

    def _verdict(self, submission):
        status, correct, value = submission.status, False, None
        if status == "ok":
            try:
                correct, value = self._compare(submission)
            except Refused as reason:
                status = str(reason)
        reward = (
            math.nan
            if status == "sandbox_error"
            else solver_reward(submission.parsed.format_ok, status == "ok", correct)
        )
        program, parsed = submission.parsed.code, submission.parsed
        return Verdict(
            submission.problem.id,
            reward,
            {"correct": float(correct)},
            correct,
            status,
            value,
            program,
            parsed,
            False,
            False,
        )

    def _compare(self, submission):
        entry, language = submission.problem.entry, self.language
        if submission.started is None:
            texts = [("value", submission.parsed.code)]
        else:
            texts = self.runner.finish(submission.started)
        outputs = entry.outputs[SHOWN:] if submission.problem.task == "induction" else entry.outputs
        values = [value_of(kind, text, language) for kind, text in texts]
        return all(
            same(v, read_one(o, language), language) for v, o in zip(values, outputs)
        ), "; ".join(write(v, language) for v in values)


@dataclass(frozen=True)
class _Answer(Submission):
    started: tuple | None = None
    status: str = ""


def solver_reward(formatted, runnable, correct):
    """Equation (2): accuracy if the answer can be read and run, -0.5 if only its form is right, else -1.

    The public implementation gives -0.5 to a wrong answer in the right form; the paper's equation, and its text, give it accuracy 0.
    """
    if not formatted:
        return -1.0
    return float(correct) if runnable else -0.5
