"""The launcher's side of one running program: read its output, watch its limits, end it, and reap all that it leaves.

Standard library only, like the launcher that imports it.
"""

import contextlib
import os
import select
import signal
import socket
import time

import isolation

THREADS = 256  # of all processes of a job together; runtimes start up to about 30, a thread bomb thousands
_TICK_SINGLE, _TICK_MANY = (
    0.1,
    0.02,
)  # seconds between looks; a fork bomb makes about 2,000 processes per second
_TICK_LEAST = 0.004  # a program that writes or asks all the time must not be looked at all the time
_REFUSALS = 100  # of processes and threads, after which this is a bomb
_PAGE, _CLOCK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Program:
    """A program that runs as process `pid`: `pipes` to read its stdout and stderr, the socket `heard` on which its start is reported.

    After `wait()`: reason (a status, or None when it ended by itself), returncode (as os.waitstatus_to_exitcode; None when killed before
    it reported), stdout, stderr, report, cpu and wall seconds, peak_memory in bytes, truncated, trainer_gone.
    """

    def __init__(self, pid, stage, pipes, heard, disk, started):
        self.pid, self.stage, self.heard, self.disk, self.started = pid, stage, heard, disk, started
        self.reason = self.returncode = None
        self.cpu = self.seen_cpu = self.seen_waited = self.starved = self.wall = 0.0
        self.looked = started
        self.peak_memory = 0
        self.truncated = self.trainer_gone = self.ended = False
        self.report, self.asks, self.refused = b"", None, 0
        self.output = {pipe: bytearray() for pipe in pipes}
        self.open = set(pipes)
        self.poll = select.poll()
        heard.setblocking(False)
        for pipe in pipes:
            os.set_blocking(pipe, False)
            self.poll.register(pipe, select.POLLIN)

    def wait(self, channel):
        """Until the program has ended or been ended and nothing of it is left. `channel`: socket to the trainer; it must stay silent."""
        with _pidfd(self.pid) as pidfd:
            for descriptor in [channel.fileno(), self.heard.fileno(), *([pidfd] if pidfd else [])]:
                self.poll.register(descriptor, select.POLLIN)
            while not self.ended and not self.reason and not self.trainer_gone:
                for descriptor, event in self.poll.poll(1000 * self._patience(pidfd)):
                    if descriptor == channel.fileno():
                        self.trainer_gone = True
                    elif descriptor == pidfd:
                        self.ended = True
                    elif descriptor == self.heard.fileno():
                        self._hear()
                    elif descriptor == self.asks:
                        self._answer(event)
                    else:
                        self._read(descriptor)
                if not self.ended and time.monotonic() - self.looked > _TICK_LEAST:
                    self._look(pidfd)
        self._finish()

    @property
    def stdout(self):
        return bytes(list(self.output.values())[0])

    @property
    def stderr(self):
        return bytes(list(self.output.values())[1])

    # ---- while it runs ----

    def _patience(self, pidfd):
        """Seconds until the next look: soon enough to end a program within milliseconds of its limits."""
        tick = _TICK_SINGLE if self.stage["processes"] == 1 else _TICK_MANY
        wall_left = self.started + self.stage["wall"] - time.monotonic()
        return max(
            0.001,
            min(
                wall_left if wall_left > 0 else tick,
                self.stage["cpu"] - self.seen_cpu,
                tick if pidfd else 0.005,
            ),
        )

    def _read(self, pipe):
        """Take what is there; True when no more will come."""
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
            self.poll.unregister(pipe)
        return not part

    def _hear(self):
        """A report: E and a reason when the program could not be started, A with the descriptor on which it asks for processes, S and its
        wait status from process 1 of its namespaces. Nothing more once the program runs: it does not have the other end."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.heard, 4096, 1)
        except BlockingIOError:
            return
        if descriptors:
            self.asks = descriptors[0]
            self.poll.register(self.asks, select.POLLIN)
            data = data[1:]
        if not data and not descriptors:
            with contextlib.suppress(KeyError):
                self.poll.unregister(self.heard.fileno())
        self.report += data

    def _answer(self, event):
        if event & select.POLLIN:
            isolation.answer(self.asks, self._may_start)
        else:
            self.poll.unregister(self.asks)

    def _may_start(self, is_thread):
        """May the program start one more thread or process?"""
        tree, limit = descendants(os.getpid()), self.stage["processes"]
        granted = _tasks(tree) < limit + THREADS if is_thread else len(tree) < limit
        self.refused += not granted
        if self.refused > _REFUSALS:
            self.reason = self.reason or "crash"
        return granted

    def _look(self, pidfd):
        """Compare the whole tree of processes with its limits."""
        stage, now = self.stage, time.monotonic()
        if not pidfd and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.ended = True
            return
        memory, cpu, written = 0, 0.0, 0
        tree = descendants(os.getpid()) if os.path.isdir("/proc/self") else []
        for pid in tree:
            with contextlib.suppress(OSError):
                memory += _resident(pid)
                cpu += time.clock_gettime(
                    (~pid << 3) | 2
                )  # CPU clock of another process, see clock_getcpuclockid(3)
                cpu += _waited_for(pid) if stage["processes"] > 1 else 0
                if self.disk:
                    written += _written(pid)
        self._starve(tree, cpu, now)
        over = now - self.started - stage["wall"]
        if over > min(self.starved, 2 * stage["wall"]):
            self.reason = self.reason or "wall_limit"
        self.peak_memory, self.seen_cpu = max(self.peak_memory, memory), cpu
        for status, exceeded in (
            # first: a fork bomb that is seen late also has too much memory, which is not what is wrong with it
            (
                "crash",
                len(tree) > stage["processes"] + 1
                or _tasks(tree) > stage["processes"] + THREADS + 1,
            ),
            ("memory_limit", memory > stage["memory"]),
            ("cpu_limit", cpu > stage["cpu"]),
            ("file_limit", self.disk and self.disk.exceeded(written)),
        ):
            if exceeded:
                self.reason = self.reason or status

    def _starve(self, tree, cpu, now):
        """Add up the time in which the program was ready to run but others had the cores: a busy machine must not fail an honest program.

        A program whose own threads wait for each other gains nothing, because they keep the cores busy."""
        waited, passed = _delayed(tree), now - self.looked
        busy = (cpu - self.seen_cpu) / (_CORES * passed)
        self.starved += min(max(waited - self.seen_waited, 0), passed) * min(max(1 - busy, 0), 1)
        self.seen_waited, self.looked = waited, now

    # ---- its end ----

    def _finish(self):
        self._kill()
        self._reap()
        self.wall = time.monotonic() - self.started
        self.cpu = max(
            self.cpu, self.seen_cpu
        )  # what process 1 of a namespace did not wait for is missing in the former
        for pipe in tuple(self.open):
            while not self.truncated and not self._empty(pipe):
                pass
        self._hear()
        for descriptor in [*self.output, *([self.asks] if self.asks is not None else [])]:
            os.close(descriptor)
        self.heard.close()
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
        deadline = time.monotonic() + 10.0
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if self.returncode is None else os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                self.cpu += usage.ru_utime + usage.ru_stime
                self.peak_memory = max(
                    self.peak_memory,
                    usage.ru_maxrss * (1024 if os.uname().sysname == "Linux" else 1),
                )
                if pid == self.pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                continue
            for orphan in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            if (
                time.monotonic() > deadline
            ):  # only the portable level lets a program fork faster than it can be killed
                raise RuntimeError(
                    "processes of the program are still there 10 s after they were killed"
                )
            time.sleep(0.002)

    def _settle(self):
        """Take the end of the program itself from process 1 of its namespaces, and name the limit that the kernel enforced."""
        if self.report.startswith(b"S"):
            self.returncode = os.waitstatus_to_exitcode(int(self.report[1:]))
        if self.reason or self.returncode is None:
            return
        if (
            self.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
            and self.cpu > 0.9 * self.stage["cpu"]
        ):
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
                children = [
                    int(word) for word in _read(f"/proc/{parent}/task/{task}/children").split()
                ]
                found += children
                waiting += children
    return found


def _tasks(tree):
    """Number of threads of these processes."""
    count = 0
    for pid in tree:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _delayed(tree):
    """Seconds that the threads of these processes were ready to run but had no core, all together."""
    total = 0
    for pid in tree:
        with contextlib.suppress(OSError):
            total += sum(
                int(_read(f"/proc/{pid}/task/{task}/schedstat").split()[1])
                for task in os.listdir(f"/proc/{pid}/task")
            )
    return total / 1e9


def _waited_for(pid):
    """CPU seconds of the ended children of a process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / _CLOCK


def _resident(pid):
    return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE


def _written(pid):
    """Bytes that the process and the children it waited for have sent towards a disk, unlinked and mapped files included."""
    return int(_read(f"/proc/{pid}/io").partition("\nwrite_bytes: ")[2].split()[0])


def _read(path):
    with open(path, "rb", buffering=0) as file:  # unbuffered: a third of the cost
        return file.read(65536).decode()


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
