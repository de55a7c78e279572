"""The trainer's side: a pool of launchers, each fed by one thread.

With retries, replacement of dead launchers and a cache. The trainer never forks: launchers are
started by vfork + exec (0.6 ms from a parent of any size) as early as possible.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from sandbox.folders import WORK_BYTES, WORK_FILES, remove
from sandbox.jobs import Result, SandboxError
from sandbox.languages import load_language
from sandbox.probe import LEVELS, available_level, probe

_LAUNCHER = os.path.join(os.path.dirname(__file__), "launcher.py")
_ATTEMPTS = 3  # on fresh launchers
_CACHE_BYTES = 64 << 20
# These depend on the program alone, a wall limit or a sandbox error on how busy the machine was.
_CACHED = (
    "ok",
    "error",
    "compile_error",
    "cpu_limit",
    "memory_limit",
    "output_limit",
    "file_limit",
)


class Pool:
    """Runs jobs in launchers.

    Use it as a context manager, and start it before CUDA and other heavy things.

    workers: how many launchers; default: the cores this process may use, shared among the local
        ranks.
    level: "portable", "kernel" or "namespaces"; default: what is required.
    require: the weakest level that will do. When the machine cannot give it, SandboxError says what
        is missing, unless allow_weaker.
    cache: equal jobs (language, files, stdin, limits, command) run once.
    """

    def __init__(self, workers=None, level=None, require="kernel", allow_weaker=False, cache=True):
        self.level = choose_level(level, require, allow_weaker)
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = workers or max(1, cores() // local_ranks)
        self.retries = 0
        self.replaced = 0
        self.cache_hits = 0
        self.launcher_pids = []  # of all launchers there ever were
        self.folder = tempfile.mkdtemp(prefix="rarecode-")
        os.chmod(self.folder, 0o711)

        self._queue = queue.SimpleQueue()
        self._lock = threading.Lock()
        # key -> _Pending, so that an equal job waits for the first instead of running again
        self._pending = {}
        self._cache = _Cache(_CACHE_BYTES if cache else 0)
        self._closed = False
        self._threads = []

        # per worker {kind: launcher}; "" is the general kind
        self._launchers = [{} for _ in range(self.workers)]
        try:
            for launchers in self._launchers:
                launchers[""] = self._launch()
            for launchers in self._launchers:
                launchers[""].wait_until_ready()
        except SandboxError:
            self.close()
            raise
        self.bounded = all(launchers[""].bounded for launchers in self._launchers)

        for slot in range(self.workers):
            thread = threading.Thread(target=self._work, args=(slot,), daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, job):
        """Future of the Result of a job, which starts as soon as a launcher is free.

        A program's faults are in the Result. Only a wrong call (unknown language, missing
        interpreter, bad file name) raises: SandboxError or ValueError with one sentence.
        """
        wanted = request(job)
        # without a cache no job equals another
        key = hashlib.sha256(wanted.message).digest() if self._cache.size else object()
        future = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise SandboxError("this sandbox pool is closed")
            if found := self._cache.get(key):
                self.cache_hits += 1
                future.set_result(replace(found, id=job.id))
            elif key in self._pending:
                self.cache_hits += 1
                self._pending[key].waiters.append((future, job.id))
            else:
                self._pending[key] = _Pending(key, wanted, [(future, job.id)])
                self._queue.put(self._pending[key])
        return future

    def run(self, jobs, deadline=None):
        """Results as they come.

        `deadline` seconds after the call everything that is not done comes back as a sandbox_error.
        """
        futures = {self.submit(job): job for job in jobs}
        return self._collect(futures, deadline)

    def _collect(self, futures, deadline):
        try:
            for future in concurrent.futures.as_completed(list(futures), timeout=deadline):
                del futures[future]
                yield future.result()
        except TimeoutError:
            for future, job in futures.items():
                if future.cancel():
                    late = f"not done {deadline} s after the start of the batch"
                    yield self._error(late, job.id)
                else:  # it was done just now
                    yield future.result()

    def run_all(self, jobs, deadline=None):
        """Results in the order of the jobs."""
        numbered = [replace(job, id=(number, job.id)) for number, job in enumerate(jobs)]
        results = [None] * len(numbered)
        for result in self.run(numbered, deadline):
            number, name = result.id
            results[number] = replace(result, id=name)
        return results

    def close(self):
        """End all launchers and their programs, and remove the work folders.

        Jobs that are not done come back as sandbox errors.
        """
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for launcher in self._all_launchers():
            launcher.hang_up()
        for thread in self._threads:
            thread.join(timeout=10)
        for launcher in self._all_launchers():
            launcher.stop()
        for pending in list(self._pending.values()):
            self._finish(pending, self._error("the sandbox pool was closed"))
        remove(self.folder)

    def _all_launchers(self):
        """Each launcher that there is when its turn comes; the threads replace some meanwhile."""
        for launchers in self._launchers:
            yield from list(launchers.values())

    # ---- one thread per worker ----

    def _work(self, slot):
        launchers = self._launchers[slot]
        while (pending := self._queue.get()) is not None and not self._closed:
            if self._still_wanted(pending):
                self._finish(pending, self._attempt(launchers, pending.wanted))

    def _still_wanted(self, pending):
        """False when everybody who waited for this job has given up."""
        with self._lock:
            pending.waiters = [
                (future, name) for future, name in pending.waiters if not future.cancelled()
            ]
            if not pending.waiters:
                del self._pending[pending.key]
            return bool(pending.waiters)

    def _attempt(self, launchers, wanted):
        """Run a job; when the sandbox fails, again, on a fresh launcher.

        A job that has lost every fresh launcher after its program had begun is its own fault: a
        program must not be able to choose that it is not scored.
        """
        kind = wanted.kind
        reason = ""
        fresh = 0  # launchers that had run no other job
        lost = 0  # those of them that failed after the program had begun
        while fresh < _ATTEMPTS:
            if self._closed:
                return self._error("the sandbox pool was closed")
            if reason:
                self.retries += 1
                time.sleep(0.05 * fresh)

            launcher = launchers.get(kind)
            is_fresh = launcher is None or not launcher.used
            fresh += is_fresh
            try:
                if launcher is None:
                    self.replaced += bool(reason)
                    launcher = launchers[kind] = self._launch(wanted.warm)
                    launcher.wait_until_ready()
                result = self._result(launcher.run(wanted))
                if result.status != "sandbox_error":
                    return result
                reason = result.stderr.decode(errors="replace")
            except (SandboxError, OSError) as error:
                reason = str(error)
            if launcher is not None:
                lost += is_fresh and launcher.began
                del launchers[kind]
                launcher.stop()

        if lost == _ATTEMPTS and not self._closed:
            said = f"the sandbox failed each of {lost} times while it ran: {reason}"
            return self._result({"status": "crash", "stderr": said})
        return self._error(reason)

    def _launch(self, warm=None):
        launcher = _Launcher(self.folder, self.level, warm)
        self.launcher_pids.append(launcher.process.pid)
        return launcher

    def _result(self, reply):
        """Result of a launcher's reply."""
        exit_code = reply.get("returncode")
        by_signal = None
        if exit_code is not None and exit_code < 0:
            exit_code, by_signal = None, -exit_code
        return Result(
            status=reply["status"],
            stdout=reply.get("stdout", "").encode("latin-1"),
            stderr=reply.get("stderr", "").encode("latin-1", "replace"),
            exit_code=exit_code,
            signal=by_signal,
            cpu=reply.get("cpu", 0.0),
            wall=reply.get("wall", 0.0),
            peak_memory=reply.get("peak_memory", 0),
            level=self.level,
            truncated=reply.get("truncated", False),
        )

    def _error(self, reason, name=None):
        result = self._result({"status": "sandbox_error", "stderr": reason})
        return replace(result, id=name)

    def _finish(self, pending, result):
        with self._lock:
            self._pending.pop(pending.key, None)
            if result.status in _CACHED:
                self._cache.put(pending.key, result)
            waiters = pending.waiters
        for future, name in waiters:
            if future.set_running_or_notify_cancel():
                future.set_result(replace(result, id=name))


