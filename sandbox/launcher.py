"""One launcher: a small process that runs one program at a time, locked down.

pool.py starts it as `python -I -S launcher.py` with a socket as stdin; standard library only, about
11 MB. It knows no language: a job comes as one or two stages (compile, run) with everything
resolved, and its reply says how it ended. It never sees a right answer. When the socket closes, the
trainer is gone: the program is killed, the work folder removed, the launcher ends.

This process has no walls around it, so nothing of a job may reach what it runs or reads: it loads
all its code, a warm interpreter too, before the first job comes.

First message: {"level", "folder": the work folder, "warm": a stage to have an interpreter warm for,
or null}. The others are jobs. Message either way: 4 bytes of length, then JSON; bytes travel as
Latin-1 text.
"""

import contextlib
import gc
import json
import math
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import isolation
from folders import WORK_BYTES, WORK_FILES, clear, make_executable, write_files
from warm_prolog import WarmProlog
from watch import THREADS, Disk, Guard, Program

# Signals and timers under way. The machine lets a user have about 100,000 in all of its programs.
SIGNALS = 1024

# What a runtime says when it could get no more memory and ended by itself.
_NO_MEMORY = (
    b"out of memory",
    b"cannot allocate memory",
    b"MemoryError",
    b"heap exhausted",
    b"not enough memory",
    b"bad_alloc",
)


def main():
    outside = os.open("/", os.O_RDONLY)  # of the view in which the work folder can be removed
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    settings = receive(channel)
    if settings is None:
        return

    folder = settings["folder"]
    trainer_gone = False
    try:
        launcher = Launcher(channel, settings, isolation.program_user())
        send(channel, {"ready": True, "bounded": launcher.bounded})
        trainer_gone = launcher.serve()
    finally:
        leave(folder, outside, trainer_gone)


def leave(folder, outside, trainer_gone):
    """Remove the work folder.

    outside: descriptor of / as it was before this process left the trainer's view.
    When the trainer is gone, the last of the launchers removes the common one too.
    """
    os.chdir("/")
    with contextlib.suppress(OSError):
        try:
            isolation.unmount(folder)
        except (OSError, AttributeError):  # it is not a file system of its own, or this is macOS
            clear(folder)
        place = folder.lstrip("/")
        os.rmdir(place, dir_fd=outside)
        if trainer_gone:
            os.rmdir(os.path.dirname(place), dir_fd=outside)


# ---- the launcher ----


