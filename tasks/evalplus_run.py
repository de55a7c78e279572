"""Calls a program's function on every input of an EvalPlus problem, inside the sandbox.

This file runs there by itself, as main.py beside the program (solution.py) and what it is called
with (calls.json). It prints one line of JSON for each call; what the results should be it does not
know. encode() and decode() carry values over the border, as plain data.
"""

import collections.abc
import hashlib
import io
import json
import operator
import signal
import sys
import time
from fractions import Fraction

MARK = "rarecode-result "  # begins a line of a result: the program may print others
LONG = 20_000  # characters of a result
LOADING = 5.0  # seconds of CPU that a program may compute for before it is called


class OutOfTime(BaseException):
    """A call took longer than its limit. No Exception, so that few programs catch it."""


class Nowhere(io.TextIOBase):
    """What the program prints is no result."""

    def write(self, text):
        return len(text)


# ---- values ----


def result(value, longest=float("inf")):
    """(length, what is printed of a value): encode()'s JSON, of a long one its digest.

    Values that Python holds to be equal have the same length and digest. ValueError for one that is
    longer than `longest`.
    """
    exact = json.dumps(encode(value, exact=True))
    if len(exact) > longest:
        raise ValueError("longer than any right result")
    if len(exact) <= LONG:
        return len(exact), encode(value)
    return len(exact), ["long", hashlib.sha256(exact.encode()).hexdigest()]


def encode(value, exact=False):
    """A Python value as JSON, from which decode() makes an equal one.

    What Python holds to be equal may become the same: a subclass its base, keys of a dict a set.
    Anything that is not plain data becomes ["other", name of its type], which equals nothing.
    exact: equal values give equal JSON: 1 for 1.0 and True, sets and dicts in one order.
    """
    if exact and isinstance(value, (bool, float)) and value % 1 == 0:
        value = int(value)
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 4096 else ["int", hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]

    if isinstance(value, list):
        return ["list", *[encode(item, exact) for item in value]]
    if isinstance(value, tuple):
        return ["tuple", *[encode(item, exact) for item in value]]
    if isinstance(value, collections.abc.Set):
        items = [encode(item, exact) for item in value]
        return ["set", *(sorted(items, key=json.dumps) if exact else items)]
    if isinstance(value, dict):
        items = [[encode(key, exact), encode(item, exact)] for key, item in value.items()]
        return ["dict", *(sorted(items, key=json.dumps) if exact else items)]
    if hasattr(value, "as_integer_ratio"):  # Fraction, Decimal
        above, below = value.as_integer_ratio()
        return above if below == 1 else ["ratio", above, below]
    return ["other", type(value).__name__]


def decode(coded):
    """The value of encode()'s JSON.

    Some exception when it is none: the text may come from a program that forges it.
    """
    if not isinstance(coded, list):
        return coded
    kind, *parts = coded
    match kind:
        case "int":
            return int(parts[0], 16)
        case "complex":
            return complex(*parts)
        case "bytes":
            return bytes.fromhex(parts[0])
        case "list":
            return list(map(decode, parts))
        case "tuple":
            return tuple(map(decode, parts))
        case "set":
            return frozenset(map(decode, parts))
        case "dict":
            return {decode(key): decode(item) for key, item in parts}
        case "ratio":
            return Fraction(*map(operator.index, parts))  # of texts it would take "1e999999999"
        case "long":
            return " ".join(map(str, coded))
        case "other":
            return object()
    raise ValueError(f"unknown kind {kind!r}")


# ---- calls ----


def main():
    with open("calls.json", encoding="utf-8") as file:
        wanted = json.load(file)
    stdout = sys.stdout
    sys.stdout = sys.stderr = Nowhere()
    signal.signal(signal.SIGPROF, run_out)
    signal.signal(signal.SIGALRM, run_out)

    def say(row):
        # The newline ends whatever the program has written past sys.stdout.
        print(f"\n{MARK}{json.dumps(row)}", file=stdout, flush=True)

    try:
        with limited(LOADING):
            import solution

            function = getattr(solution, wanted["entry"])
        for coded, limit in wanted["calls"]:
            arguments = decode(coded)
            started = time.process_time()
            with limited(limit):
                value = function(*arguments)
            seconds = time.process_time() - started
            say([seconds, *result(value, wanted["longest"])])
    except BaseException as error:  # SystemExit, too: nothing that a program does is a pass
        say([type(error).__name__])
        sys.exit(1)


class limited:
    """At most so many seconds of CPU inside, and 5 times as many by the clock, if it sleeps."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        signal.setitimer(signal.ITIMER_REAL, 5 * self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_out(*_):
    raise OutOfTime


if __name__ == "__main__":
    main()