def cores():
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_level(level, require, allow_weaker):
    """The level to run at.

    SandboxError when the machine gives less than `require` and the user did not say that weaker is
    fine.
    """
    for name in (level, require):
        if name is not None and name not in LEVELS:
            choices = ", ".join(LEVELS)
            raise SandboxError(f"unknown isolation level {name!r}: choose one of {choices}")

    wanted = level or require
    if LEVELS.index(wanted) < LEVELS.index(require) and not allow_weaker:
        raise SandboxError(
            f"level {level} is weaker than the required {require}; allow_weaker=True accepts that"
        )
    if wanted == "portable":
        return wanted

    best, lacking = available_level(probe())
    if LEVELS.index(best) >= LEVELS.index(wanted):
        return wanted
    if allow_weaker:
        return best
    raise SandboxError(
        f"the sandbox cannot give {wanted} isolation here: {lacking}; "
        "python -m sandbox doctor shows more"
    )


@dataclass
class Request:
    """What a launcher is sent for a job."""

    message: bytes  # equal jobs give equal ones
    kind: str  # of launcher
    patience: float  # seconds after which the launcher must be broken
    warm: dict | None  # the stage for which a launcher of this kind has an interpreter warm


def request(job):
    """The Request for a Job; SandboxError or ValueError when it cannot be run."""
    language = load_language(job.lang)
    check_files(job.files)
    stages = language.stages(job.limits, job.run, job.files)
    files = {}
    for path, content in job.files.items():
        if isinstance(content, str):
            content = content.encode("utf-8", "replace")
        files[path] = content.decode("latin-1")

    body = {"stages": stages, "files": files, "stdin": job.stdin.decode("latin-1")}
    last = stages[-1]
    is_warm = last["warm"] is not None
    return Request(
        message=json.dumps(body, sort_keys=True).encode(),
        kind=f"{language.name} {last['warm']['alone']}" if is_warm else "",
        patience=30 + 3 * sum(stage["wall"] for stage in stages),
        warm=last if is_warm else None,
    )


