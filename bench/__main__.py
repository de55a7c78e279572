"""Measurements beside floors and peers: python -m bench kernels|sampler|host|update|step|sandbox|peer [options].

Each prints a table and a last line of JSON. BENCHMARKS.md records the tables.
"""

import importlib
import sys

PARTS = ("kernels", "sampler", "host", "update", "step", "sandbox", "peer")


def main(arguments):
    if not arguments or arguments[0] not in PARTS:
        raise SystemExit(f"usage: python -m bench {'|'.join(PARTS)} [--help]")
    part = importlib.import_module(f"bench.{arguments[0]}")
    try:
        part.main(arguments[1:])
    except (ValueError, OSError) as problem:  # no such checkpoint, no such data: one sentence
        raise SystemExit(f"bench: {problem}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
