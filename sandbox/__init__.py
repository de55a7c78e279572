"""Runs untrusted model-written programs: real interpreters, real limits, isolation without privileges.

with Pool() as pool:
    for result in pool.run([Job("prolog", {"main.pl": "main :- writeln(42)."})], deadline=60):
        print(result.status, result.stdout)

`python -m sandbox doctor` says what works on this machine; `python -m sandbox run` runs programs from the shell.
"""

from sandbox.jobs import STATUSES, Job, Limits, Result, SandboxError
from sandbox.pool import Pool

__all__ = ["STATUSES", "Job", "Limits", "Pool", "Result", "SandboxError"]