def check_files(files):
    """SandboxError when these could not be written into a work folder.

    They may take half of it, so that the program has room.
    """
    size = 0
    folders = set()
    for path, content in files.items():
        if reason := _unfit(path):
            raise SandboxError(
                f"file name {path!r:.100} {reason}: it must be a plain relative path inside the "
                "work folder"
            )
        if not isinstance(content, str | bytes):
            kind = type(content).__name__
            raise SandboxError(f"file {path!r:.100} must be text or bytes, not {kind}")
        folders |= {str(parent) for parent in PurePosixPath(path).parents}
        size += len(content.encode("utf-8", "replace") if isinstance(content, str) else content)

    if both := sorted(folders & set(files)):
        raise SandboxError(f"file name {both[0]!r:.100} is also the folder of another file")
    if len(files) + len(folders) > WORK_FILES // 2:
        raise SandboxError(f"{len(files)} files are too many: give at most {WORK_FILES // 2}")
    if size > WORK_BYTES // 2:
        most = WORK_BYTES // 2 >> 20
        raise SandboxError(f"the files have {size >> 20} MiB together: give at most {most} MiB")


def _unfit(path):
    """Why no file can have this name on every system; None when one can."""
    if not isinstance(path, str):
        return f"is not text but {type(path).__name__}"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "has characters that no file name can have"
    plain = PurePosixPath(path)
    if "\0" in path or path.startswith("/") or ".." in plain.parts:
        return "leads out of the work folder or to no file"
    if not plain.parts or str(plain) != path:
        return "can be written otherwise"
    if len(encoded) > 1000 or any(len(part.encode()) > 255 for part in plain.parts):
        return "is too long"
    return None


