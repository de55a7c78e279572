"""Measurements beside floors and peers: python -m bench kernels|sampler|step|sandbox [options]. Each prints a table and a last line of JSON.

Each bench lives next to what it measures: kernels/bench.py, bench_sampler.py, bench_step.py, sandbox/bench.py. BENCHMARKS.md records the tables.
"""

import importlib
import sys

PARTS = {
    "kernels": "bench.kernels",
    "sampler": "bench.sampler",
    "sandbox": "bench.sandbox",
    "step": "bench.step",
}


def main(arguments):
    if not arguments or arguments[0] not in PARTS:
        raise SystemExit(f"usage: python -m bench {'|'.join(PARTS)} [--help]")
    try:
        importlib.import_module(PARTS[arguments[0]]).main(arguments[1:])
    except (ValueError, OSError) as problem:  # no such checkpoint, no such data: one sentence
        raise SystemExit(f"bench: {problem}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
