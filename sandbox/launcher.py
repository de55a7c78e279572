"""One launcher: a small process that runs one program at a time, locked down, and says how it ended.

Started by pool.py as `python -I -S launcher.py SETTINGS` with a socket as stdin; standard library only, about 11 MB. It knows no
language: a job comes as one or two stages (compile, run) with everything resolved. It never sees a right answer. When the socket closes,
the trainer is gone: the program is killed, the work folder removed, the launcher ends.

SETTINGS (JSON): {"level", "folder": the work folder}.
Message either way: 4 bytes of length, then JSON; bytes travel as Latin-1 text.
"""

import contextlib
import gc
import json
import math
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import isolation  # noqa: E402
from watch import THREADS, Disk, Program  # noqa: E402

WORK_BYTES, WORK_FILES = 256 << 20, 16384  # what all files of one job may take


# ---- messages ----


def receive(channel):
    """Next message, or None when the other side is gone."""
    header = _receive_exactly(channel, 4)
    body = _receive_exactly(channel, struct.unpack("I", header)[0]) if header else None
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


# ---- the work folder ----


def write_files(folder, files, user):
    """Write {path: Latin-1 text} below the folder, owned by `user` when the launcher may give files away."""
    for path, content in files.items():
        place = os.path.join(folder, path)
        if "/" in path:
            os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "xb") as file:
            file.write(content.encode("latin-1"))
    if user is not None:
        os.chown(folder, user, user)
        for parent, folders, names in os.walk(folder) if files else ():
            for name in folders + names:
                os.chown(os.path.join(parent, name), user, user)


def clear(folder):
    """Remove everything in the folder, whatever a program did to it: no permissions, 20,000 levels, a folder where a file was."""
    with contextlib.suppress(OSError, RecursionError):
        os.chmod(folder, 0o755)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    rest = [os.path.join(folder, name) for name in os.listdir(folder)]
    if rest:  # rm and chmod walk without recursion; Python's rmtree fails beyond 1,000 levels
        subprocess.run(
            ["chmod", "-R", "u+rwX", "--", *rest], stderr=subprocess.DEVNULL, check=False
        )
        subprocess.run(["rm", "-rf", "--", *rest], check=True)


# ---- inside the child ----


def set_limits(stage, count_processes):
    """Limits that the kernel enforces. Soft = hard: with soft < hard a program can catch SIGXCPU and run on.

    The kernel counts CPU time in ticks (it killed at 0.85 s of 1 s): the launcher's look is exact, the kernel's limit stands behind it.
    """
    limits = {
        resource.RLIMIT_AS: stage["address_space"],
        resource.RLIMIT_CPU: math.ceil(stage["cpu"]) + 1,
        resource.RLIMIT_FSIZE: stage["file_size"],
        resource.RLIMIT_NOFILE: stage["open_files"],
        resource.RLIMIT_STACK: 64 << 20,
        resource.RLIMIT_CORE: 0,
    }
    if (
        count_processes
    ):  # only where the count is of this job alone; launcher and init stand in it too
        limits[resource.RLIMIT_NPROC] = stage["processes"] + THREADS + 3
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def lock_down(launcher, stage):
    """Everything that stands between the program and the machine; the order matters. Returns the descriptor for isolation.answer, or None."""
    os.chdir(launcher.folder)
    if launcher.user is not None:
        os.setgroups([])
        os.setresgid(launcher.user, launcher.user, launcher.user)
        os.setresuid(launcher.user, launcher.user, launcher.user)
    if isolation.LINUX:
        isolation.die_with_parent()  # after the change of user, which resets it
    set_limits(stage, launcher.user is not None or launcher.own_users)
    if launcher.level != "portable":
        isolation.no_new_privs()
        isolation.drop_capabilities()
        isolation.landlock_restrict(launcher.ruleset(stage))
        return isolation.seccomp_load(launcher.filter(stage["processes"] > 1), launcher.ask)
    return None