@dataclass
class _Pending:
    """A job that waits or runs, and those who wait for it."""

    key: object
    wanted: Request
    waiters: list  # [(future, id)]


class _Cache:
    """The most recently used results, up to `size` bytes of output."""

    def __init__(self, size):
        self.size = size
        self.used = 0
        self.results = OrderedDict()

    def get(self, key):
        if key in self.results:
            self.results.move_to_end(key)
        return self.results.get(key)

    def put(self, key, result):
        self.results[key] = result
        self.used += self._weight(result)
        while self.used > self.size:
            _, oldest = self.results.popitem(last=False)
            self.used -= self._weight(oldest)

    def _weight(self, result):
        return len(result.stdout) + len(result.stderr) + 1000


class _Launcher:
    """A launcher process and the socket to it."""

    def __init__(self, parent, level, warm):
        self.folder = tempfile.mkdtemp(dir=parent)
        self.program = None  # process id of what it runs
        self.used = False  # has it been given a job?
        self.began = False  # has its job's program?
        self.bounded = False  # known once it is ready: is its work folder a file system of its own?
        self.channel, other = socket.socketpair()
        command = [sys.executable, "-I", "-S", _LAUNCHER]
        try:
            # A session of its own: Ctrl-C in the trainer's terminal must not reach it before the
            # trainer has ended it.
            with other:
                self.process = subprocess.Popen(
                    command, stdin=other, stdout=subprocess.DEVNULL, start_new_session=True, env={}
                )
        except OSError as error:
            self.channel.close()
            raise SandboxError(f"a sandbox launcher did not start: {error}") from None
        # not among the arguments, which every user of the machine can read
        settings = {"level": level, "folder": self.folder, "warm": warm}
        # sorted, as jobs are: a warm interpreter has its environment in the order of a cold one
        message = json.dumps(settings, sort_keys=True).encode()
        with contextlib.suppress(OSError):  # it died: wait_until_ready says so
            self._send(message)

    def wait_until_ready(self):
        self.channel.settimeout(60)
        try:
            self.bounded = self._receive()["bounded"]
        except (OSError, SandboxError) as error:
            raise SandboxError(f"a sandbox launcher did not start: {error}") from None

    def run(self, wanted):
        """The launcher's reply to a Request; SandboxError when it died or hangs."""
        self.channel.settimeout(wanted.patience)
        self.used = True
        try:
            self._send(wanted.message)
            while "started" in (reply := self._receive()):
                self.program = reply["started"]
                self.began = True
            self.program = None
            self.began = reply.get("began", self.began)
            return reply
        except TimeoutError:
            self.process.kill()
            raise SandboxError(
                f"a sandbox launcher gave no answer for {wanted.patience:.0f} s"
            ) from None

    def _send(self, message):
        self.channel.sendall(struct.pack("I", len(message)) + message)

    def _receive(self):
        size = struct.unpack("I", self._receive_exactly(4))[0]
        return json.loads(self._receive_exactly(size))

    def _receive_exactly(self, size):
        data = bytearray()
        while len(data) < size:
            part = self.channel.recv(size - len(data))
            if not part:
                raise SandboxError("a sandbox launcher died")
            data += part
        return data

    def hang_up(self):
        """Tell the launcher that the trainer is gone: it kills its program, cleans up and ends."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def stop(self):
        """Hang up, wait, kill what does not end, remove the work folder."""
        self.hang_up()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # killed: the program died with it, but not the program's children
        if self.program and self.process.returncode:
            with contextlib.suppress(OSError):
                os.killpg(self.program, signal.SIGKILL)
        self.channel.close()
        remove(self.folder)
