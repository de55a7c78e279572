"""How this process uses a CPU. Imported by every script before torch, which loads OpenMP.

Waiting threads: torch starts hundreds of parallel loops per decode step. With
OMP_WAIT_POLICY=passive a thread sleeps between two of them, and waking it costs some 80 us: a step
of the 135M model took 103 ms instead of 62 on 2 cores. libgomp's default, 300,000 looks before it
sleeps, starves the sandbox's programs on the same cores (50 s of sampling instead of 6). 20,000
looks, about a millisecond, cover the gaps of a step (in an hour of GRPO with Prolog beside it the
wait for programs was 0.0 s a step).

Freed memory: by default glibc hands every freed block of some size back to the kernel and gets it
again page by page, which was a sixth of an update's time (300,000 page faults in 7.5 s). Here
blocks up to 32 MB, the most that glibc allows, stay in the process until give_back().
"""

import ctypes
import os

# OpenMP reads these when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # libgomp, Linux: goes before the policy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # other OpenMP libraries

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

libc = ctypes.CDLL(None) if os.name == "posix" else None
if hasattr(libc, "mallopt"):
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back():
    """Hand what is freed back to the kernel.

    Before the update of a 0.5B model it was 2.9 GB in blocks that the update's larger ones cannot
    use: its peak was 11.0 GB.
    """
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
