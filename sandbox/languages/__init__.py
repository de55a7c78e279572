"""Languages: one TOML file each in this folder; adding one touches nothing else.

A command in a TOML starts with a name of its [programs] table, whose candidates are looked up on PATH (or taken from the environment
variable RARECODE_NAME), or with "./name" for what its compile command made.
"""

import functools
import os
import re
import shutil
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from sandbox.jobs import Limits, SandboxError

FOLDER = Path(__file__).parent

# What every program may read; the rest of /proc, /sys, /etc and all homes stay closed. Julia aborts without the /proc and /sys ones.
SYSTEM_READ = (
    "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share", "/usr/local/lib", "/usr/local/share", "/lib", "/lib64",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero", "/proc/stat", "/proc/cpuinfo", "/proc/meminfo",
    "/sys/devices/system/cpu",
)  # fmt: skip
LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1", "/lib/ld-musl-x86_64.so.1", "/lib/ld-musl-aarch64.so.1")
ENVIRONMENT = {  # and HOME and TMPDIR: the work folder
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Language:
    """One language, as in its TOML."""

    name: str
    title: str  # as in prose: "Prolog"
    file: str  # name of the main file
    run: list[str]
    programs: dict[str, list[str]]
    install: dict[str, str]  # debian, brew, note
    fixtures: dict[str, str]  # pass, wrong, error, loop: main files that the tests run
    fence: list[str]  # marks after ``` in Markdown
    comment: str  # starts a comment to the end of the line
    aliases: list[str] = field(default_factory=list)
    compile: list[str] | None = None
    check: list[str] | None = None  # syntax check; it may run code of the program, so it is a job like any other
    version: list[str] | None = None
    limits: Limits = Limits()
    compile_limits: Limits = Limits(cpu=10.0, file_size=64 << 20, processes=64)
    address_space: int = 0  # what the runtime reserves beyond its memory limit, bytes
    isolation: dict = field(default_factory=dict)  # read, execute: more folders; environment
    warm: bool = False  # a warm interpreter stands in for `run`: warm_NAME.py
    answer: dict = field(default_factory=dict)  # rewards.py
    render: dict = field(default_factory=dict)  # tasks.py
    call: dict = field(default_factory=dict)  # selfplay.py

    def missing(self):
        """One sentence that says what to install, or None when all programs are here."""
        for name, candidates in self.programs.items():
            if _find(name, tuple(candidates)) is None:
                hint = " or ".join(filter(None, (self._hint("apt-get install", "debian"), self._hint("brew install", "brew"))))
                note = self.install.get("note", "")
                return f"{candidates[0]} not found: {'; '.join(filter(None, (hint, note)))} (or set RARECODE_{name.upper()} to its path)"
        return None

    def _hint(self, command, key):
        return f"{command} {self.install[key]}" if self.install.get(key) else ""

    def stages(self, limits=None, run=None):
        """What the launcher runs, one after another: the compile command if there is one, then the program. SandboxError when missing."""
        if sentence := self.missing():
            raise SandboxError(sentence)
        stages = [_stage(self, self.compile, self.compile_limits)] if self.compile and not run else []
        last = _stage(self, run or self.run, limits or self.limits)
        warm = self.name if self.warm and not run else None
        return [*stages, last | {"last": True, "warm": warm}]


def _stage(language, command, limits):
    argv = list(command)
    if argv[0] in language.programs:
        argv[0] = _find(argv[0], tuple(language.programs[argv[0]]))
    elif not argv[0].startswith("./"):
        known = ", ".join([*language.programs, "./FILE"])
        raise SandboxError(f"a command of {language.name} must start with one of {known}, not {argv[0]!r}")
    read, execute = list(SYSTEM_READ) + language.isolation.get("read", []), list(LOADERS) + language.isolation.get("execute", [])
    for name, candidates in language.programs.items():
        program = _find(name, tuple(candidates))
        read += _home(program)
        execute += [program, *_script(program)]
    return {
        "argv": argv,
        "environment": ENVIRONMENT | language.isolation.get("environment", {}),
        "read": read,
        "execute": execute,
        "run_work": language.compile is not None,
        "cpu": limits.cpu,
        "wall": 4 * limits.cpu + 2 if limits.wall is None else limits.wall,
        "memory": limits.memory,
        "address_space": limits.memory + language.address_space,
        "output": limits.output,
        "file_size": limits.file_size,
        "processes": limits.processes or language.limits.processes or 1,
        "open_files": limits.open_files,
        "last": False,
    }


@functools.cache
def _find(name, candidates):
    """Real path of the first candidate on PATH, or of RARECODE_NAME; None when there is none that a program may start."""
    given = os.environ.get(f"RARECODE_{name.upper()}")
    for candidate in [given] if given else candidates:
        for folder in [None] if os.sep in candidate else os.get_exec_path():
            found = shutil.which(candidate, path=folder)
            # A version manager's stand-in needs the network or the user's home; a link to a file of another name is one too (rustup).
            if found and "/shims/" not in found and "/.cargo/" not in found and _open_to_all(os.path.realpath(found)):
                return os.path.realpath(found)
    return None


def _open_to_all(path):
    """Programs of root run as a user of their own, which must be able to reach the interpreter."""
    if os.geteuid() != 0:
        return True
    parents = [path, *map(str, Path(path).parents)]
    return all(os.stat(parent).st_mode & 0o001 for parent in parents)


def _home(program):
    """Folders that an interpreter outside the system's own places needs to read: the one that holds its bin folder, but never a home."""
    folder = os.path.dirname(program)
    prefix = os.path.dirname(folder) if os.path.basename(folder) == "bin" else folder
    if prefix in ("/", "/usr", "/usr/local") or folder in ("/usr/bin", "/bin", "/usr/local/bin"):
        return [program]
    if Path.home().is_relative_to(prefix):
        return [program]
    return [prefix]


def _script(program):
    """A script also needs to execute the interpreter in its first line, and what lies beside it."""
    with open(program, "rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!"):
        return []
    interpreter = first[2:].decode(errors="replace").split()[0]
    return [os.path.realpath(interpreter), *_home(program)]


def language_names():
    """Names of all languages, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@functools.cache
def load_language(name):
    """The Language of a name or an alias, in any case; ValueError with the names when there is none."""
    wanted = name.lower()
    if (FOLDER / f"{wanted}.toml").is_file() and re.fullmatch(r"[\w+-]+", wanted):
        return _read(FOLDER / f"{wanted}.toml")
    for path in sorted(FOLDER.glob("*.toml")):
        language = _read(path)
        if wanted in language.aliases:
            return language
    raise ValueError(f"unknown language {name!r}: choose one of {', '.join(language_names())} (a new one is one file in sandbox/languages/)")


@functools.cache
def _read(path):
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"sandbox/languages/{path.name} is not valid TOML: {error}") from None
    for key in ("limits", "compile_limits"):
        if key in table:
            table[key] = _limits(table[key], Language.compile_limits if key == "compile_limits" else Limits(), path)
    if "address_space" in table:
        table["address_space"] = _size(table["address_space"])
    unknown = sorted(set(table) - {f.name for f in fields(Language)} - {"name"})
    if unknown:
        raise ValueError(f"sandbox/languages/{path.name}: unknown key {unknown[0]!r}")
    try:
        return Language(name=path.stem, **table)
    except TypeError as error:
        raise ValueError(f"sandbox/languages/{path.name}: {str(error).partition(') ')[2] or error}") from None


def _limits(table, default, path):
    unknown = sorted(set(table) - {f.name for f in fields(Limits)})
    if unknown:
        raise ValueError(f"sandbox/languages/{path.name}: unknown limit {unknown[0]!r}")
    return Limits(**vars(default) | {key: _size(value) for key, value in table.items()})


def _size(value):
    """512 or "512 MiB" -> bytes."""
    if not isinstance(value, str):
        return value
    number, unit = value.split()
    return int(number) << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]
