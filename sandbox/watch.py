"""The launcher's side of one running program: read its output, watch its limits, end it, and reap all that it leaves.

Standard library only, like the launcher that imports it.
"""

import contextlib
import os
import select
import signal
import time

THREADS = 256  # of all processes of a job together; runtimes start up to about 30, a thread bomb thousands
_TICK_SINGLE, _TICK_MANY = 0.1, 0.02  # seconds between looks; a fork bomb makes about 2,000 processes per second
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Program:
    """A program that runs as process `pid`, with the read ends of its stdout, stderr and report pipes.

    After `wait()`: reason (a status, or None when it ended by itself), returncode (as os.waitstatus_to_exitcode; None when killed before
    it reported), stdout, stderr, report, cpu and wall seconds, peak_memory in bytes, truncated, trainer_gone.
    """

    def __init__(self, pid, stage, pipes, disk, started):
        self.pid, self.stage, self.disk, self.started = pid, stage, disk, started
        self.reason = self.returncode = None
        self.cpu = self.seen_cpu = self.wall = 0.0
        self.peak_memory = 0
        self.truncated = self.trainer_gone = self.ended = False
        self.output = {pipe: bytearray() for pipe in pipes}
        self.open = set(pipes)
        for pipe in pipes:
            os.set_blocking(pipe, False)

    def wait(self, channel):
        """Until the program has ended or been ended and nothing of it is left. `channel`: socket to the trainer; it must stay silent."""
        with _pidfd(self.pid) as pidfd:
            poll = select.poll()
            for descriptor in [*self.open, channel.fileno(), *([pidfd] if pidfd else [])]:
                poll.register(descriptor, select.POLLIN)
            while not self.ended and not self.reason and not self.trainer_gone:
                for descriptor, _ in poll.poll(1000 * self._patience(pidfd)):
                    if descriptor == channel.fileno():
                        self.trainer_gone = True
                    elif descriptor == pidfd:
                        self.ended = True
                    elif self._read(descriptor):
                        poll.unregister(descriptor)
                if not self.ended:
                    self._look(pidfd)
        self._finish()

    @property
    def stdout(self):
        return bytes(list(self.output.values())[0])

    @property
    def stderr(self):
        return bytes(list(self.output.values())[1])

    @property
    def report(self):
        return bytes(list(self.output.values())[2])

    # ---- while it runs ----

    def _patience(self, pidfd):
        """Seconds until the next look: soon enough to end a program within milliseconds of its limits."""
        tick = _TICK_SINGLE if self.stage["processes"] == 1 else _TICK_MANY
        wall_left = self.started + self.stage["wall"] - time.monotonic()
        return max(0.001, min(wall_left if wall_left > 0 else tick, self.stage["cpu"] - self.seen_cpu, tick if pidfd else 0.005))

    def _read(self, pipe):
        """Take what is there; True at the end of the stream."""
        limit, stored = self.stage["output"], self.output[pipe]
        try:
            part = os.read(pipe, 65536)
        except BlockingIOError:
            return False
        if len(stored) + len(part) > limit:
            self.truncated, self.reason = True, self.reason or "output_limit"
        stored += part[: limit - len(stored)]
        if not part:
            self.open.discard(pipe)
        return not part

    def _look(self, pidfd):
        """Compare the whole tree of processes with its limits."""
        stage, now = self.stage, time.monotonic()
        if not pidfd and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.ended = True
            return
        memory, cpu, tasks, written = 0, 0.0, 0, 0
        tree = descendants(os.getpid()) if os.path.isdir("/proc/self") else []
        over = now - self.started - stage["wall"]
        if over > 0 and over > min(_waited(tree), 2 * stage["wall"]):
            self.reason = self.reason or "wall_limit"
        for pid in tree:
            with contextlib.suppress(OSError):
                memory += _resident(pid)
                cpu += time.clock_gettime((~pid << 3) | 2)  # CPU clock of another process, see clock_getcpuclockid(3)
                if stage["processes"] > 1:
                    tasks += len(os.listdir(f"/proc/{pid}/task"))
                if self.disk:
                    written += _written(pid)
        self.peak_memory, self.seen_cpu = max(self.peak_memory, memory), cpu
        for status, exceeded in (
            ("memory_limit", memory > stage["memory"]),
            ("cpu_limit", cpu > stage["cpu"]),
            ("crash", len(tree) > stage["processes"] + 1 or tasks > stage["processes"] + THREADS),
            ("file_limit", self.disk and self.disk.exceeded(written)),
        ):
            if exceeded:
                self.reason = self.reason or status

    # ---- its end ----

    def _finish(self):
        self._kill()
        self._reap()
        self.wall = time.monotonic() - self.started
        self.cpu = max(self.cpu, self.seen_cpu)  # what process 1 of a namespace did not wait for is missing in the former
        for pipe in tuple(self.open):
            while pipe in self.open and not self.truncated and not self._empty(pipe):
                pass
        for pipe in self.output:
            os.close(pipe)
        self._settle()

    def _empty(self, pipe):
        """Read once more; True when nothing more can come (everybody who could write is dead)."""
        before = len(self.output[pipe])
        return self._read(pipe) or len(self.output[pipe]) == before

    def _kill(self):
        # The group first: its number cannot be reused as long as its leader has not been reaped.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)

    def _reap(self):
        """Wait for every child, kill those that left the group, until there is none."""
        deadline = time.monotonic() + 2.0
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if self.returncode is None else os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                self.cpu += usage.ru_utime + usage.ru_stime
                self.peak_memory = max(self.peak_memory, usage.ru_maxrss * (1024 if os.uname().sysname == "Linux" else 1))
                if pid == self.pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                continue
            for orphan in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            if time.monotonic() > deadline:  # only the portable level lets a program fork faster than it can be killed
                raise RuntimeError("processes of the program are still there 2 s after they were killed")
            time.sleep(0.002)

    def _settle(self):
        """Take the end of the program itself from process 1 of its namespaces, and name the limit that the kernel enforced."""
        if self.report.startswith(b"S"):
            self.returncode = os.waitstatus_to_exitcode(int(self.report[1:]))
        if self.reason or self.returncode is None:
            return
        if self.returncode in (-signal.SIGXCPU, -signal.SIGKILL) and self.cpu > 0.9 * self.stage["cpu"]:
            self.reason = "cpu_limit"
        elif self.returncode == -signal.SIGXFSZ:
            self.reason = "file_limit"


