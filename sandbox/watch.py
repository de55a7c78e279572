"""The launcher's side of one running program.

It reads the program's output, watches its limits, ends it, and reaps all that it leaves. Standard
library only, like the launcher that imports it.
"""

import contextlib
import math
import mmap
import os
import select
import signal
import socket
import stat
import struct
import time

import isolation

# Of all processes of a job together; runtimes start up to about 30, a thread bomb thousands.
THREADS = 256

# Seconds between looks, for programs that may start processes and for those that may not. A fork
# bomb makes about 2,000 processes per second.
_TICK_MANY = 0.02
_TICK_SINGLE = 0.1
_TICK_BLIND = 0.005  # where nobody tells when the program ends
# Between walks through its files, 0.5 ms each of programs that take 5, and between looks at whether
# the disk fills, 2 us each: a program writes 3 GB/s to memory.
_TICK_WALK = 0.1
_TICK_FULL = 0.01
_FILLED = 16  # a walk is due as soon as the disk has this part less of what a program may have

_DEEPEST = 100  # folders of a program, each in the one before
_REFUSALS = 100  # of processes and threads, after which this is a bomb
_REAP_SECONDS = 10.0

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")
if hasattr(os, "sched_getaffinity"):
    _CORES = len(os.sched_getaffinity(0))
else:
    _CORES = os.cpu_count() or 1
_INT = struct.Struct("i")
_MAXRSS_UNIT = 1024 if os.uname().sysname == "Linux" else 1  # bytes, of getrusage's ru_maxrss


class Guard:
    """A process that ends the running program when this process is killed.

    By itself only the program's first process dies with its launcher, and who kills a trainer may
    well kill its launchers too, so that nobody else would be left to do it.
    """

    def __init__(self):
        self._told = mmap.mmap(-1, _INT.size)
        alive, self._end = os.pipe()
        child = os.fork()
        if child == 0:
            if os.fork() == 0:  # not a child of this process, which has only programs for children
                self._wait(alive)
            os._exit(0)
        os.waitpid(child, 0)
        os.close(alive)
        self._told.madvise(mmap.MADV_DONTFORK)  # a warm interpreter does not have it

    def tell(self, pid):
        """Which program runs; 0: none."""
        _INT.pack_into(self._told, 0, pid)

    def _wait(self, alive):
        try:
            os.setsid()
            os.closerange(0, alive)
            os.closerange(alive + 1, 1024)
            os.read(alive, 1)  # until its other end is closed
            (pid,) = _INT.unpack_from(self._told)
            if pid:
                os.killpg(pid, signal.SIGKILL)
        finally:
            os._exit(0)


