"""refuse.py landlock|namespaces COMMAND...: run a command on a kernel that has no Landlock (ENOSYS), or that refuses namespaces and
mounts as Docker's default profile does (EPERM)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "sandbox"))

import isolation  # noqa: E402

program = [isolation._op(isolation._LOAD, 0)]
if sys.argv[1] == "landlock":
    for name in ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"):
        program += isolation._refuse(name, isolation._ENOSYS)
else:
    for name in ("unshare", "mount", "setns", "pivot_root"):
        program += isolation._refuse(name)
    program += isolation._refuse("clone3", isolation._ENOSYS) + isolation._clone(may_fork=True)
isolation.no_new_privs()
isolation.seccomp_load(b"".join([*program, isolation._op(isolation._RETURN, isolation._ALLOW)]))
os.execv(sys.argv[2], sys.argv[2:])