def become_program(launcher, stage, warm, streams, report):
    """Turn this process into the program, by exec or in a warm interpreter; never returns. What fails is written to `report`."""
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        asks = lock_down(launcher, stage)
        if asks is not None:
            teller = socket.socket(fileno=report)
            socket.send_fds(teller, [b"A"], [asks])
            teller.detach()
        os.closerange(3, report)
        os.closerange(report + 1, 1024)
        if warm:
            os.close(report)
            warm.run_in_child()
        else:
            for number in (
                signal.SIGPIPE,
                signal.SIGXFSZ,
                signal.SIGINT,
            ):  # Python changes these; a program expects the default
                signal.signal(number, signal.SIG_DFL)
            os.execve(
                stage["program"],
                stage["argv"],
                stage["environment"] | {"HOME": launcher.folder, "TMPDIR": launcher.folder},
            )
    except BaseException as error:
        os.write(report, f"E{type(error).__name__}: {error}".encode()[:1000])
    finally:
        os._exit(127)


def become_init(launcher, stage, warm, streams, report):
    """Process 1 of the job's namespaces: start the program as process 2, reap what it leaves, report its end. Its own end kills the rest."""
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


# ---- the launcher ----


class Launcher:
    """What stays the same from job to job: level, work folder, prepared Landlock rulesets and seccomp filters, warm interpreters."""

    def __init__(self, channel, level, folder, user):
        self.channel, self.level, self.folder, self.user = channel, level, folder, user
        self.own_users = (
            level == "namespaces" and user is None
        )  # a user namespace of its own, in which the process limit counts
        # where the process limit counts more than this job (one user for all, or none for root), the launcher counts itself
        self.ask = (
            level == "kernel" and user is None and isolation.attempt(isolation.ask_once) is None
        )
        self._rulesets, self._filters, self._warm = {}, {}, None
        gc.disable()  # jobs are plain dicts; a collection would only touch pages shared with the children
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2
        )
        self.bounded = self._separate()

    def _separate(self):
        """Leave the trainer's view as far as allowed. True when the work folder has become a file system of its own with a size."""
        if not isolation.LINUX:
            return False
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")  # when memory is short the kernel ends a program, never the trainer
        isolation.become_subreaper()
        if self.own_users:
            isolation.enter_user_namespace(isolation.CLONE_NEWNS)
        isolation.set_dumpable(0)
        if self.level == "portable":
            return False
        try:
            if self.user is not None:
                isolation.unshare(isolation.CLONE_NEWNS)
            isolation.private_tmpfs(self.folder, WORK_BYTES, WORK_FILES)
            return True
        except OSError:
            return False

    def ruleset(self, stage):
        """Descriptor of the Landlock rules of a stage, made once. The work folder is the same for all jobs, one after another."""
        key = (*stage["read"], "|", *stage["execute"], "|", stage["run_work"])
        if key not in self._rulesets:
            work = isolation.WORK | (isolation.EXECUTE if stage["run_work"] else 0)
            rules = [(path, isolation.READ) for path in stage["read"]] + [
                (path, isolation.EXECUTE) for path in stage["execute"]
            ]
            rules += [("/dev/null", isolation.WRITE), (self.folder, work)]
            self._rulesets[key] = isolation.landlock_ruleset(rules)
        return self._rulesets[key]

    def filter(self, may_fork):
        if may_fork not in self._filters:
            self._filters[may_fork] = isolation.seccomp_filter(may_fork, self.ask)
        return self._filters[may_fork]

    def warm_for(self, stage):
        """The warm interpreter that can stand in for a stage, or None."""
        wanted = stage.get("warm")
        if wanted and self._warm is None:
            self._warm = load_warm(wanted, stage, self.folder)
        return (
            self._warm
            if self._warm and wanted == self._warm.wanted and self._warm.ready()
            else None
        )

    def serve(self):
        """Job after job until the trainer is gone (True), or until something failed that a fresh launcher may not suffer from (False)."""
        with contextlib.suppress(OSError):  # of the socket: the trainer is gone
            while (job := receive(self.channel)) is not None:
                try:
                    reply = self.run(job)
                    clear(self.folder)
                except Exception as error:
                    send(
                        self.channel,
                        {"status": "sandbox_error", "stderr": f"{type(error).__name__}: {error}"},
                    )
                    return False
                if reply is None:  # the trainer went away during the job
                    break
                send(self.channel, reply)
        return True

    def run(self, job):
        """Run the stages of a job in the work folder. Returns the reply, or None when the trainer went away meanwhile."""
        write_files(self.folder, job["files"], self.user)
        cpu, wall, memory = 0.0, 0.0, 0
        for number, stage in enumerate(job["stages"]):
            program = self.run_stage(
                stage, job["stdin"].encode("latin-1") if stage["last"] else b""
            )
            if program.trainer_gone:
                return None
            cpu, wall, memory = (
                cpu + program.cpu,
                wall + program.wall,
                max(memory, program.peak_memory),
            )
            status = judge(program, stage)
            if status != "ok":
                break
            if not stage["last"]:
                self._make_executable(job["stages"][number + 1]["argv"][0])
        failed = status == "sandbox_error"
        return {
            "status": status,
            "stdout": program.stdout.decode("latin-1"),
            "stderr": (
                program.report[1:] or b"the program never started" if failed else program.stderr
            ).decode("latin-1"),
            "returncode": program.returncode,
            "cpu": cpu,
            "wall": wall,
            "peak_memory": memory,
            "truncated": program.truncated,
        }

    def _make_executable(self, path):
        """A linker sets the mode by path, which a program may not do."""
        place = os.path.join(self.folder, path)
        if os.path.realpath(place).startswith(self.folder + "/") and os.path.isfile(place):
            os.chmod(place, 0o755)

    def run_stage(self, stage, stdin):
        """Start one program, wait for its end. Returns the Program."""
        out, err, (heard, report) = os.pipe(), os.pipe(), socket.socketpair()
        source = open_input(stdin)
        warm = self.warm_for(stage)
        if self.level != "portable":  # prepared here, so that the next job finds them
            self.ruleset(stage), self.filter(stage["processes"] > 1)
        inner = self.level == "namespaces"
        started = time.monotonic()
        pid = (
            isolation.fork_into(isolation.CLONE_NEWPID | isolation.CLONE_NEWIPC)
            if inner
            else os.fork()
        )
        if pid == 0:
            (become_init if inner else become_program)(
                self, stage, warm, (source, out[1], err[1]), report.detach()
            )
        report.close()
        for descriptor in (source, out[1], err[1]):
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the trainer is gone: the Program notices
            send(self.channel, {"started": pid})
        disk = (
            None
            if self.bounded or self.level == "portable"
            else Disk(self.folder, WORK_BYTES, WORK_FILES)
        )
        program = Program(pid, stage, (out[0], err[0]), heard, disk, started)
        program.wait(self.channel)
        return program


