"""The trainer's side: a pool of launchers, each fed by one thread, with retries, replacement of dead launchers and a cache.

The trainer never forks: launchers are started by vfork + exec (0.6 ms from a parent of any size) as early as possible.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import PurePosixPath

from sandbox.jobs import Job, Result, SandboxError
from sandbox.languages import load_language
from sandbox.probe import LEVELS, available_level, probe

_LAUNCHER = os.path.join(os.path.dirname(__file__), "launcher.py")
_ATTEMPTS = 3
_CACHE_BYTES = 64 << 20
# These depend on the program alone; a wall limit or a sandbox error depends on how busy the machine was.
_CACHED = ("ok", "error", "compile_error", "cpu_limit", "memory_limit", "output_limit", "file_limit")


class Pool:
    """Runs jobs in `workers` launchers (default: the cores this process may use, shared among the local ranks).

    level: "portable", "kernel" or "namespaces"; default: what is required. require: the weakest level that will do; when the machine
    cannot give it, SandboxError says what is missing, unless allow_weaker. cache: equal jobs (language, files, stdin, limits, command) run
    once. Use it as a context manager, and start it before CUDA and other heavy things.
    """

    def __init__(self, workers=None, level=None, require="kernel", allow_weaker=False, cache=True):
        self.level = choose_level(level, require, allow_weaker)
        self.workers = workers or max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.retries = self.replaced = self.cache_hits = 0
        self._folder = tempfile.mkdtemp(prefix="rarecode-")
        os.chmod(self._folder, 0o711)
        self._queue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running = {}  # key -> _Pending, so that an equal job waits for the first instead of running again
        self._cache = _Cache(_CACHE_BYTES if cache else 0)
        self._closed = False
        self._launchers = [None] * self.workers
        self._threads = [threading.Thread(target=self._work, args=(slot,), daemon=True) for slot in range(self.workers)]
        try:
            self._launchers = [_Launcher(self._folder, self.level) for _ in self._launchers]
        except SandboxError:
            self.close()
            raise
        for thread in self._threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, job):
        """Future of the Result of a job, which starts as soon as a launcher is free. A program's faults are in the Result; only a wrong
        call (unknown language, missing interpreter, bad file name) raises, SandboxError or ValueError with one sentence."""
        message = request(job)
        key = hashlib.sha256(message).digest()
        future = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise SandboxError("this sandbox pool is closed")
            if found := self._cache.get(key):
                self.cache_hits += 1
                future.set_result(replace(found, id=job.id))
            elif pending := self._cache.size and self._running.get(key):
                self.cache_hits += 1
                pending.waiters.append((future, job.id))
            else:
                pending = self._running[key] = _Pending(key, message, [(future, job.id)])
                self._queue.put(pending)
        return future

    def run(self, jobs, deadline=None):
        """Results as they come. `deadline` seconds after the call everything that is not done comes back as a sandbox_error."""
        jobs = list(jobs)
        futures = {self.submit(job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures, timeout=deadline):
                yield future.result()
                del futures[future]
        except TimeoutError:
            for future, job in futures.items():
                finished = future.done()
                future.cancel()
                yield future.result() if finished else self._error(f"not done {deadline} s after the start of the batch", job.id)

    def run_all(self, jobs, deadline=None):
        """Results in the order of the jobs."""
        jobs = [replace(job, id=(number, job.id)) for number, job in enumerate(jobs)]
        results = sorted(self.run(jobs, deadline), key=lambda result: result.id[0])
        return [replace(result, id=result.id[1]) for result in results]

    def close(self):
        """End all launchers and their programs, and remove the work folders. Jobs that are not done come back as sandbox errors."""
        with self._lock:
            self._closed = True
        for thread in self._threads:
            self._queue.put(None)
        for launcher in self._launchers:
            if launcher:
                launcher.hang_up()
        for thread in self._threads:
            if thread.ident and thread is not threading.current_thread():
                thread.join(timeout=10)
        for launcher in self._launchers:
            if launcher:
                launcher.stop()
        for pending in list(self._running.values()):
            self._finish(pending, self._error("the sandbox pool was closed"))
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- one thread per launcher ----

    def _work(self, slot):
        while (pending := self._queue.get()) is not None and not self._closed:
            if self._take(pending):
                self._finish(pending, self._attempt(slot, pending))

    def _take(self, pending):
        """False when everybody who waited for this job has given up."""
        with self._lock:
            pending.waiters = [(future, name) for future, name in pending.waiters if not future.cancelled()]
            if not pending.waiters:
                del self._running[pending.key]
            return bool(pending.waiters)

    def _attempt(self, slot, pending):
        """Run a job; when the sandbox fails, again, on a fresh launcher if the old one died."""
        reason = ""
        for attempt in range(_ATTEMPTS):
            if self._closed:
                return self._error("the sandbox pool was closed")
            if attempt:
                self.retries += 1
                time.sleep(0.05 * attempt)
            try:
                if self._launchers[slot] is None:
                    self.replaced += 1
                    self._launchers[slot] = _Launcher(self._folder, self.level)
                result = self._result(self._launchers[slot].run(pending.message))
                if result.status != "sandbox_error":
                    return result
                reason = result.stderr.decode(errors="replace")
            except (SandboxError, OSError) as error:
                reason = str(error)
            self._retire(slot)
        return self._error(reason)

    def _retire(self, slot):
        launcher, self._launchers[slot] = self._launchers[slot], None
        if launcher:
            launcher.stop()

    def _result(self, reply):
        """Result of a launcher's reply."""
        code = reply.get("returncode")
        return Result(
            status=reply["status"],
            stdout=reply.get("stdout", "").encode("latin-1"),
            stderr=reply.get("stderr", "").encode("latin-1", "replace"),
            exit_code=code if code is not None and code >= 0 else None,
            signal=-code if code is not None and code < 0 else None,
            cpu=reply.get("cpu", 0.0),
            wall=reply.get("wall", 0.0),
            peak_memory=reply.get("peak_memory", 0),
            level=self.level,
            truncated=reply.get("truncated", False),
        )

    def _error(self, reason, name=None):
        return replace(self._result({"status": "sandbox_error", "stderr": reason.encode().decode("latin-1")}), id=name)

    def _finish(self, pending, result):
        with self._lock:
            self._running.pop(pending.key, None)
            if result.status in _CACHED:
                self._cache.put(pending.key, result)
            waiters = pending.waiters
        for future, name in waiters:
            if future.set_running_or_notify_cancel():
                future.set_result(replace(result, id=name))


