"""What a hostile program could harm: files, a process, sockets, shared memory of the same user.

`World.damage()` says what it did harm.
"""

import contextlib
import ctypes
import hashlib
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

IPC_KEY = 0x4242  # of the SysV objects that hostile programs make
STRAY_FILES = ("/dev/shm/hostile", "/tmp/hostile", "/var/tmp/hostile", "/usr/lib/hostile")


class World:
    """A folder with an answer file, a victim process and listeners, all of this user.

    Use as a context manager.
    """

    def __init__(self):
        self.secret = "SECRET-" + secrets.token_hex(8)
        self.outside = Path(tempfile.mkdtemp(prefix="outside-"))
        self.answer = self.outside / "answer.txt"
        self.answer.write_text(self.secret)
        (self.outside / "empty").mkdir()
        (self.outside / "closed").mkdir(0o500)  # a careless chmod -R would open it
        with contextlib.suppress(OSError):
            os.setxattr(self.answer, "user.mark", b"1")
        self._copy_perl()
        # The strongest target: every program that runs as this user may do to it what it likes, but
        # for the sandbox.
        self.outside.chmod(0o777)
        self.answer.chmod(0o666)

        self.victim = subprocess.Popen(
            ["sleep", "100000"], start_new_session=True, env={"ANSWER": self.secret}
        )
        self.heard = []
        self.closing = False
        self._listen()
        self.memory = libc.shmget(0, 4096, 0o1666)
        self.before = self._picture()

    def _copy_perl(self):
        """An interpreter and a library of this user's own, as from pyenv, nvm, conda or juliaup."""
        tools = self.outside / "tools"
        for name in ("bin", "lib"):
            (tools / name).mkdir(parents=True)
        (tools / "lib" / "Some.pm").write_text("1;")
        if perl := shutil.which("perl"):
            shutil.copy(perl, tools / "bin" / "perl")
            os.environ["RARECODE_PERL"] = str(tools / "bin" / "perl")

    def _listen(self):
        self.tcp = socket.socket()
        self.tcp.bind(("127.0.0.1", 0))
        self.tcp.listen()
        self.udp = socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix_path = tempfile.mktemp(prefix="hostile-socket-")
        self.unix.bind(self.unix_path)
        os.chmod(self.unix_path, 0o777)

        self._listen_on(self.tcp, self.tcp.accept)
        self._listen_on(self.udp, lambda: self.udp.recv(10))
        self._listen_on(self.unix, lambda: self.unix.recv(10))

    def _listen_on(self, listener, wait):
        threading.Thread(target=self._hear, args=(listener, wait), daemon=True).start()

    def _hear(self, listener, wait):
        place = listener.getsockname()
        while True:
            try:
                wait()
            except OSError:
                return
            if not self.closing:
                self.heard.append(f"something arrived on {place}")

    def words(self):
        """What the @WORDS@ in a hostile program stand for."""
        return {
            "@ANSWER@": str(self.answer),
            "@OUTSIDE@": str(self.outside),
            "@VICTIM@": str(self.victim.pid),
            "@TRAINER@": str(os.getpid()),
            "@TCP@": str(self.tcp.getsockname()[1]),
            "@UDP@": str(self.udp.getsockname()[1]),
            "@UNIX@": self.unix_path,
            "@SHMID@": str(self.memory),
        }

    def damage(self):
        """Sentences, empty when nothing was touched."""
        found = []
        for what, now in self._picture().items():
            if now != self.before[what]:
                found.append(f"{what} changed: {self.before[what]} -> {now}")
        return found + self.heard

    def _picture(self):
        """Everything that must stay as it is."""
        files = {}
        for path in [self.outside, *sorted(self.outside.rglob("*"))]:
            files[str(path)] = picture_of_file(path)

        state = Path(f"/proc/{self.victim.pid}/stat").read_text().split()[2]
        pids = (self.victim.pid, os.getpid())
        shared = Path("/proc/sysvipc/shm")
        return {
            "files": files,
            "stray files": stray_files(),
            "victim": state in "SRD" and self.victim.poll() is None,
            "priorities": [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids],
            "affinity": [sorted(os.sched_getaffinity(pid)) for pid in pids],
            "limits": [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids],
            "IPC objects": ipc_objects(),
            "shared memory": shared.exists() and f" {self.memory} " in shared.read_text(),
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing = True
        self.victim.kill()
        self.victim.wait()
        for listener in (self.tcp, self.udp, self.unix):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        os.unlink(self.unix_path)
        libc.shmctl(self.memory, 0, None)
        shutil.rmtree(self.outside, ignore_errors=True)
        # the portable level keeps nobody from leaving some
        for place in set(stray_files()) - set(self.before["stray files"]):
            os.unlink(place)


def picture_of_file(path):
    """Everything about it that a program could change."""
    info = path.lstat()
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    marks = sorted(os.listxattr(path)) if path.exists() else []
    return (info.st_mode, info.st_uid, info.st_size, info.st_mtime_ns, content, marks)


def stray_files():
    return [place for place in STRAY_FILES if os.path.lexists(place)]


def ipc_objects():
    """(kind, key, id) of SysV objects with the key that hostile programs use."""
    found = []
    for kind in ("shm", "sem", "msg"):
        with contextlib.suppress(OSError):
            for row in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
                key, number, *_ = row.split()
                if key == str(IPC_KEY):
                    found.append((kind, key, number))
    return found


# ---- processes ----


def users(pool):
    """Ids of the users that programs of this pool run as.

    This user, or one of its own for each launcher of root.
    """
    if os.getuid() == 0:
        return {2_000_000_000 + pid for pid in pool.launcher_pids}
    return {os.getuid()}


def processes(owners):
    """{pid: command} of all processes of these users."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            # a program may choose its name
            status = Path(f"/proc/{entry}/status").read_text(errors="replace")
            user = int(status.partition("\nUid:\t")[2].split()[0])
            if user in owners:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry)] = command.decode(errors="replace")
    return found


def strays(owners, known):
    """{pid: command} of processes that jobs left. Waits a little for dying ones."""
    for _ in range(20):
        left = {}
        for pid, command in processes(owners).items():
            if pid not in known and is_of_a_job(pid):
                left[pid] = command
        if not left:
            return {}
        time.sleep(0.02)
    return left


def is_of_a_job(pid):
    """Is this a program's process, and not one that the user of this machine has just started?

    A program's HOME is its work folder.
    """
    try:
        return b"rarecode-" in Path(f"/proc/{pid}/environ").read_bytes()
    except PermissionError:
        # a warm Prolog, or another user's: of interest when nobody but process 1 waits for it
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return status.rpartition(")")[2].split()[1] == "1"
    except OSError:
        return False


def stop(pids):
    """Kill what a failed test left behind."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
