"""Rewards of self-play: equations (2), (3) and (4) of Inoue & Tsuruoka.

How (3) and (4) are mixed is a setting, and so are penalties by kind of error; edit here for
another reward of the proposer.
"""

from settings import read_table

REWARDS = ("eq3", "eq4", "switch", "blend")
SWITCH = 64  # plain "switch": the paper's best step
REFUSED = -1.0  # equations (3) and (4) for a proposal that is not valid


def equation_2(formatted, runnable, correct):
    """A solver's reward: 1 right, 0 wrong, -0.5 when only its form is right, -1 out of form.

    runnable: the answer is a value, or a program that runs. The public implementation gives -0.5 to
    a wrong answer in the right form (--solve_penalties wrong=-0.5); the paper's equation, and its
    text, give it accuracy 0.
    """
    if not formatted:
        return -1.0
    return float(correct) if runnable else -0.5


def equation_3(accuracy):
    """A valid proposal's reward: 1 - accuracy, but -0.5 where solvers are never or always right.

    0.25 -> 0.75; 0 and 1 -> -0.5
    """
    return 1.0 - accuracy if 0 < accuracy < 1 else -0.5


def equation_4(accuracy):
    """A valid proposal's reward: 0.5 + 2 accuracy (1 - accuracy).

    0 -> 0.5, 0.25 -> 0.875, 0.5 -> 1
    """
    return 0.5 + 2 * accuracy * (1 - accuracy)


def proposer_reward(setting, accuracy, step, solver_accuracy):
    """Reward of a valid proposal whose solvers are right with rate `accuracy`.

    setting: --propose_reward.
        eq3, eq4    that equation
        switch:N    (3) up to and with step N, then (4); the paper's best is N = 64
        blend       (1 - w) (3) + w (4), w = solver_accuracy, a moving average: strict while the
                    solver is weak, paying for validity as it grows. The paper proposes to move
                    smoothly with it and does not try.
    """
    kind, switch_step = read_setting(setting)
    if kind == "switch":
        kind = "eq3" if step <= switch_step else "eq4"

    if kind == "eq3":
        return equation_3(accuracy)
    if kind == "eq4":
        return equation_4(accuracy)
    return (1 - solver_accuracy) * equation_3(accuracy) + solver_accuracy * equation_4(accuracy)


def read_penalties(name, text, reasons):
    """--solve_penalties or --propose_penalties -> {reason: reward}.

    reasons: those that there are. SystemExit with one sentence for another one, or for a reward
    above 0. "wrong=-0.5,syntax=-0.8" -> {"wrong": -0.5, "syntax": -0.8}; "" -> {}
    """
    if not text:
        return {}
    penalties = read_table(name, text)
    for reason, reward in penalties.items():
        if reason not in reasons:
            raise SystemExit(f"--{name}: unknown reason {reason!r}; use {', '.join(reasons)}")
        if reward > 0:
            raise SystemExit(f"--{name} {reason}={reward:g}: a penalty is at most 0")
    return penalties


def read_setting(setting):
    """--propose_reward -> (one of REWARDS, last step of equation (3) with switch).

    "switch:100" -> ("switch", 100), "switch" -> ("switch", 64). ValueError for anything else.
    """
    if setting in REWARDS:
        return setting, SWITCH
    kind, _, number = setting.partition(":")
    if kind == "switch" and number.isdecimal():
        return kind, int(number)
    raise ValueError(
        f"unknown --propose_reward {setting!r}: use {', '.join(REWARDS)}, "
        "or switch:N with the last step of eq3"
    )