@contextlib.contextmanager
def _pidfd(pid):
    """Descriptor that becomes readable when the process ends; None where the system has none (macOS, old kernels)."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def descendants(pid):
    """Process ids of all children, their children and so on. Empty where /proc does not list children."""
    found, waiting = [], [pid]
    while waiting and len(found) < 5000:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    children = [int(word) for word in file.read().split()]
                found += children
                waiting += children
    return found


def _waited(tree):
    """Seconds that threads of these processes were ready to run but had no core: a busy machine must not fail an honest program.

    The sum over threads, since they wait for each other."""
    total = 0.0
    for pid in tree:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[1]) / 1e9
    return total


def _resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE


def _written(pid):
    """Bytes that the process and the children it waited for have sent towards a disk, unlinked and mapped files included."""
    with open(f"/proc/{pid}/io") as file:
        return int(file.read().partition("\nwrite_bytes: ")[2].split()[0])


class Disk:
    """Bound for a work folder that is not a file system of its own: bytes written, and what a walk finds (a tmpfs counts no bytes)."""

    def __init__(self, folder, size, files):
        self.folder, self.size, self.files = folder, size, files

    def exceeded(self, written):
        if written > self.size:
            return True
        size = files = 0
        waiting = [self.folder]
        while waiting and files <= self.files and size <= self.size:
            with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    if files > self.files:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        return files > self.files or size > self.size