class Program:
    """A program that runs.

    pid: its process, or process 1 of its namespaces.
    stage: what it may use, from the job.
    pipes: descriptors to read its stdout and stderr.
    reports: the socket on which it tells how it started, see `_hear`.
    disk: what bounds its files, or None.
    started: time.monotonic() at its start.

    After `wait()`: reason (a status, or None when it ended by itself), returncode (as
    os.waitstatus_to_exitcode; None when killed before it reported), stdout, stderr, report, cpu and
    wall seconds, peak_memory in bytes, truncated, trainer_gone.
    """

    def __init__(self, pid, stage, pipes, reports, disk, started):
        self.pid = pid
        self.stage = stage
        self.reports = reports
        self.disk = disk
        self.started = started

        self.reason = None
        self.returncode = None
        self.report = b""
        self.cpu = 0.0
        self.wall = 0.0
        self.peak_memory = 0
        self.truncated = False
        self.trainer_gone = False

        self.ended = False
        self.asks = None  # descriptor on which it asks for processes
        self.refused = 0
        self.walked = started  # when its files were last looked at
        self.looked = started  # when `_look` last did, and what it saw then:
        self.seen_cpu = 0.0
        self.seen_clocks = {}  # CPU seconds by process id, of those that have ended too
        self.seen_written = 0
        self.lost_written = 0  # bytes of processes that ended and that nobody waited for
        self.seen_waited = 0.0
        self.starved = 0.0

        self.out, self.err = pipes
        self.output = {pipe: bytearray() for pipe in pipes}
        self.open = set(pipes)
        self.poll = select.poll()
        reports.setblocking(False)
        for pipe in pipes:
            os.set_blocking(pipe, False)
            self.poll.register(pipe, select.POLLIN)

    @property
    def stdout(self):
        return bytes(self.output[self.out])

    @property
    def stderr(self):
        return bytes(self.output[self.err])

    def wait(self, channel):
        """Until the program has ended or been ended and nothing of it is left.

        channel: socket to the trainer; it must stay silent.
        """
        with _pidfd(self.pid) as pidfd:
            self.poll.register(channel.fileno(), select.POLLIN)
            self.poll.register(self.reports.fileno(), select.POLLIN)
            if pidfd:
                self.poll.register(pidfd, select.POLLIN)

            due = time.monotonic() + self._patience(pidfd)
            while not self.ended and not self.reason and not self.trainer_gone:
                left = max(0.0, due - time.monotonic())
                if self.disk:
                    left = min(left, _TICK_FULL)
                for descriptor, event in self.poll.poll(1000 * left):
                    if descriptor == channel.fileno():
                        self.trainer_gone = True
                    elif descriptor == pidfd:
                        self.ended = True
                    elif descriptor == self.reports.fileno():
                        self._hear()
                    elif descriptor == self.asks:
                        self._answer(event)
                    else:
                        self._read(descriptor)
                # By the clock, not at every event: a look costs 0.5 ms, a small program takes 5,
                # and one that writes all the time must not be looked at all the time.
                filling = self.disk and self.disk.fills()
                if not self.ended and (filling or time.monotonic() >= due):
                    self._look(pidfd)
                    due = time.monotonic() + self._patience(pidfd)
        self._finish()

    def _end(self, reason):
        """It must end; the first reason is the one that counts."""
        self.reason = self.reason or reason

    # ---- while it runs ----

    def _patience(self, pidfd):
        """Seconds until the next look.

        Soon enough to end a program within milliseconds of its limits.
        """
        tick = _TICK_SINGLE if self.stage["processes"] == 1 else _TICK_MANY
        wall_left = self.started + self.stage["wall"] - time.monotonic()
        if wall_left <= 0:  # it runs on time that `_look` grants
            wall_left = tick
        cpu_left = self.stage["cpu"] - self.seen_cpu
        return max(0.001, min(wall_left, cpu_left, tick if pidfd else _TICK_BLIND))

    def _read(self, pipe):
        """Take what is there; True when no more will come."""
        limit = self.stage["output"]
        stored = self.output[pipe]
        try:
            part = os.read(pipe, 65536)
        except BlockingIOError:
            return False

        if len(stored) + len(part) > limit:
            self.truncated = True
            self._end("output_limit")
        stored += part[: limit - len(stored)]
        if not part:
            self.open.discard(pipe)
            self.poll.unregister(pipe)
        return not part

    def _hear(self):
        """Take a report.

        E and a reason: the program could not be started. A with a descriptor: there it asks for
        processes. S and its wait status: its end, from process 1 of its namespaces. Nothing more
        once the program runs: it does not have the other end.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self.reports, 4096, 1)
        except BlockingIOError:
            return
        if descriptors:
            self.asks = descriptors[0]
            self.poll.register(self.asks, select.POLLIN)
            data = data[1:]
        elif not data:
            with contextlib.suppress(KeyError):
                self.poll.unregister(self.reports.fileno())
        self.report += data

    def _answer(self, event):
        if event & select.POLLIN:
            isolation.answer(self.asks, self._may_start)
        else:
            self.poll.unregister(self.asks)

    def _may_start(self, is_thread):
        """May the program start one more thread or process?"""
        tree = descendants(os.getpid())
        limit = self.stage["processes"]
        if is_thread:
            granted = _threads(tree) < limit + THREADS
        else:
            granted = len(tree) < limit

        self.refused += not granted
        if self.refused > _REFUSALS:
            self._end("crash")
        return granted

    def _look(self, pidfd):
        """Compare the whole tree of processes with its limits."""
        stage = self.stage
        now = time.monotonic()
        if not pidfd and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.ended = True
            return

        memory = 0
        cpu = 0.0
        written = 0
        tree = descendants(os.getpid()) if os.path.isdir("/proc/self") else []
        for pid in tree:
            with contextlib.suppress(OSError):  # it ended meanwhile
                memory += _resident(pid)
                clock = time.clock_gettime(_cpu_clock(pid))
                self.seen_clocks[pid] = max(clock, self.seen_clocks.get(pid, 0.0))
                cpu += clock
                if stage["processes"] > 1:
                    cpu += _waited_for(pid)
                if self.disk:
                    written += self.disk.written(pid)

        # A program can have its children reaped by the kernel, and then nobody has waited for them.
        cpu = max(cpu, sum(self.seen_clocks.values()))
        self.lost_written += max(self.seen_written - written, 0)
        self.seen_written = written

        self._starve(tree, cpu, now)
        self.seen_cpu = cpu
        self.peak_memory = max(self.peak_memory, memory)

        # It is granted the time in which others had the cores, up to twice its limit.
        granted = min(self.starved, 2 * stage["wall"])
        if now - self.started - stage["wall"] > granted:
            self._end("wall_limit")
        # Before memory: a fork bomb that is seen late also has too much of that, which is not what
        # is wrong with it.
        too_many = len(tree) > stage["processes"] + 1
        if too_many or _threads(tree) > stage["processes"] + THREADS + 1:
            self._end("crash")
        if memory > stage["memory"]:
            self._end("memory_limit")
        if cpu > stage["cpu"]:
            self._end("cpu_limit")
        if self.disk and (now - self.walked > _TICK_WALK or self.disk.fills()):
            self.walked = now
            if self.disk.exceeded(written + self.lost_written, tree):
                self._end("file_limit")

    def _starve(self, tree, cpu, now):
        """Add up the time in which the program was ready to run but others had the cores.

        A busy machine must not fail an honest program. A program whose own threads wait for each
        other gains nothing, because they keep the cores busy.
        """
        waited = _delayed(tree)
        passed = now - self.looked
        busy = (cpu - self.seen_cpu) / (_CORES * passed)
        newly_waited = min(max(waited - self.seen_waited, 0), passed)
        self.starved += newly_waited * min(max(1 - busy, 0), 1)
        self.seen_waited = waited
        self.looked = now

    # ---- its end ----

    def _finish(self):
        self._kill()
        self._reap()
        self.wall = time.monotonic() - self.started
        # what process 1 of a namespace did not wait for is missing in the former
        self.cpu = max(self.cpu, self.seen_cpu)

        for pipe in tuple(self.open):
            while not self.truncated and not self._empty(pipe):
                pass
        self._hear()

        for descriptor in self.output:
            os.close(descriptor)
        if self.asks is not None:
            os.close(self.asks)
        self.reports.close()
        self._settle()

    def _kill(self):
        # The group first: its number cannot be reused as long as its leader has not been reaped.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)

    def _reap(self):
        """Wait for every child, kill those that left the group, until there is none."""
        deadline = time.monotonic() + _REAP_SECONDS
        while True:
            # The program itself was killed and will come. After it: what it left, if anything.
            options = 0 if self.returncode is None else os.WNOHANG
            try:
                pid, status, usage = os.wait4(-1, options)
            except ChildProcessError:
                return
            if pid:
                self.cpu += usage.ru_utime + usage.ru_stime
                self.peak_memory = max(self.peak_memory, usage.ru_maxrss * _MAXRSS_UNIT)
                if pid == self.pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                continue

            for orphan in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            # only the portable level lets a program fork faster than it can be killed
            if time.monotonic() > deadline:
                raise RuntimeError(
                    "processes of the program are still there 10 s after they were killed"
                )
            time.sleep(0.002)

    def _empty(self, pipe):
        """Read once more; True when nothing more can come (all who could write are dead)."""
        before = len(self.output[pipe])
        return self._read(pipe) or len(self.output[pipe]) == before

    def _settle(self):
        """Find out how the program itself ended, and name the limit that the kernel enforced."""
        if self.report.startswith(b"S"):  # else it is the process that was reaped
            self.returncode = os.waitstatus_to_exitcode(int(self.report[1:]))
        if self.reason or self.returncode is None:
            return

        used_up = self.cpu > 0.9 * self.stage["cpu"]
        if used_up and self.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            self.reason = "cpu_limit"
        elif self.returncode == -signal.SIGXFSZ:
            self.reason = "file_limit"


@contextlib.contextmanager
def _pidfd(pid):
    """Descriptor that becomes readable when the process ends.

    None where the system has none (macOS, old kernels).
    """
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- /proc ----


def descendants(pid):
    """Process ids of all children, their children and so on.

    Empty where /proc does not list children.
    """
    found, waiting = [], [pid]
    while waiting and len(found) < 5000:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                words = _read(f"/proc/{parent}/task/{task}/children").split()
                children = [int(word) for word in words]
                found += children
                waiting += children
    return found


def _threads(tree):
    """Number of threads of these processes."""
    count = 0
    for pid in tree:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _delayed(tree):
    """Seconds that the threads of these processes were ready to run but had no core, together."""
    nanoseconds = 0
    for pid in tree:
        with contextlib.suppress(OSError):
            tasks = os.listdir(f"/proc/{pid}/task")
            # a process that ends meanwhile adds nothing
            nanoseconds += sum(_schedstat_delay(pid, task) for task in tasks)
    return nanoseconds / 1e9


def _schedstat_delay(pid, task):
    return int(_read(f"/proc/{pid}/task/{task}/schedstat").split()[1])


def _cpu_clock(pid):
    """CPU clock of another process, see clock_getcpuclockid(3)."""
    return (~pid << 3) | 2


def _waited_for(pid):
    """CPU seconds of the ended children of a process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    user, system = int(fields[13]), int(fields[14])
    return (user + system) / _CLOCK