class Launcher:
    """What stays the same from job to job.

    Level, work folder, prepared Landlock rulesets and seccomp filters, a warm interpreter.
    """

    def __init__(self, channel, settings, user):
        self.channel = channel
        self.level = settings["level"]
        self.folder = settings["folder"]
        self.user = user  # whom programs run as; None: as this process

        self._rulesets = {}
        self._filters = {}

        # jobs are plain dicts; a collection would only touch pages shared with the children
        gc.disable()
        open_files = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
        # The work folder is a file system of its own with a size, and all else read-only.
        self.bounded = False
        # A user namespace of its own, in which the process limit counts.
        self.own_users = False
        # Where it counts more than this job (one user for all, or none for root), the launcher
        # counts itself.
        self.ask = False
        self.guard = None
        if isolation.LINUX:
            self.guard = Guard()
            self._separate()
        # its home and working folder are the work folder, as a program's: nothing is in there yet
        self._warm = load_warm(settings["warm"], self.folder)

    def _separate(self):
        """Leave the trainer's view as far as allowed."""
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")  # when memory is short the kernel ends a program, never the trainer
        isolation.become_subreaper()
        if self.level == "portable":
            isolation.set_dumpable(0)
            return

        isolation.no_huge_pages()
        if isolation.attempt(self._see_own_files) is None:
            self._see_own_files()
            self.bounded = True
        elif self.level == "namespaces" and self.user is None:
            isolation.enter_user_namespace(isolation.CLONE_NEWNS)
        self.own_users = self.user is None and (self.bounded or self.level == "namespaces")
        isolation.set_dumpable(0)

        counts_all = self.user is None and (not self.own_users or os.geteuid() == 0)
        if self.level == "kernel" and counts_all:
            self.ask = isolation.attempt(isolation.ask_once) is None

    def _see_own_files(self):
        no_user = self.user is None
        isolation.private_files(self.folder, WORK_BYTES, WORK_FILES, new_user=no_user)

    def serve(self):
        """Run job after job.

        True: until the trainer was gone. False: until something failed that a fresh launcher may
        not suffer from.
        """
        with contextlib.suppress(OSError):  # of the socket: the trainer is gone
            while (job := receive(self.channel)) is not None:
                try:
                    reply = self.run(job)
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"
                    send(self.channel, {"status": "sandbox_error", "stderr": said})
                    return False
                if reply is None:  # the trainer went away during the job
                    break

                # The reply first: what a program left behind does not change how it ended.
                send(self.channel, reply)
                if not self._clear():
                    return False
        return True

    def _clear(self):
        """Make the work folder ready for the next job; False when it cannot be."""
        try:
            clear(self.folder)
        except OSError as error:
            print(f"sandbox: a launcher gives up its work folder ({error})", file=sys.stderr)
            return False
        return True

    def run(self, job):
        """Run the stages of a job in the work folder.

        Returns the reply, or None when the trainer went away meanwhile.
        """
        write_files(self.folder, job["files"], self.user)
        cpu = 0.0
        wall = 0.0
        memory = 0
        for number, stage in enumerate(job["stages"]):
            stdin = job["stdin"].encode("latin-1") if stage["last"] else b""
            program = self.run_stage(stage, stdin)
            if program.trainer_gone:
                return None
            cpu += program.cpu
            wall += program.wall
            memory = max(memory, program.peak_memory)

            status = judge(program, stage)
            if status == "sandbox_error" and number > 0:
                status = "crash"  # what a compiler made of the job's own files cannot be started
            if status != "ok":
                break
            if not stage["last"]:
                name = job["stages"][number + 1]["argv"][0]
                if name.startswith("./"):  # else an interpreter, which runs what was compiled
                    make_executable(self.folder, name.removeprefix("./"))

        stderr = program.stderr
        if program.report.startswith(b"E"):
            stderr = program.report[1:]
        return {
            "status": status,
            "began": status != "sandbox_error",
            "stdout": program.stdout.decode("latin-1"),
            "stderr": stderr.decode("latin-1"),
            "returncode": program.returncode,
            "cpu": cpu,
            "wall": wall,
            "peak_memory": memory,
            "truncated": program.truncated,
        }

    def run_stage(self, stage, stdin):
        """Start one program, wait for its end. Returns the Program."""
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        reports, report = socket.socketpair()
        source = open_input(stdin)
        streams = (source, out_end, err_end)
        give_pipes(streams, self.user)
        warm = self.warm_for(stage)
        if self.level != "portable":  # prepared here, so that the next job finds them
            self.ruleset(stage)
            self.filter(stage["processes"] > 1)

        started = time.monotonic()
        if self.level == "namespaces":
            pid = isolation.fork_into(isolation.CLONE_NEWPID | isolation.CLONE_NEWIPC)
            if pid == 0:
                become_init(self, stage, warm, streams, report.detach())
        else:
            pid = os.fork()
            if pid == 0:
                become_program(self, stage, warm, streams, report.detach())

        if self.guard:
            self.guard.tell(pid)
        report.close()
        for descriptor in streams:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the trainer is gone: the Program notices
            send(self.channel, {"started": pid})

        disk = None
        if not self.bounded and self.level != "portable":
            disk = Disk(self.folder, WORK_BYTES, WORK_FILES, stage["file_size"], self.user)
        program = Program(pid, stage, (out, err), reports, disk, started)
        program.wait(self.channel)
        if self.guard:
            self.guard.tell(0)
        return program

    def ruleset(self, stage):
        """Descriptor of the Landlock rules of a stage, made once.

        The work folder is the same for all jobs, one after another.
        """
        key = (*stage["read"], "|", *stage["execute"], "|", stage["run_work"])
        if key not in self._rulesets:
            work = isolation.WORK
            if stage["run_work"]:
                work |= isolation.EXECUTE
            rules = [(path, isolation.READ) for path in stage["read"]]
            rules += [(path, isolation.EXECUTE) for path in stage["execute"]]
            rules += [("/dev/null", isolation.DEVICE), (self.folder, work)]
            self._rulesets[key] = isolation.landlock_ruleset(rules)
        return self._rulesets[key]

    def filter(self, may_fork):
        """Seccomp filter, made once."""
        if may_fork not in self._filters:
            self._filters[may_fork] = isolation.seccomp_filter(may_fork, self.bounded)
        return self._filters[may_fork]

    def warm_for(self, stage):
        """The warm interpreter that can stand in for a stage, or None."""
        if self._warm and self._warm.wanted == stage.get("warm") and self._warm.ready():
            return self._warm
        return None


def load_warm(stage, folder):
    """A warm interpreter in this process, for good, that can stand in for a stage.

    None when none is wanted, or when it cannot be had, and then programs start cold.
    """
    if stage is None:
        return None
    os.chdir(folder)  # what the interpreter takes for its working folder is the same for all jobs
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    environment = program_environment(stage, folder)
    libraries = stage["warm"]["libraries"]
    try:
        warm = WarmProlog(stage["program"], stage["argv"], libraries, environment)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        print(f"sandbox: no warm interpreter ({error}); programs start cold", file=sys.stderr)
        return None
    warm.wanted = stage["warm"]
    return warm


def program_environment(stage, folder):
    own = dict.fromkeys(("HOME", "TMPDIR", "TMP", "TEMP"), folder)
    return stage["environment"] | own