def load_warm(wanted, stage, folder):
    """A warm interpreter in this process, for good; False when it cannot be had, and then programs start cold."""
    from warm_prolog import WarmProlog

    os.chdir(folder)  # what the interpreter takes for its working folder is the same for all jobs
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        warm = WarmProlog(
            stage["program"],
            stage["argv"],
            wanted["libraries"],
            stage["environment"] | {"HOME": folder, "TMPDIR": folder},
        )
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        print(f"sandbox: no warm interpreter ({error}); programs start cold", file=sys.stderr)
        return False
    warm.wanted = wanted
    return warm


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


_NO_MEMORY = (
    b"out of memory",
    b"cannot allocate memory",
    b"MemoryError",
    b"heap exhausted",
    b"not enough memory",
    b"bad_alloc",
)


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
    if any(words.lower() in program.stderr.lower() for words in _NO_MEMORY):
        return "memory_limit"
    return "error" if stage["last"] else "compile_error"


def main():
    settings = json.loads(sys.argv[1])
    folder = settings["folder"]
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    alone = False
    try:
        launcher = Launcher(channel, settings["level"], folder, isolation.program_user())
        send(channel, {"ready": True, "bounded": launcher.bounded})
        alone = launcher.serve()
    finally:
        leave(folder, alone)


def leave(folder, alone):
    """Remove the work folder; when the trainer is gone, the common one too with the last of the launchers."""
    os.chdir("/")
    with contextlib.suppress(OSError):
        isolation.unmount(folder)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        clear(folder)
        os.rmdir(folder)
        if alone:
            os.rmdir(os.path.dirname(folder))


if __name__ == "__main__":
    main()