def _resident(pid):
    """Bytes of memory of a process."""
    return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE


def _read(path):
    with open(path, "rb", buffering=0) as file:  # unbuffered: a third of the cost
        return file.read(65536).decode(errors="replace")  # a program may choose its own name


class Disk:
    """Bound for a work folder that is not a file system of its own.

    It looks at the bytes written, at what a walk finds and at open and mapped files that no walk
    finds. The program goes on meanwhile: what it takes out of a walk's way is missing in that one,
    so each file counts by itself and ten walks a second are made, and one whenever the disk has
    filled by a part of `size`, whoever filled it.
    size: bytes. files: how many, folders included. largest: bytes that one file may have.
    user: whom programs run as; None: as this process.
    """

    def __init__(self, folder, size, files, largest, user):
        self.folder = folder
        self.size = size
        self.files = files
        self.largest = largest
        self.user = user
        self.device = os.stat(folder).st_dev
        self.free = self._free()  # when the last walk began

    def _free(self):
        """(bytes, files) that the disk has left."""
        found = os.statvfs(self.folder)
        return found.f_bfree * found.f_frsize, found.f_ffree

    def fills(self):
        """Has the disk, since the last walk, lost a part of what the program may have?"""
        limits = (self.size, self.files)
        taken = [before - now for before, now in zip(self.free, self._free(), strict=True)]
        return any(_FILLED * one > limit for one, limit in zip(taken, limits, strict=True))

    def written(self, pid):
        """Bytes that a process and the children it waited for have sent towards a disk.

        Those to mapped files included; a tmpfs counts none.
        """
        with isolation.looking_as(self.user):
            counts = _read(f"/proc/{pid}/io")
        return int(counts.partition("\nwrite_bytes: ")[2].split()[0])

    def exceeded(self, written, tree):
        """Is there more than the program with these processes may have?"""
        self.free = self._free()
        if written > self.size:
            return True
        size = self._unlinked(tree)
        files = 0
        linked = set()  # files of several names, which are counted once
        for inode, names, taken in _files(self.folder, None):
            if inode not in linked:
                size += taken
            if names > 1:
                linked.add(inode)
            files += 1
            if size > self.size or files > self.files:
                return True
        return size > self.size

    def _unlinked(self, tree):
        """Bytes of the files without a name that these processes have open or mapped.

        How large a file is that is only mapped nobody may see: it counts as one of the largest.
        """
        sizes = {}
        with isolation.looking_as(self.user):
            for pid in tree:
                for info in _open_files(pid):
                    if info.st_nlink == 0 and info.st_dev == self.device:
                        sizes[info.st_ino] = info.st_blocks * 512
            for pid in tree:
                for inode in _mapped_files(pid, self.folder):
                    sizes.setdefault(inode, self.largest)
        return sum(sizes.values())


