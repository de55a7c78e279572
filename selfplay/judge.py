"""Answers to puzzles, judged by running them."""

import math
from dataclasses import dataclass

from sandbox.languages.calls import Outcome, Runner, Running, wait
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import same, write
from selfplay.parse import answer_of, blocks, code_of, inputs_of, value_of
from selfplay.puzzles import OUT_OF_FORM, SHOWN, Refused
from selfplay.rewards import equation_2
from tasks.verdicts import ANSWER_END, Parsed, Submission, Verdict


@dataclass(frozen=True)
class Answer(Submission):
    """A solver's completion; parsed.code is the value or the program that it gives."""

    running: Running | None = None  # None: nothing has to run
    status: str = "ok"  # or why it was refused before it could run


class SolveJudge:
    """Judges answers to puzzles; a judge as tasks/verdicts.py describes it.

    The reward is equation (2); nan when the sandbox could not judge.
    penalties: {reason: reward} of answers that are not right, in place of the equation's.
    """

    def __init__(self, pool, language, penalties=None):
        self.penalties = penalties or {}
        self.runner = Runner(pool, language)
        self.language = language

    def stop_strings(self, puzzle):
        return (ANSWER_END,)

    def submit(self, puzzle, text, sample=0):
        """Start what has to run for a completion. Returns the Answer that collect() takes."""
        given = ""
        running = None
        status = "ok"
        try:
            given = self._given(puzzle, answer_of(text))
            running = self._start(puzzle, given)
        except Refused as refusal:
            status = refusal.reason

        return Answer(
            problem=puzzle,
            sample=sample,
            text=text,
            parsed=Parsed("", given, "", format_ok=status not in OUT_OF_FORM),
            nonce="",
            future=running.future if running else None,
            running=running,
            status=status,
        )

    def collect(self, answers, deadline=None):
        """Verdicts in order; what is not done `deadline` seconds from now is a sandbox_error."""
        wait([answer.running for answer in answers], deadline)
        return [self._verdict(answer) for answer in answers]

    def _given(self, puzzle, text):
        """The part of an answer that is judged."""
        if puzzle.task == "induction":
            return code_of(text, self.language)
        kind = "output" if puzzle.task == "deduction" else "input"
        found = blocks(text, [kind])
        if not found:
            raise Refused(f"no_{kind}")
        return found[0]

    def _start(self, puzzle, given):
        """The job that an answer needs, if any.

        Abduction: f of the answer. Induction: the answer on the hidden inputs.
        """
        if puzzle.task == "deduction":
            return None
        if puzzle.task == "abduction":
            return self.runner.start(puzzle.entry.program, [inputs_of(given, self.language)])
        hidden = [read(text, self.language) for text in puzzle.entry.inputs[SHOWN:]]
        return self.runner.start(given, hidden)

    def _verdict(self, answer):
        status = answer.status
        correct = False
        value = None
        if status == "ok":
            try:
                correct, value = self._compare(answer)
            except Refused as refusal:
                status = refusal.reason

        if status == "sandbox_error":
            reward = math.nan
        else:
            reward = equation_2(answer.parsed.format_ok, status == "ok", correct)
        if not correct:
            reward = self.penalties.get("wrong" if status == "ok" else status, reward)
        return Verdict(
            problem=answer.problem.id,
            reward=reward,
            components={"correct": float(correct)},
            correct=correct,
            status=status,
            value=value,
            program=answer.parsed.code,
            parsed=answer.parsed,
            constant=False,
            leaked=False,
        )

    def _compare(self, answer):
        """(are all values right, the values as text); Refused when there is none."""
        puzzle = answer.problem
        language = self.language
        if answer.running is None:
            found = [Outcome("value", answer.parsed.code)]
        else:
            found = self.runner.finish(answer.running)
        values = [value_of(outcome, language) for outcome in found]

        outputs = puzzle.entry.outputs
        if puzzle.task == "induction":
            outputs = outputs[SHOWN:]
        wanted = [read_one(text, language) for text in outputs]
        correct = all(same(a, b, language) for a, b in zip(values, wanted))
        return correct, "; ".join(write(value, language) for value in values)
