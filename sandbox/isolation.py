"""What the Linux kernel offers an unprivileged process to lock itself down.

Landlock (files), seccomp (system calls) and namespaces. Standard library only: the launcher imports
it. Nothing here needs privileges but a mount without a user namespace. Every call that fails raises
OSError.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import struct
import sys

from syscalls import AUDIT_ARCH, DENIED, NUMBER, ON_FILES_NUMBERS, UNSUPPORTED_NUMBERS

LINUX = sys.platform == "linux"

_libc = ctypes.CDLL(None, use_errno=True)
# for clone: the child must own the interpreter's lock
_libc_holding_gil = ctypes.PyDLL(None, use_errno=True)


def _checked(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(name, *arguments):
    number = NUMBER.get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name}: no such system call on this machine")
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), name)


# ---- this process ----


def die_with_parent():
    """Have this process killed when the one that started it ends."""
    _prctl("PR_SET_PDEATHSIG", 1, signal.SIGKILL)


def set_dumpable(value):
    """0: no other process of this user may trace this one or read its /proc entries.

    Those are its memory, environment and descriptors.
    """
    _prctl("PR_SET_DUMPABLE", 4, value)


def become_subreaper():
    """Orphans of a job come to this process instead of process 1, so that it can reap them."""
    _prctl("PR_SET_CHILD_SUBREAPER", 36, 1)


def no_huge_pages():
    """No page of 2 MiB, of which a program could hold one byte where no limit sees it.

    For good, the children included: the filter refuses to take it back.
    """
    _prctl("PR_SET_THP_DISABLE", 41, 1)


def no_new_privs():
    """No exec of this process or its children can gain rights, set-user-id programs included."""
    _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)


def _prctl(name, option, value):
    zeros = [ctypes.c_ulong(0)] * 3
    _checked(_libc.prctl(option, ctypes.c_ulong(value), *zeros), name)


def drop_capabilities():
    """Give up every capability. A later exec cannot bring one back, because of no_new_privs."""
    version_3 = 0x20080522
    this_process = 0
    header = struct.pack("Ii", version_3, this_process)
    none = bytes(24)
    _syscall("capset", ctypes.c_char_p(header), ctypes.c_char_p(none))


# ---- Landlock: files ----

_EXECUTE = 1 << 0
_WRITE = 1 << 1
_READ = 1 << 2
_LIST = 1 << 3
_REMOVE_DIR = 1 << 4
_REMOVE_FILE = 1 << 5
_MAKE_DIR = 1 << 7
_MAKE_FILE = 1 << 8
_MAKE_LINK = 1 << 12
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_IOCTL = 1 << 15

_FIRST_RIGHTS = (1 << 13) - 1  # those of the first version of the interface
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL  # the rest make sense on folders only
_REMOVE = _REMOVE_DIR | _REMOVE_FILE
_MAKE = _MAKE_DIR | _MAKE_FILE | _MAKE_LINK

READ = _READ | _LIST
EXECUTE = _EXECUTE | _READ
WORK = _WRITE | _READ | _LIST | _REMOVE | _MAKE | _REFER | _TRUNCATE
DEVICE = _WRITE | _READ | _IOCTL  # seccomp leaves the ioctls that ask what kind of device it is


def landlock_abi():
    """Version of Landlock's interface.

    0: none. 1: Linux 5.13. 3: 6.2 (truncation). 6: 6.12 (signals, abstract sockets).
    """
    no_attributes, no_size = None, ctypes.c_size_t(0)
    ask_for_version = ctypes.c_uint32(1)
    try:
        return _syscall("landlock_create_ruleset", no_attributes, no_size, ask_for_version)
    except OSError:
        return 0


def landlock_ruleset(rules):
    """Descriptor of a ruleset that refuses every file but those below the paths of some rules.

    rules: [(path, rights)]. Paths that do not exist are passed over.
    """
    abi = landlock_abi()
    handled = _FIRST_RIGHTS
    if abi >= 2:
        handled |= _REFER
    if abi >= 3:
        handled |= _TRUNCATE
    if abi >= 5:
        handled |= _IOCTL

    # struct landlock_ruleset_attr has grown: an older kernel refuses a longer one
    network, scopes = 3, 3  # TCP bind and connect; abstract sockets and signals
    size = 8
    if abi >= 4:
        size = 16
    if abi >= 6:
        size = 24
    attributes = struct.pack("QQQ", handled, network, scopes)[:size]

    no_flags = ctypes.c_uint32(0)
    ruleset = _syscall(
        "landlock_create_ruleset", ctypes.c_char_p(attributes), ctypes.c_size_t(size), no_flags
    )
    for path, rights in rules:
        _add_rule(ruleset, path, rights & handled)
    return ruleset


@functools.cache
def _place(path):
    """Descriptor of a path, which stays open; None when it does not exist.

    A rule is of an inode, and where memory is short the kernel forgets the inodes that nobody has
    open. In /proc, and for files of several names in an overlay, the name then gets a new one, to
    which the rule does not apply: every later Julia would abort.
    """
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None


def _add_rule(ruleset, path, rights):
    place = _place(path)
    if place is None:
        return
    if not os.path.isdir(path):
        rights &= _ON_FILES

    path_beneath, no_flags = ctypes.c_int(1), ctypes.c_uint32(0)
    rule = ctypes.c_char_p(struct.pack("=Qi", rights, place))
    _syscall("landlock_add_rule", ctypes.c_int(ruleset), path_beneath, rule, no_flags)


def landlock_restrict(ruleset):
    """Apply a ruleset to this process for good; needs no_new_privs()."""
    _syscall("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))


# ---- seccomp: system calls ----
# A filter is a program for the kernel's packet-filter machine (BPF), 8 bytes an instruction. It
# reads struct seccomp_data: number of the call at 0, architecture at 4, six arguments of 8 bytes
# from 16 on.

LOAD, RETURN = 0x20, 0x06
_AND, _JUMP = 0x54, 0x05
_IF_EQUAL, _IF_ANY_BIT, _IF_AT_LEAST = 0x15, 0x45, 0x35
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ASK = 0x7FC00000
_ERRNO = 0x00050000
_EPERM = _ERRNO | errno.EPERM
ENOSYS = _ERRNO | errno.ENOSYS
_ENOTTY = _ERRNO | errno.ENOTTY
_EOPNOTSUPP = _ERRNO | errno.EOPNOTSUPP

_PID = 0x7FABCDEF  # stands for the program's own process id, which is known after the fork only

CLONE_NEWNS = 0x20000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
_CLONE_THREAD = 0x10000
_CLONE_NEW_ANY = 0x7E020000


# Of prctl: PDEATHSIG (a program must not outlive its launcher), DUMPABLE (the launcher must be able
# to read what it did), SECCOMP, MM, CHILD_SUBREAPER, THP_DISABLE, SCHED_CORE, MEMORY_MERGE.
_PRCTL_REFUSED = (1, 4, 22, 35, 36, 41, 62, 67)

# Of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX send any signal to any process of this user; F_SETLEASE
# delays who opens a file, F_NOTIFY is an older inotify, of F_SETPIPE_SZ all pipes of a user share a
# limit.
_FCNTL_REFUSED = (8, 10, 15, 1024, 1026, 1031)

# Of the terminal's ioctls, which are also those of pipes and sockets: TIOCSTI and TIOCLINUX type
# into a terminal, TIOCSETD loads parts of the kernel.
_TERMINAL, _TERMINAL_REFUSED = 0x5400, (0x5412, 0x541C, 0x5423)
_SHARED_ANONYMOUS = 0x21  # of mmap: both bits


def seccomp_filter(may_fork, read_only):
    """Filter program (bytes) that `seccomp_load` applies.

    may_fork: the program may start processes, not threads only.
    read_only: it sees all but its own files on read-only mounts, see `private_files`.

    A list of refusals, not of permissions: two dozen runtimes use some 150 different calls, other
    versions others. What it must keep is narrow: no network, no way out of the process group, no
    effect on any other process, no object that outlives the program, nothing held that no limit
    counts or that all programs of a user share, no change to files that Landlock does not govern.
    """
    machine = os.uname().machine
    program = [
        instruction(LOAD, _ARCHITECTURE),
        instruction(_IF_EQUAL, AUDIT_ARCH[machine], 1, 0),
        instruction(RETURN, _KILL),
        instruction(LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the same calls under the numbers of the x32 interface
        program += [instruction(_IF_AT_LEAST, 0x40000000, 0, 1), instruction(RETURN, _KILL)]

    for name in DENIED:
        program += refuse(name)
    for name in UNSUPPORTED_NUMBERS:
        program += refuse(name, _EOPNOTSUPP)
    program += refuse("clone3", ENOSYS)  # libc falls back to clone, whose flags can be read
    program += refuse("memfd_create", ENOSYS)  # a memfd could be executed

    # New processes and threads.
    for name in ("fork", "vfork"):
        program += refuse(name, ALLOW if may_fork else _EPERM)
    program += allow_clone(may_fork)

    # Calls that reach other processes: on the program itself only.
    program += _only("kill", (0, (0, _PID)))
    program += _only("tgkill", (0, (_PID,)))
    program += _only("prlimit64", (0, (0, _PID)))
    program += _only("sched_setaffinity", (0, (0, _PID)))
    # PRIO_USER with who 0 would renice the trainer
    program += _only("setpriority", (0, (0,)), (1, (0,)))

    # AF_UNIX streams, with any flags: a datagram pair could send to a named socket
    program += _only("socketpair", (0, (1,)), (1, (1, 0x801, 0x80001, 0x80801)))
    program += _never("prctl", 0, _PRCTL_REFUSED)
    program += _never("fcntl", 1, _FCNTL_REFUSED)
    program += _never("fadvise64", 3, (4,))  # DONTNEED: take a file out of everybody's memory
    program += _terminal_ioctls()
    program += _no_shared_memory()

    # Changes to files, of which a normal user owns more than the program's.
    if not read_only:
        for name in ON_FILES_NUMBERS:
            program += refuse(name)
    return b"".join([*program, instruction(RETURN, ALLOW)])


def ask_filter():
    """Filter program (bytes): the launcher grants every new process and thread, see `answer`.

    Beside `seccomp_filter`, before it: what that refuses nobody is asked for.
    """
    program = [instruction(LOAD, _NUMBER)]
    for name in ("fork", "vfork", "clone"):
        program += refuse(name, _ASK)
    return b"".join([*program, instruction(RETURN, ALLOW)])


def instruction(code, value, when_true=0, when_false=0):
    """One instruction; when_true, when_false: how many of the next ones a test jumps over."""
    return struct.pack("HBBI", code, when_true, when_false, value)


def refuse(name, verdict=_EPERM):
    """A verdict on every use of a system call; nothing where this machine has no such call."""
    if name not in NUMBER:
        return []
    return [instruction(_IF_EQUAL, NUMBER[name], 0, 1), instruction(RETURN, verdict)]


def allow_clone(may_fork):
    """No new namespaces; threads only, unless the program may start processes."""
    body = [_load_argument(0)]
    if not may_fork:
        body += [instruction(_IF_ANY_BIT, _CLONE_THREAD, 1, 0), instruction(RETURN, _EPERM)]
    body += [instruction(_IF_ANY_BIT, _CLONE_NEW_ANY, 0, 1), instruction(RETURN, _EPERM)]
    return _when("clone", [*body, instruction(RETURN, ALLOW)])


def _terminal_ioctls():
    """The ioctls of terminals, pipes and sockets; those of file systems can change any file."""
    refused = _skip_when_one_of(_TERMINAL_REFUSED)
    body = [
        _load_argument(1),
        *refused,
        instruction(_JUMP, 1),
        instruction(RETURN, _EPERM),
        instruction(_AND, 0xFF00),
        instruction(_IF_EQUAL, _TERMINAL, 1, 0),
        instruction(RETURN, _ENOTTY),
        instruction(RETURN, ALLOW),
    ]
    return _when("ioctl", body)


def _no_shared_memory():
    """No memory that is shared and of no file.

    All of it stays while one page is mapped, and only mapped pages count.
    """
    body = [
        _load_argument(3),
        instruction(_AND, _SHARED_ANONYMOUS),
        instruction(_IF_EQUAL, _SHARED_ANONYMOUS, 0, 1),
        instruction(RETURN, _EPERM),
        instruction(RETURN, ALLOW),
    ]
    return _when("mmap", body)


def _only(name, *allowed):
    """Allow a call only when argument index is one of values, for every (index, values)."""
    body = []
    for index, values in allowed:
        body += [_load_argument(index), *_skip_when_one_of(values), instruction(RETURN, _EPERM)]
    return _when(name, [*body, instruction(RETURN, ALLOW)])


def _never(name, index, values):
    """Refuse a call when argument index is one of values."""
    body = [_load_argument(index), *_skip_when_one_of(values)]
    return _when(name, [*body, instruction(RETURN, ALLOW), instruction(RETURN, _EPERM)])


def _when(name, body):
    """`body`, which must end in a return, for one system call only."""
    return [instruction(_IF_EQUAL, NUMBER[name], 0, len(body)), *body]


def _load_argument(index):
    """The low half of an argument, which is all of an int: both machines are little-endian."""
    return instruction(LOAD, _ARGUMENTS + 8 * index)


def _skip_when_one_of(values):
    """Tests that jump over the instruction after them when what was loaded is one of the values."""
    count = len(values)
    return [instruction(_IF_EQUAL, value, count - place) for place, value in enumerate(values)]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def seccomp_load(program, ask=False):
    """Apply a filter to this process for good; needs no_new_privs().

    ask: returns the descriptor for `answer`, else None.
    """
    own_pid = struct.pack("I", os.getpid())
    program = program.replace(struct.pack("I", _PID), own_pid)
    filter_program = _FilterProgram(len(program) // 8, program)

    set_mode_filter = ctypes.c_uint(1)
    flags = ctypes.c_uint(8 if ask else 0)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
    descriptor = _syscall("seccomp", set_mode_filter, flags, ctypes.byref(filter_program))
    return descriptor if ask else None


def ask_once():
    """Fails where something above this process answers for its system calls already.

    Some container managers do.
    """
    no_new_privs()
    os.close(seccomp_load(ask_filter(), ask=True))


def answer(descriptor, allowed):
    """Grant or refuse (EAGAIN) what a program that is bound by an `ask` filter waits for.

    `allowed(is_thread)` decides. The limit on processes of the user (RLIMIT_NPROC) counts all that
    the user runs, and a fork bomb outruns any watching from outside.
    """
    receive, send = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND

    # struct seccomp_notif: id, pid, flags, then nr, arch, instruction pointer, six arguments
    request = bytearray(80)
    with contextlib.suppress(FileNotFoundError):  # the asking process was killed meanwhile
        fcntl.ioctl(descriptor, receive, request)
        (identity,) = struct.unpack_from("Q", request)
        number, _, _, flags = struct.unpack_from("iIQQ", request, 16)

        if allowed(number == NUMBER["clone"] and bool(flags & _CLONE_THREAD)):
            error, go_on = 0, 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
        else:
            error, go_on = -errno.EAGAIN, 0
        reply = struct.pack("QqiI", identity, 0, error, go_on)
        fcntl.ioctl(descriptor, send, reply)


# ---- namespaces ----


def unshare(flags):
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def enter_user_namespace(flags=0):
    """A user namespace of one's own.

    In it this process keeps its user and group id and has every capability.
    """
    user, group = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | flags)

    _write_own("uid_map", f"{user} {user} 1")
    _write_own("setgroups", "deny")  # without it gid_map is refused
    _write_own("gid_map", f"{group} {group} 1")


def _write_own(name, text):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)


def private_files(folder, size, files, new_user):
    """Let this process and its children see an empty file system of their own on `folder`.

    And all the rest read-only: not even the owner of a file can change it, or its mode, marks and
    times, through a descriptor.
    size: bytes. files: inodes. new_user: by a user namespace of its own; False: root does without.
    """
    if new_user:
        enter_user_namespace(CLONE_NEWNS)
    else:
        unshare(CLONE_NEWNS)

    private, recursive, nosuid, nodev = 1 << 18, 1 << 14, 2, 4
    _mount("none", "/", None, private | recursive, None)
    _make_read_only("/")
    options = f"size={size},nr_inodes={files},mode=0700"
    _mount("tmpfs", folder, "tmpfs", nosuid | nodev, options)


def _make_read_only(folder):
    """All mounts from here down."""
    here, recursive = ctypes.c_int(-100), ctypes.c_uint(0x8000)
    # struct mount_attr: set, clear, propagation, user namespace
    attributes = struct.pack("QQQQ", 1, 0, 0, 0)
    place = ctypes.c_char_p(os.fsencode(folder))
    size = ctypes.c_size_t(len(attributes))
    _syscall("mount_setattr", here, place, recursive, ctypes.c_char_p(attributes), size)


def unmount(folder):
    """Take away the file system of `private_files`, with all that is in it."""
    detach = 2
    _checked(_libc.umount2(os.fsencode(folder), detach), f"umount {folder}")


def _mount(source, target, kind, flags, options):
    words = [source, target, kind, options]
    source, place, kind, options = [None if word is None else os.fsencode(word) for word in words]
    result = _libc.mount(source, place, kind, ctypes.c_ulong(flags), options)
    _checked(result, f"mount {target}")


def fork_into(flags):
    """Like os.fork(), with the child as process 1 of new namespaces.

    Only for a process without threads.
    """
    number = ctypes.c_long(NUMBER["clone"])
    flags = ctypes.c_ulong(flags | signal.SIGCHLD)
    zeros = [ctypes.c_ulong(0)] * 4
    return _checked(_libc_holding_gil.syscall(number, flags, *zeros), "clone")


def sealed_input(data):
    """Descriptor from which a program can read `data`, and that it cannot write."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if data:
        os.write(descriptor, data)
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
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if exit_code == 0:
        return None
    return reason or f"ended with {exit_code}"


def program_user():
    """A user id that nobody has, for the programs of this process when it is root.

    None when it is not root, or not allowed. 2,000,000,000 + own process id: unique on the machine,
    and outside the ranges of systemd and of distributions. Where only some ids are mapped (rootless
    containers): 60,000 + process id modulo 5,000.
    """
    if not hasattr(os, "setresuid") or os.geteuid() != 0:
        return None
    for user in (2_000_000_000 + os.getpid(), 60_000 + os.getpid() % 5000):
        if attempt(lambda user=user: become_user(user)) is None:
            return user
    return None


def become_user(user):
    """Turn this process, which is root's, into one of `user` for good, with no other group."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


@contextlib.contextmanager
def looking_as(user):
    """Read /proc as a user to whom a process belongs; None: as this process does.

    Root may read it all the same, but not in a container that took CAP_SYS_PTRACE from it.
    """
    if user is None:
        yield
        return
    _libc.setfsgid(user)
    _libc.setfsuid(user)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