def _open_files(pid):
    """What os.stat says of each descriptor of a process."""
    names = []
    with contextlib.suppress(OSError):  # it ended meanwhile
        names = os.listdir(f"/proc/{pid}/fd")
    for name in names:
        with contextlib.suppress(OSError):  # it was closed meanwhile
            yield os.stat(f"/proc/{pid}/fd/{name}")


def _mapped_files(pid, folder):
    """Inode of each file below a folder that a process has mapped and that has no name any more."""
    below = f"{folder}/".encode()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:  # or it has ended
        for line in file:
            fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
            path = fields[-1]
            if path.startswith(below) and path.endswith(b" (deleted)\n"):
                yield int(fields[4])


def _files(name, parent, depth=0):
    """(inode, number of names, bytes) of each file and folder below a folder, hidden ones too.

    By descriptors: no path can name what lies very deep. What is too deep is infinitely large.
    """
    if depth > _DEEPEST:
        yield 0, 1, math.inf
        return
    try:
        place = _open_folder(name, parent)
    except OSError:  # it has gone meanwhile
        return
    try:
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                info = _still_there(entry)
                if info is None:
                    continue
                yield info.st_ino, info.st_nlink, info.st_blocks * 512
                if stat.S_ISDIR(info.st_mode):
                    yield from _files(entry.name, place, depth + 1)
    finally:
        os.close(place)


def _still_there(entry):
    """What os.stat says of an entry; None when it has another name by now, or none."""
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:
        return None


def _open_folder(name, parent):
    """Descriptor of a folder, to which the owner is given every right before."""
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        if os.fstat(place).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{place}", 0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
    finally:
        os.close(place)