def open_input(data):
    """Descriptor to read `data` from."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY)
    if len(data) <= 4096:  # fits a pipe on every system, and most programs expect one
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        return reader
    if hasattr(os, "memfd_create"):
        return isolation.sealed_input(data)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        return os.dup(file.fileno())


def give_pipes(streams, user):
    """Let the program open its streams by name (/dev/stdin), for which it must own their pipes.

    Each for its own direction: who reads from the pipe that it prints to waits for itself.
    user: as whom it runs; None: as this process, whose pipes they are.
    """
    for descriptor, mode in zip(streams, (0o400, 0o200, 0o200)):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, mode)
            if user is not None:
                os.fchown(descriptor, user, user)


def judge(program, stage):
    """Status of an ended program."""
    if program.report.startswith(b"E"):
        return "sandbox_error"
    if program.reason:
        return program.reason
    if program.returncode == 0:
        return "ok"
    if program.returncode is None or program.returncode < 0:
        return "crash"
    said = program.stderr.lower()
    if any(words.lower() in said for words in _NO_MEMORY):
        return "memory_limit"
    return "error" if stage["last"] else "compile_error"


# ---- inside the child ----


def become_init(launcher, stage, warm, streams, report):
    """Process 1 of the job's namespaces.

    It starts the program as process 2, reaps what that leaves, and reports its end. Its own end
    kills the rest.
    """
    try:
        isolation.die_with_parent()
        program = os.fork()
        if program == 0:
            become_program(launcher, stage, warm, streams, report)

        os.closerange(0, report)
        os.closerange(report + 1, 1024)
        while True:
            pid, status = os.wait()
            if pid == program:
                os.write(report, f"S{status}".encode())
                os._exit(0)
    except BaseException as error:
        os.write(report, f"E{type(error).__name__}: {error}".encode()[:1000])
    finally:
        os._exit(127)


def become_program(launcher, stage, warm, streams, report):
    """Turn this process into the program, by exec or in a warm interpreter; never returns.

    What fails is written to `report`.
    """
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)

        lock_down(launcher, stage, report)
        os.closerange(3, report)
        os.closerange(report + 1, 1024)

        if warm:
            os.close(report)
            warm.run_in_child()
        else:
            # Python changes these; a program expects the default
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            environment = program_environment(stage, launcher.folder)
            os.execve(stage["program"], stage["argv"], environment)
    except BaseException as error:
        os.write(report, f"E{type(error).__name__}: {error}".encode()[:1000])
    finally:
        os._exit(127)


def lock_down(launcher, stage, report):
    """Everything that stands between the program and the machine; the order matters."""
    os.chdir(launcher.folder)
    if launcher.user is not None:
        isolation.become_user(launcher.user)
    if isolation.LINUX:
        isolation.die_with_parent()  # after the change of user, which resets it
    set_limits(stage, launcher.user is not None or launcher.own_users)
    if launcher.level == "portable":
        return

    isolation.set_dumpable(1)  # as an exec does: the launcher reads what a program has written
    isolation.no_new_privs()
    isolation.drop_capabilities()
    isolation.landlock_restrict(launcher.ruleset(stage))
    if launcher.ask:  # in a filter of its own, because the other one keeps it from being sent
        asks = isolation.seccomp_load(isolation.ask_filter(), ask=True)
        teller = socket.socket(fileno=report)
        socket.send_fds(teller, [b"A"], [asks])
        teller.detach()
    isolation.seccomp_load(launcher.filter(stage["processes"] > 1))


def set_limits(stage, count_processes):
    """Limits that the kernel enforces. Soft = hard: else a program can catch SIGXCPU and run on.

    The kernel counts CPU time in ticks (it killed at 0.85 s of 1 s): the launcher's look is exact,
    the kernel's limit stands behind it.
    """
    limits = {
        resource.RLIMIT_AS: stage["address_space"],
        resource.RLIMIT_CPU: math.ceil(stage["cpu"]) + 1,
        resource.RLIMIT_FSIZE: stage["file_size"],
        resource.RLIMIT_NOFILE: stage["open_files"],
        resource.RLIMIT_STACK: 64 << 20,
        resource.RLIMIT_CORE: 0,
    }
    if hasattr(resource, "RLIMIT_SIGPENDING"):  # Linux: of all that this user has under way
        limits[resource.RLIMIT_SIGPENDING] = SIGNALS
    # only where the count is of this job alone; launcher and init stand in it too
    if count_processes:
        limits[resource.RLIMIT_NPROC] = stage["processes"] + THREADS + 3

    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


# ---- messages ----


def receive(channel):
    """Next message, or None when the other side is gone."""
    header = _receive_exactly(channel, 4)
    if header is None:
        return None
    body = _receive_exactly(channel, struct.unpack("I", header)[0])
    return None if body is None else json.loads(body)


def _receive_exactly(channel, size):
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def send(channel, message):
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("I", len(body)) + body)


if __name__ == "__main__":
    main()
