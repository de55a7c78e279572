"""What this machine lets an unprivileged sandbox do.

Run as `python -I -S probe.py` it tries each means once, in a child of its own, and prints one JSON
object {means: null when it works, else why not}. Everybody else calls `probe()`.
"""

import functools
import json
import os
import subprocess
import sys

LEVELS = ("portable", "kernel", "namespaces")  # weakest first

# What every level needs beyond the one before it.
_NEEDS = {
    "kernel": ("no_new_privs", "landlock", "seccomp"),
    "namespaces": ("pid namespace",),
}


@functools.cache
def probe():
    """{means: None when it works, else the reason}, found out once.

    Besides: "abi", the version of Landlock's interface, and "separate user", whether programs can
    run as a user of their own.
    """
    command = [sys.executable, "-I", "-S", __file__]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        return {
            "seccomp": f"the probe failed: {ran.stderr.strip()[-300:]}",
            "landlock": "",
            "pid namespace": "",
            "separate user": "",
        }
    return json.loads(ran.stdout)


def available_level(found):
    """Strongest level for which everything works, and what the next one lacks.

    found: from `probe`. The latter is a sentence, or None at the strongest level.
    """
    best = "portable"
    for level, needs in _NEEDS.items():
        lacking = [f"{need} ({found[need]})" for need in needs if found.get(need)]
        if lacking:
            return best, f"{level} isolation needs {', '.join(lacking)}"
        best = level
    return best, None


# ---- in the process of its own ----


def main():
    found = {
        "no_new_privs": isolation.attempt(isolation.no_new_privs),
        "landlock": isolation.attempt(_landlock),
        "seccomp": isolation.attempt(_seccomp),
        "pid namespace": isolation.attempt(_pid_namespace),
        "process guard": isolation.attempt(isolation.ask_once),
        "private files": isolation.attempt(_private_files),
        "abi": isolation.landlock_abi(),
        "separate user": isolation.program_user() is not None,
    }
    print(json.dumps(found))


def _landlock():
    isolation.no_new_privs()
    isolation.landlock_restrict(isolation.landlock_ruleset([("/usr", isolation.READ)]))
    try:
        os.listdir("/")
    except PermissionError:
        return
    raise OSError("a restricted process could still list /")


def _seccomp():
    isolation.no_new_privs()
    isolation.seccomp_load(isolation.seccomp_filter(may_fork=False, read_only=False))
    try:
        os.fork()
    except PermissionError:
        return
    raise OSError("a filtered process could still fork")


def _pid_namespace():
    # Root may do without a user namespace, but for containers that took the capability from it.
    if os.geteuid() != 0 or isolation.attempt(_unshare_as_root) is not None:
        isolation.enter_user_namespace(isolation.CLONE_NEWNS)
    pid = isolation.fork_into(isolation.CLONE_NEWPID | isolation.CLONE_NEWIPC)
    if pid == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    if os.waitpid(pid, 0)[1]:
        raise OSError("the child did not become process 1")


def _unshare_as_root():
    isolation.unshare(isolation.CLONE_NEWNS | isolation.CLONE_NEWPID)


def _private_files():
    isolation.private_files("/tmp", 1 << 20, 16, new_user=os.geteuid() != 0)


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import isolation

    main()
