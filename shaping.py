"""Rewards that depend on the step or the length, beside what a program is worth (rewards.py)."""

import math
from dataclasses import replace

from runtime import distributed


def shaped(verdicts, completions, settings):
    """Verdicts with the syntax mix and the soft overlong penalty in their rewards. A collective."""
    rewards = [verdict.reward for verdict in verdicts]
    if settings.syntax_mix:
        syntax = [verdict.components["syntax"] for verdict in verdicts]
        rewards = mixed_with_syntax(rewards, syntax)
    if settings.overlong_buffer:
        limit, buffer = settings.max_new_tokens, settings.overlong_buffer
        penalties = [overlong_penalty(len(x.tokens), limit, buffer) for x in completions]
        rewards = [reward + penalty for reward, penalty in zip(rewards, penalties)]
    return [replace(verdict, reward=reward) for verdict, reward in zip(verdicts, rewards)]


def mixed_with_syntax(rewards, syntax):
    """SLMFix: s * syntax + (1 - s) * reward, s the share of the step's programs with syntax errors.

    syntax: 1 where a program's syntax is right, 0 where it is wrong, nan where nobody could tell.
    Syntax 1, 0 and rewards 1, 0: s = 0.5 -> 1, 0.
    """
    judged = [right for right in distributed.gather(syntax) if not math.isnan(right)]
    wrong = 1 - sum(judged) / max(1, len(judged))
    return [wrong * right + (1 - wrong) * reward for right, reward in zip(syntax, rewards)]


def overlong_penalty(length, limit, buffer):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    0 up to limit - buffer, then linear down to -1 at the limit.
    limit 100, buffer 20: length 80 -> 0, 90 -> -0.5, 100 -> -1.
    """
    return min(0.0, (limit - buffer - length) / buffer)
