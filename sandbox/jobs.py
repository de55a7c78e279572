"""What goes into the sandbox and what comes out."""

from dataclasses import dataclass

STATUSES = (
    "ok",  # ended by itself with exit code 0; whether the answer is right is for the caller to say
    "error",  # ended by itself with another exit code
    "compile_error",  # the compiler refused the program
    "cpu_limit",
    "wall_limit",
    "memory_limit",
    "output_limit",
    "file_limit",
    # died by a signal, was killed for starting too many processes, or broke three launchers
    "crash",
    # the sandbox failed, not the program: retried, then masked from the loss, never scored 0
    "sandbox_error",
)


class SandboxError(ValueError):
    """The sandbox cannot do what was asked; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program. Sizes in bytes, times in seconds.

    cpu: of the program and all its children together.
    wall: None: 4 * cpu + 2, so that a busy machine does not fail an honest program.
    memory: resident memory of all its processes. Each one's address space is limited to this plus
        what its runtime reserves.
    output: of stdout, and as much again of stderr.
    file_size: of one file, at least the language's own. All files together are bounded by the work
        folder.
    processes: 1 forbids starting any process; None: the language's own number.
    """

    cpu: float = 1.0
    wall: float | None = None
    memory: int = 1 << 30
    output: int = 64 << 10
    file_size: int = 16 << 20
    processes: int | None = None
    open_files: int = 256

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None and name in ("wall", "processes"):
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < 1 << 60:
                raise SandboxError(f"limit {name} must be a number above 0, not {value!r}")
            if name not in ("cpu", "wall") and not isinstance(value, int):
                raise SandboxError(f"limit {name} must be a whole number, not {value!r}")


@dataclass
class Job:
    """One program to run.

    files: {relative path: text or bytes}; the main file is `load_language(lang).file`.
    limits: None: the language's own.
    run: a command whose first word is one of the language's [programs] or of the compiled files;
        None: the language's own command.
    """

    lang: str
    files: dict[str, str | bytes]
    stdin: bytes = b""
    limits: Limits | None = None
    id: object = None
    run: list[str] | None = None


@dataclass
class Result:
    """How a program ended."""

    status: str  # one of STATUSES
    stdout: bytes
    stderr: bytes  # of a sandbox_error: the reason
    exit_code: int | None  # None: it did not end by itself
    signal: int | None
    cpu: float  # seconds, compile and run together
    wall: float
    peak_memory: int  # bytes; never under about 11 MB: the launcher that it was forked from
    level: str  # portable, kernel or namespaces
    truncated: bool  # stdout or stderr was cut at limits.output
    id: object = None
