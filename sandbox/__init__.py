"""Runs untrusted model-written programs: real interpreters, real limits, no privileges needed.

    job = Job("prolog", {"main.pl": "main :- writeln(42)."})
    with Pool() as pool:
        for result in pool.run([job], deadline=60):
            print(result.status, result.stdout)

`python -m sandbox doctor` says what works on this machine; `python -m sandbox run` runs programs
from the shell.

A job goes this way: pool.py (the trainer's side) sends it through a socket to launcher.py (a
process without the trainer's memory), which forks, locks the child down by isolation.py, has it
become the program, and looks after it by watch.py. languages/ says how to run each language.
"""

from sandbox.jobs import STATUSES, Job, Limits, Result, SandboxError
from sandbox.pool import Pool

__all__ = ["STATUSES", "Job", "Limits", "Pool", "Result", "SandboxError"]
