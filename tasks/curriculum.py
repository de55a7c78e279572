"""Which problems a run asks next: all of them in passes, but for those that teach nothing now."""

from dataclasses import dataclass, field

from tasks.data import in_passes


@dataclass
class Curriculum:
    """The order of a run's problems, and what it remembers of them.

    low, high: a problem is asked again only if the share of right samples, when it was last asked,
    lay within them: without those too hard (arXiv 2504.03380) or solved (arXiv 2510.13786).
    """

    problems: list
    seed: int
    low: float = 0.0
    high: float = 1.0
    drawn: int = 0  # prompts so far, with those passed over
    rates: dict = field(default_factory=dict)  # problem id -> share of right ones of its samples

    def next(self, count):
        """The next `count` problems, each with its number 0, 1, 2, ... in the run.

        Each pass over the data has a new order that depends on seed and pass alone. Problems
        outside the bounds are passed over, unless a whole pass has nothing else.
        """
        found, passed_over = [], []
        for _ in range(1 + len(self.problems) // count):
            numbers = range(self.drawn, self.drawn + count - len(found))
            self.drawn = numbers.stop
            for pair in zip(numbers, in_passes(self.problems, numbers, self.seed)):
                (found if self._may_teach(pair[1]) else passed_over).append(pair)
            if len(found) == count:
                break
        return found + passed_over[: count - len(found)]

    def learn(self, outcomes):
        """outcomes: (problem id, is it right) of a step's samples on all ranks."""
        by_problem = {}
        for id, is_right in outcomes:
            by_problem.setdefault(id, []).append(is_right)
        self.rates |= {id: sum(rights) / len(rights) for id, rights in by_problem.items()}

    def _may_teach(self, problem):
        return self.low <= self.rates.get(problem.id, self.low) <= self.high
