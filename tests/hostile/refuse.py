"""refuse.py landlock|namespaces COMMAND...: run a command on a kernel that offers less.

landlock: as without Landlock (ENOSYS). namespaces: as under Docker's default profile, which refuses
namespaces and mounts (EPERM).
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "sandbox"))

import isolation

program = [isolation.instruction(isolation.LOAD, 0)]
if sys.argv[1] == "landlock":
    for name in ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"):
        program += isolation.refuse(name, isolation.ENOSYS)
else:
    for name in ("unshare", "mount", "setns", "pivot_root"):
        program += isolation.refuse(name)
    program += isolation.refuse("clone3", isolation.ENOSYS)
    program += isolation.allow_clone(may_fork=True)
program.append(isolation.instruction(isolation.RETURN, isolation.ALLOW))

isolation.no_new_privs()
isolation.seccomp_load(b"".join(program))
os.execv(sys.argv[2], sys.argv[2:])
