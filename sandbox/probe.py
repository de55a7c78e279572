"""What this machine lets an unprivileged sandbox do: each means is tried once, in a child of a process of its own.

Run as `python -I -S probe.py`; prints one JSON object {means: null when it works, else why not}. Called through `probe()`.
"""

import functools
import json
import os
import subprocess
import sys

LEVELS = ("portable", "kernel", "namespaces")  # weakest first


@functools.cache
def probe():
    """{"landlock": reason or None, "seccomp": ..., "pid namespace": ..., "user": ids programs can run as or None, "abi": ...}."""
    ran = subprocess.run(
        [sys.executable, "-I", "-S", __file__],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if ran.returncode:
        return {
            "seccomp": f"the probe failed: {ran.stderr.strip()[-300:]}",
            "landlock": "",
            "pid namespace": "",
            "separate user": "",
        }
    return json.loads(ran.stdout)


def available_level(found):
    """Strongest level for which everything works, and a sentence about what the next one lacks (or None)."""
    for level, needs in (
        ("portable", ("no_new_privs", "landlock", "seccomp")),
        ("kernel", ("pid namespace",)),
    ):
        lacking = [f"{need} ({found[need]})" for need in needs if found.get(need)]
        if lacking:
            return level, f"{LEVELS[LEVELS.index(level) + 1]} isolation needs {', '.join(lacking)}"
    return "namespaces", None


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
    isolation.seccomp_load(isolation.seccomp_filter(may_fork=False))
    try:
        os.fork()
    except PermissionError:
        return
    raise OSError("a filtered process could still fork")


def _pid_namespace():
    if os.geteuid() != 0 or isolation.attempt(
        lambda: isolation.unshare(isolation.CLONE_NEWNS | isolation.CLONE_NEWPID)
    ):
        isolation.enter_user_namespace(isolation.CLONE_NEWNS)
    pid = isolation.fork_into(isolation.CLONE_NEWPID | isolation.CLONE_NEWIPC)
    if pid == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    if os.waitpid(pid, 0)[1]:
        raise OSError("the child did not become process 1")


def _private_tmpfs():
    if os.geteuid() != 0:
        isolation.enter_user_namespace(isolation.CLONE_NEWNS)
    else:
        isolation.unshare(isolation.CLONE_NEWNS)
    isolation.private_tmpfs("/tmp", 1 << 20, 16)


def main():
    reasons = {
        "no_new_privs": isolation.attempt(isolation.no_new_privs),
        "landlock": isolation.attempt(_landlock),
        "seccomp": isolation.attempt(_seccomp),
        "pid namespace": isolation.attempt(_pid_namespace),
        "process guard": isolation.attempt(isolation.ask_once),
        "private tmpfs": isolation.attempt(_private_tmpfs),
    }
    print(
        json.dumps(
            reasons
            | {
                "abi": isolation.landlock_abi(),
                "separate user": isolation.program_user() is not None,
            }
        )
    )


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import isolation

    main()
