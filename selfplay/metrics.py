"""What a step of self-play logs: how valid, how learnable and how well solved the puzzles were."""

import math
from dataclasses import dataclass

from selfplay.puzzles import REASONS, ROLES, TASKS
from tasks.verdicts import Verdict


@dataclass(frozen=True)
class Scored:
    """What the metrics need of one sample."""

    task: str  # one of TASKS
    role: str  # one of ROLES
    verdict: Verdict


def play_metrics(buffers, scored, accuracies, added):
    """Metrics of a step over all ranks, by name.

    scored: [Scored] of all samples. accuracies: of all valid proposals that could be judged.
    added: {task: number of new entries}.
    """
    found = {}
    has_signal = []  # one for each (task, role): are its rewards not all equal?
    for task in TASKS:
        for role in ROLES:
            verdicts = verdicts_of(scored, role, task)
            rewards = [verdict.reward for verdict in verdicts if verdict.judged]
            name = "valid_frac" if role == "propose" else "accuracy"
            found[f"{role}/{name}/{task}"] = mean(right_or_wrong(verdicts))
            found[f"{role}/reward/{task}"] = mean(rewards)
            has_signal.append(len(set(rewards)) > 1)
        found[f"buffer/{task}"] = float(len(buffers[task]))
        found[f"buffer/{task}_added"] = float(added[task])
    found["frac_reward_zero_std"] = mean([not signal for signal in has_signal])

    proposals = verdicts_of(scored, "propose")
    valid = right_or_wrong(proposals)
    found["propose/valid_frac"] = mean(valid)
    # Of the valid ones: in the buffer already, or twice in this step.
    found["propose/known_frac"] = 1 - sum(added.values()) / sum(valid) if any(valid) else math.nan
    found["solve/accuracy"] = mean(right_or_wrong(verdicts_of(scored, "solve")))
    found["solve/accuracy_moving"] = buffers.solver_accuracy
    for reason in REASONS:
        found[f"refused/{reason}"] = float(sum(v.status == reason for v in proposals))

    found["learn/accuracy"] = mean(accuracies)
    found["learn/none_right_frac"] = mean([a == 0 for a in accuracies])
    found["learn/all_right_frac"] = mean([a == 1 for a in accuracies])
    for low in (0.0, 0.25, 0.5, 0.75):  # between never and always: what equation (3) pays for
        name = f"learn/from_{low:g}_frac"
        found[name] = mean([0 < a < 1 and low <= a < low + 0.25 for a in accuracies])
    return found


def verdicts_of(scored, role, task=None):
    """Verdicts of a role, of all tasks or one."""
    found = []
    for one in scored:
        if one.role == role and task in (None, one.task):
            found.append(one.verdict)
    return found


def right_or_wrong(verdicts):
    """[is it right?] of the verdicts that the sandbox could reach."""
    return [verdict.correct for verdict in verdicts if verdict.status != "sandbox_error"]


def mean(values):
    """Also of truth values; nan where there are none (null in metrics.jsonl)."""
    return sum(values) / len(values) if values else math.nan
