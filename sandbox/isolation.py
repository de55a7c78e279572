"""What the Linux kernel offers an unprivileged process to lock itself down: Landlock (files), seccomp (system calls), namespaces.

Standard library only: the launcher imports it. Nothing here needs privileges but `private_tmpfs`. Every call that fails raises OSError.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
import sys

from syscalls import AUDIT_ARCH, DENIED, NUMBER

LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)
_libc_holding_gil = ctypes.PyDLL(
    None, use_errno=True
)  # for clone: the child must own the interpreter's lock

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x08000000, 0x10000000, 0x20000000
_CLONE_THREAD, _CLONE_NEW_ANY = 0x10000, 0x7E020000
_PDEATHSIG, _DUMPABLE, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38


def _checked(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(name, *arguments):
    number = NUMBER.get(name)
    if number is None:
        raise OSError(38, f"{name}: no such system call on this machine")
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), name)


def _prctl(option, value, what):
    _checked(
        _libc.prctl(
            option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)
        ),
        what,
    )


def die_with_parent():
    _prctl(_PDEATHSIG, 9, "PR_SET_PDEATHSIG")


def set_dumpable(value):
    """0: no other process of this user may trace this one or read its memory, environment or descriptors in /proc."""
    _prctl(_DUMPABLE, value, "PR_SET_DUMPABLE")


def become_subreaper():
    """Orphans of a job come to this process instead of process 1, so that it can reap them."""
    _prctl(_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def no_new_privs():
    _prctl(_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def drop_capabilities():
    """Give up every capability. A later exec cannot bring one back, because of no_new_privs."""
    header = struct.pack("Ii", 0x20080522, 0)
    _syscall("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


# ---- Landlock: files ----

_EXECUTE, _WRITE, _READ, _LIST, _REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE = (
    1 << bit for bit in (0, 1, 2, 3, 4, 5, 7, 8)
)
_MAKE_LINK, _REFER, _TRUNCATE, _IOCTL = (1 << bit for bit in (12, 13, 14, 15))
_ON_FILES = (
    _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
)  # the other rights only make sense on folders
_WORK = (
    _WRITE
    | _READ
    | _LIST
    | _REMOVE_DIR
    | _REMOVE_FILE
    | _MAKE_DIR
    | _MAKE_FILE
    | _MAKE_LINK
    | _REFER
    | _TRUNCATE
)
READ, EXECUTE, WORK, WRITE = _READ | _LIST, _EXECUTE | _READ, _WORK, _WRITE | _READ


def landlock_abi():
    """Version of Landlock's interface: 0 = none, 1 = Linux 5.13, 3 = 6.2 (truncation), 6 = 6.12 (signals, abstract sockets)."""
    try:
        return _syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock_ruleset(rules):
    """Descriptor of a ruleset that refuses every file but those under [(path, rights)]. Paths that do not exist are passed over."""
    abi = landlock_abi()
    handled = (
        (1 << 13) - 1
        | (_REFER if abi >= 2 else 0)
        | (_TRUNCATE if abi >= 3 else 0)
        | (_IOCTL if abi >= 5 else 0)
    )
    network, scopes = 3, 3  # TCP bind and connect; abstract sockets and signals
    attributes = struct.pack("QQQ", handled, network, scopes)[
        : 24 if abi >= 6 else 16 if abi >= 4 else 8
    ]
    ruleset = _syscall(
        "landlock_create_ruleset",
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
        ctypes.c_uint32(0),
    )
    for path, rights in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= handled if os.path.isdir(path) else handled & _ON_FILES
        rule = struct.pack("=Qi", rights, place)
        try:
            _syscall(
                "landlock_add_rule",
                ctypes.c_int(ruleset),
                ctypes.c_int(1),
                ctypes.c_char_p(rule),
                ctypes.c_uint32(0),
            )
        finally:
            os.close(place)
    return ruleset


