"""refuse.py landlock|namespaces COMMAND...: run a command on a kernel that has no Landlock (ENOSYS), or that refuses namespaces and
mounts as Docker's default profile does (EPERM)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "sandbox"))

import kernel  # noqa: E402

program = [kernel._op(kernel._LOAD, 0)]
if sys.argv[1] == "landlock":
    for name in ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"):
        program += kernel._refuse(name, kernel._ENOSYS)
else:
    for name in ("unshare", "mount", "setns", "pivot_root"):
        program += kernel._refuse(name)
    program += kernel._refuse("clone3", kernel._ENOSYS) + kernel._clone(may_fork=True)
kernel.no_new_privs()
kernel.seccomp_load(b"".join([*program, kernel._op(kernel._RETURN, kernel._ALLOW)]))
os.execv(sys.argv[2], sys.argv[2:])
