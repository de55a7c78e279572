"""Absolute-Zero self-play: one model proposes puzzles and solves them.

puzzles    what is proposed and solved, and every reason for refusing a completion
prompts    the six prompts
parse      completions and printed values taken apart
proposals  proposals checked by running them
judge      answers judged
rewards    the paper's equations (2), (3) and (4)
buffers    the three buffers, and programs from files
triples    synthetic programs: a tiny model's warm start, and held-out problems
loop       one step, and the seeds before the first
metrics    what a step logs
"""