def landlock_restrict(ruleset):
    """Apply a ruleset to this process for good; needs no_new_privs()."""
    _syscall("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))


# ---- seccomp: system calls ----

_LOAD, _IF_EQUAL, _IF_ANY_BIT, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO, _ASK = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_EPERM, _EACCES, _ENOSYS = _ERRNO | 1, _ERRNO | 13, _ERRNO | 38
_PID = 0x7FABCDEF  # stands for the program's own process id, which is known after the fork only


def _op(code, value, when_true=0, when_false=0):
    return struct.pack("HBBI", code, when_true, when_false, value)


def _load_argument(index):
    """The low half of an argument, which is all of an int (both machines are little-endian); index + 0.5 is the high half of a pointer."""
    return _op(_LOAD, int(16 + 8 * index))


def _refuse(name, verdict=_EPERM):
    return [_op(_IF_EQUAL, NUMBER[name], 0, 1), _op(_RETURN, verdict)] if name in NUMBER else []


def _when(name, body):
    """`body`, which must end in a return, for one system call only."""
    return [_op(_IF_EQUAL, NUMBER[name], 0, len(body)), *body]


def _only(name, *allowed):
    """Allow a call only when argument index is one of values, for every (index, values) of `allowed`."""
    body = []
    for index, values in allowed:
        body.append(_load_argument(index))
        body += [
            _op(_IF_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)
        ]
        body.append(_op(_RETURN, _EPERM))
    return _when(name, [*body, _op(_RETURN, _ALLOW)])


def _never(name, index, values):
    """Refuse a call when argument index is one of values."""
    tests = [_op(_IF_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return _when(name, [_load_argument(index), *tests, _op(_RETURN, _ALLOW), _op(_RETURN, _EPERM)])


def _clone(may_fork, granted=_ALLOW):
    """No new namespaces; threads only, unless the program may start processes."""
    forks = [] if may_fork else [_op(_IF_ANY_BIT, _CLONE_THREAD, 1, 0), _op(_RETURN, _EPERM)]
    namespaces = [_op(_IF_ANY_BIT, _CLONE_NEW_ANY, 0, 1), _op(_RETURN, _EPERM)]
    return _when("clone", [_load_argument(0), *forks, *namespaces, _op(_RETURN, granted)])


def seccomp_filter(may_fork, ask=False):
    """Filter program (bytes) that `seccomp_load` applies. ask: the launcher grants every new process and thread, see `answer`.

    A list of refusals, not of permissions: two dozen runtimes use some 150 different calls, other versions others. What it must keep is
    narrow: no network, no way out of the process group, no effect on any other process, no object that outlives the program, no
    change to files by a path that Landlock does not govern.
    """
    arch, x32 = AUDIT_ARCH[os.uname().machine], 0x40000000
    program = [_op(_LOAD, 4), _op(_IF_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, 0)]
    if os.uname().machine == "x86_64":
        program += [_op(_IF_AT_LEAST, x32, 0, 1), _op(_RETURN, _KILL)]
    for name in DENIED:
        program += _refuse(name)
    for name in (
        "clone3",
        "memfd_create",
    ):  # libc falls back to clone, whose flags can be read; a memfd could be executed
        program += _refuse(name, _ENOSYS)
    granted = _ASK if ask else _ALLOW
    for name in ("fork", "vfork"):
        program += _refuse(name, granted if may_fork else _EPERM)
    program += _clone(may_fork, granted)
    program += _only("kill", (0, (0, _PID))) + _only("tgkill", (0, (_PID,)))
    program += _only("prlimit64", (0, (0, _PID))) + _only("sched_setaffinity", (0, (0, _PID)))
    program += _only(
        "setpriority", (0, (0,)), (1, (0,))
    )  # PRIO_USER with who 0 would renice the trainer
    program += _only(
        "socketpair", (0, (1,)), (1, (1, 0x801, 0x80001, 0x80801))
    )  # a datagram pair could send to a named socket
    program += _never(
        "fcntl", 1, (8, 10, 15)
    )  # F_SETOWN, F_SETSIG, F_SETOWN_EX: any signal to any process of this user
    program += _never(
        "ioctl", 1, (0x8901, 0x8902, 0x5412)
    )  # FIOSETOWN, SIOCSPGRP: the same; TIOCSTI: type into a terminal
    program += _only("utimensat", (1, (0,)), (1.5, (0,)))  # path NULL: by descriptor only
    return b"".join([*program, _op(_RETURN, _ALLOW)])


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def seccomp_load(program, ask=False):
    """Apply a filter to this process for good; needs no_new_privs(). ask: returns the descriptor for `answer`, else None."""
    program = program.replace(struct.pack("I", _PID), struct.pack("I", os.getpid()))
    filter_program = _FilterProgram(len(program) // 8, program)
    mode, new_listener = 1, 8
    descriptor = _syscall(
        "seccomp",
        ctypes.c_uint(mode),
        ctypes.c_uint(new_listener if ask else 0),
        ctypes.byref(filter_program),
    )
    return descriptor if ask else None


def ask_once():
    """Fails where something above this process answers for its system calls already (some container managers)."""
    no_new_privs()
    os.close(seccomp_load(seccomp_filter(may_fork=True, ask=True), ask=True))


def answer(descriptor, allowed):
    """Grant or refuse (EAGAIN) what a program that is bound by an `ask` filter waits for: `allowed(is_thread)` decides.

    The limit on processes of the user (RLIMIT_NPROC) counts all that the user runs, and a fork bomb outruns any watching from outside.
    """
    request = bytearray(
        80
    )  # struct seccomp_notif: id, pid, flags, then nr, arch, instruction pointer, six arguments
    with contextlib.suppress(FileNotFoundError):  # the asking process was killed meanwhile
        fcntl.ioctl(descriptor, 0xC0502100, request)
        (identity,), (number, _, _, flags) = (
            struct.unpack_from("Q", request),
            struct.unpack_from("iIQQ", request, 16),
        )
        yes = allowed(number == NUMBER["clone"] and bool(flags & _CLONE_THREAD))
        go_on, again = 1, 11
        fcntl.ioctl(
            descriptor,
            0xC0182101,
            struct.pack("QqiI", identity, 0, 0 if yes else -again, go_on if yes else 0),
        )


# ---- namespaces ----


def unshare(flags):
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def enter_user_namespace(flags=0):
    """A user namespace of one's own, in which this process keeps its user and group id and has every capability."""
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | flags)
    for name, text in (
        ("uid_map", f"{user} {user} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def private_tmpfs(folder, size, files):
    """Mount an empty file system of `size` bytes and `files` inodes on `folder`, seen by this process and its children only."""
    private, recursive, nosuid, nodev = 1 << 18, 1 << 14, 2, 4
    options = f"size={size},nr_inodes={files},mode=0755"
    _mount("none", "/", None, private | recursive, None)
    _mount("tmpfs", folder, "tmpfs", nosuid | nodev, options)


def unmount(folder):
    """Take away a private_tmpfs, with all that is in it."""
    detach = 2
    _checked(_libc.umount2(os.fsencode(folder), detach), f"umount {folder}")


def _mount(source, target, kind, flags, options):
    encoded = [
        None if word is None else os.fsencode(word) for word in (source, target, kind, options)
    ]
    _checked(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def fork_into(flags):
    """Like os.fork(), with the child as process 1 of new namespaces. Only for a process without threads."""
    arguments = [
        ctypes.c_long(NUMBER["clone"]),
        ctypes.c_ulong(flags | 17),
        *[ctypes.c_ulong(0)] * 4,
    ]
    return _checked(_libc_holding_gil.syscall(*arguments), "clone")


def sealed_input(data):
    """Descriptor from which a program can read `data`, and that it cannot write."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data) if data else None
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


# ---- trying ----


def attempt(action):
    """None when `action` works in a child, else the reason."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os.write(sender, str(error).encode()[:500])
        finally:
            os._exit(1)
    os.close(sender)
    reason = os.read(receiver, 1000).decode()
    os.close(receiver)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if status == 0 else reason or f"ended with {status}"


def program_user():
    """A user id that nobody has, for the programs of this process when it is root; None when not root or not allowed.

    2,000,000,000 + own process id: unique on the machine, and outside the ranges of systemd and of distributions. Where only some ids are
    mapped (rootless containers): 60,000 + process id modulo 5,000.
    """
    if not hasattr(os, "setresuid") or os.geteuid() != 0:
        return None
    for user in (2_000_000_000 + os.getpid(), 60_000 + os.getpid() % 5000):
        if not attempt(
            lambda user=user: (
                os.setgroups([]),
                os.setresgid(user, user, user),
                os.setresuid(user, user, user),
            )
        ):
            return user
    return None