class _Pending:
    """A job that waits or runs, and those who wait for it."""

    def __init__(self, key, message, waiters):
        self.key, self.message, self.waiters = key, message, waiters


class _Cache:
    """The most recently used results, up to `size` bytes of output."""

    def __init__(self, size):
        self.size, self.used, self.results = size, 0, OrderedDict()

    def get(self, key):
        if key in self.results:
            self.results.move_to_end(key)
        return self.results.get(key)

    def put(self, key, result):
        self.results[key] = result
        self.used += self._weight(result)
        while self.used > self.size:
            self.used -= self._weight(self.results.popitem(last=False)[1])

    def _weight(self, result):
        return len(result.stdout) + len(result.stderr) + 1000


class _Launcher:
    """A launcher process and the socket to it."""

    def __init__(self, parent, level):
        self.folder = tempfile.mkdtemp(dir=parent)
        self.channel, other = socket.socketpair()
        settings = {"level": level, "folder": self.folder}
        command = [sys.executable, "-I", "-S", _LAUNCHER, json.dumps(settings)]
        try:
            with other:  # a session of its own: Ctrl-C in the trainer's terminal must not reach it before the trainer has ended it
                self.process = subprocess.Popen(command, stdin=other, stdout=subprocess.DEVNULL, start_new_session=True, env={})
            self.channel.settimeout(60)
            self.bounded = self._receive()["bounded"]
        except (OSError, SandboxError) as error:
            self.channel.close()
            raise SandboxError(f"a sandbox launcher did not start: {error}") from None

    def run(self, message):
        """The launcher's reply to a request; SandboxError when it died or hangs."""
        size = len(message) - 8
        (patience,) = struct.unpack("d", message[:8])
        self.channel.settimeout(patience)
        try:
            self.channel.sendall(struct.pack("I", size) + message[8:])
            return self._receive()
        except TimeoutError:
            raise SandboxError(f"a sandbox launcher gave no answer for {patience:.0f} s") from None

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
        self.channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def choose_level(level, require, allow_weaker):
    """The level to run at; SandboxError when the machine gives less than `require` and the user did not say that weaker is fine."""
    for name in (level, require):
        if name is not None and name not in LEVELS:
            raise SandboxError(f"unknown isolation level {name!r}: choose one of {', '.join(LEVELS)}")
    wanted = level or require
    if LEVELS.index(wanted) < LEVELS.index(require) and not allow_weaker:
        raise SandboxError(f"level {level} is weaker than the required {require}; allow_weaker=True accepts that")
    if wanted == "portable":
        return wanted
    best, lacking = available_level(probe())
    if LEVELS.index(best) >= LEVELS.index(wanted):
        return wanted
    if allow_weaker:
        return best
    raise SandboxError(f"the sandbox cannot give {wanted} isolation here: {lacking}; python -m sandbox doctor shows more")


def request(job):
    """Bytes to send for a job: 8 bytes of patience in seconds, then JSON. Equal jobs give equal bytes."""
    stages = load_language(job.lang).stages(job.limits, job.run)
    files = {}
    for path, content in job.files.items():
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\0" in path or str(PurePosixPath(path)) != path:
            raise SandboxError(f"file name {path!r} must be a plain relative path inside the work folder")
        files[path] = (content if isinstance(content, bytes) else content.encode("utf-8", "replace")).decode("latin-1")
    body = {"stages": stages, "files": files, "stdin": job.stdin.decode("latin-1")}
    patience = 30 + sum(stage["wall"] for stage in stages)
    return struct.pack("d", patience) + json.dumps(body, sort_keys=True).encode()


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
