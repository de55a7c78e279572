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
    "crash",  # died by a signal, or was killed for starting too many processes
    "sandbox_error",  # the sandbox failed, not the program: retried, then masked from the loss, never scored 0
)


class SandboxError(ValueError):
    """The sandbox cannot do what was asked; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program. Sizes in bytes, times in seconds; processes None means the language's own number."""

    cpu: float = 1.0  # CPU seconds of the program and all its children together
    wall: float | None = (
        None  # None: 4 * cpu + 2, so that a busy machine does not fail an honest program
    )
    memory: int = (
        1 << 30
    )  # resident memory of all its processes; each one's address space is limited to this plus what its runtime reserves
    output: int = 64 << 10  # of stdout, and as much again of stderr
    file_size: int = (
        16 << 20
    )  # of one file, at least the language's own; all files together are bounded by the work folder
    processes: int | None = None  # 1 forbids starting any process
    open_files: int = 256

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None and name in ("wall", "processes"):
                continue
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not 0 < value < 1 << 60
            ):
                raise SandboxError(f"limit {name} must be a number above 0, not {value!r}")
            if name not in ("cpu", "wall") and not isinstance(value, int):
                raise SandboxError(f"limit {name} must be a whole number, not {value!r}")


@dataclass
class Job:
    """One program to run. `files` holds {relative path: text or bytes}; the language's main file is `load_language(lang).file`."""

    lang: str
    files: dict[str, str | bytes]
    stdin: bytes = b""
    limits: Limits | None = None  # None: the language's own
    id: object = None
    run: list[str] | None = (
        None  # None: the language's own command; the first word is one of its [programs] or of the compiled files
    )


@dataclass
class Result:
    """How a program ended. `stderr` of a sandbox_error is the reason."""

    status: str  # one of STATUSES
    stdout: bytes
    stderr: bytes
    exit_code: int | None  # None: it did not end by itself
    signal: int | None
    cpu: float  # seconds, compile and run together
    wall: float
    peak_memory: (
        int  # bytes; never under about 11 MB, which is the launcher that it was forked from
    )
    level: str  # portable, kernel or namespaces
    truncated: bool  # stdout or stderr was cut at limits.output
    id: object = None
