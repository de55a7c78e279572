"""Memory of this process and of its machine: what it has, what it may still have, its peak.

The limit is whichever is less: what Linux says is available, or what is left of a control group's
limit (containers, SLURM, systemd), behind which the kernel kills.
"""

import os
import resource
import sys
from pathlib import Path

import torch

# Where control groups are mounted, by version: limit, usage, and the line of memory.stat with what
# the usage counts although the kernel takes it back when it is needed (read files).
GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def free_bytes(device):
    """Memory that this rank can have now, beside what it has.

    On CUDA what is free there; on CPU its share of what the machine has at hand, or, where no
    file says that (macOS), of half of all memory.
    """
    if device.type == "cuda":
        # What torch has reserved and does not use is free for us too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = at_hand()
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def at_hand(root="/"):
    """Bytes that all processes here can still have, or None where no file says it.

    root: where proc/ and sys/ are. 8 GB available, a limit of 4 GB with 1 GB in use -> 3 GB.
    """
    found = [available(root), *left_of_groups(root)]
    known = [size for size in found if size is not None]
    return max(0, min(known)) if known else None


def available(root):
    """MemAvailable of Linux, or None."""
    lines = read_lines(Path(root, "proc/meminfo"))
    return next((size << 10 for name, size in lines if name == "MemAvailable:"), None)


def left_of_groups(root):
    """What is left of the limit of every control group that this process is in."""
    memberships = Path(root, "proc/self/cgroup")
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return []

    found = []
    for line in lines:  # "0::/user.slice" or, of version 1, "4:memory:/docker/1f"
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, *names = GROUPS[1 if controllers else 2]
        top = Path(root, mounted)
        folder = top / path.lstrip("/")
        # In a container the path can be one of the host's: then its group is mounted as the top.
        for group in (folder, *folder.parents) if folder.exists() else (top,):
            if group == top or top in group.parents:
                found.append(left_of_group(group, *names))
    return found


def left_of_group(folder, limit, usage, taken_back):
    """Bytes left of one group's limit, or None where it has none."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
    except OSError:
        return None
    if most == "max":
        return None
    sizes = dict(read_lines(folder / "memory.stat"))
    return int(most) - used + sizes.get(taken_back, 0)


def read_lines(path):
    """[(first word, the number behind it)] of a file of the kernel; [] where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [(found[0], int(found[1])) for found in words if len(found) > 1]


def resident_bytes():
    """Memory that this process has now (0 where no file says it)."""
    pages = read_lines(Path("/proc/self/statm"))  # all, resident, shared ...
    return pages[0][1] * os.sysconf("SC_PAGE_SIZE") if pages else 0


def peak_bytes(device):
    """Most memory that this process has held: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
