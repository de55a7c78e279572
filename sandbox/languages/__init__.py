"""Languages: one TOML file each in this folder; adding one touches nothing else.

A command in a TOML starts with a name of its [programs] table, whose candidates are looked up on PATH (or taken from the environment
variable RARECODE_NAME), or with "./name" for what its compile command made.
"""

import functools
import glob
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
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/share",
    "/usr/local/lib",
    "/usr/local/share",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
    "/proc/stat",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
)
LOADERS = (
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/ld-linux-aarch64.so.1",
    "/lib/ld-musl-x86_64.so.1",
    "/lib/ld-musl-aarch64.so.1",
)
ENVIRONMENT = {  # and HOME and TMPDIR: the work folder
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
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
    check: list[str] | None = (
        None  # syntax check; it may run code of the program, so it is a job like any other
    )
    version: list[str] | None = None
    limits: Limits = Limits()
    compile_limits: Limits = Limits(cpu=10.0, file_size=64 << 20, processes=64)
    address_space: int = 0  # what the runtime reserves beyond its memory limit, bytes
    isolation: dict = field(default_factory=dict)  # read, execute: more folders; environment
    warm: dict = field(
        default_factory=dict
    )  # libraries of a warm interpreter (warm_prolog.py) that stands in for `run`
    answer: dict = field(default_factory=dict)  # rewards.py
    render: dict = field(default_factory=dict)  # tasks.py
    call: dict = field(default_factory=dict)  # selfplay.py

    def missing(self):
        """One sentence that says what to install, or None when all programs are here."""
        for name, candidates in self.programs.items():
            if _find(name, tuple(candidates)) is None:
                if given := os.environ.get(f"RARECODE_{name.upper()}"):
                    return f"RARECODE_{name.upper()}={given} is no program that {'every user' if os.geteuid() == 0 else 'you'} can start"
                hint = " or ".join(
                    filter(
                        None,
                        (
                            self._hint("apt-get install", "debian"),
                            self._hint("brew install", "brew"),
                        ),
                    )
                )
                note = self.install.get("note", "")
                return f"{candidates[0]} not found: {'; '.join(filter(None, (hint, note)))} (or set RARECODE_{name.upper()} to its path)"
        return None

    def _hint(self, command, key):
        return f"{command} {self.install[key]}" if self.install.get(key) else ""

    def stages(self, limits=None, run=None, files=None):
        """What the launcher runs, one after another: the compile command if there is one, then the program. SandboxError when missing.

        `files` {name: text or bytes} decide which warm interpreter may stand in."""
        if sentence := self.missing():
            raise SandboxError(sentence)
        stages = (
            [_stage(self, self.compile, self.compile_limits)] if self.compile and not run else []
        )
        last = _stage(self, run or self.run, limits or self.limits)
        return [
            *stages,
            last
            | {"last": True, "warm": None if run or files is None else self._warm_libraries(files)},
        ]

    def _warm_libraries(self, files):
        """What a warm interpreter for these files has loaded, and the library for which it must be a launcher of its own."""
        if not self.warm:
            return None
        text = "\n".join(
            part if isinstance(part, str) else part.decode("latin-1") for part in files.values()
        )
        alone = next((name for name in self.warm.get("when_mentioned", ()) if name in text), "")
        return {"libraries": [*self.warm["always"], *filter(None, [alone])], "alone": alone}


def _stage(language, command, limits):
    """What the launcher needs to know to run one command; "{name}" of a program stands for its real path."""
    found = {name: _find(name, tuple(candidates)) for name, candidates in language.programs.items()}
    name, isolation = command[0], language.isolation
    if name not in found and not name.startswith("./"):
        raise SandboxError(
            f"a command of {language.name} must start with one of {', '.join(found)}, ./FILE; not {name!r}"
        )
    environment = {
        key: _fill(text, found) for key, text in isolation.get("environment", {}).items()
    }
    read = [path for program in found.values() for path in _home(os.path.realpath(program))]
    execute = [
        path
        for program in found.values()
        for path in (os.path.realpath(program), *_script(os.path.realpath(program)))
    ]
    return {
        "program": os.path.realpath(found[name]) if name in found else name,
        "argv": [found.get(name, name), *(_fill(word, found) for word in command[1:])],
        "environment": ENVIRONMENT | environment,
        "read": [*SYSTEM_READ, *_places(tuple(isolation.get("read", ()))), *read],
        "execute": [*LOADERS, *_places(tuple(isolation.get("execute", ()))), *execute],
        "run_work": language.compile is not None,
        "cpu": limits.cpu,
        "wall": 4 * limits.cpu + 2 if limits.wall is None else limits.wall,
        "memory": limits.memory,
        "address_space": limits.memory + language.address_space,
        "output": limits.output,
        "file_size": max(
            limits.file_size, language.limits.file_size
        ),  # never less than the runtime itself needs
        "processes": limits.processes or language.limits.processes or 1,
        "open_files": limits.open_files,
        "last": False,
    }


def _fill(text, found):
    """Text with "{R}/../lib" replaced by the folder that is meant: the real path of R, two up, lib."""
    path = r"\{(\w+)\}((?:/[\w.-]+)*)"
    return re.sub(
        path,
        lambda match: (
            os.path.normpath(os.path.realpath(found[match[1]]) + match[2])
            if match[1] in found
            else match[0]
        ),
        text,
    )


@functools.cache
def _places(patterns):
    """Real paths of patterns such as /usr/lib/llvm-*/bin and of tools by name, as far as they are here."""
    places = [
        place
        for pattern in patterns
        for place in (glob.glob(pattern) if "/" in pattern else [shutil.which(pattern)])
    ]
    return [os.path.realpath(place) for place in places if place]


@functools.cache
def _find(name, candidates):
    """Path of the first candidate that is here and that a program may start, or of RARECODE_NAME; None when there is none."""
    given = os.environ.get(f"RARECODE_{name.upper()}")
    for candidate in [given] if given else candidates:
        if os.sep in candidate:
            paths = sorted(glob.glob(candidate), reverse=True)
        else:
            paths = [os.path.join(folder, candidate) for folder in os.get_exec_path()]
        for path in filter(os.path.isfile, paths):
            # a version manager's stand-in only finds the interpreter with the user's home and environment
            if (
                "/shims/" not in path
                and "/.cargo/" not in path
                and _open_to_all(os.path.realpath(path))
            ):
                return path
    return None


def _open_to_all(path):
    """Programs of root run as a user of their own, which must be able to reach the interpreter."""
    if not os.access(path, os.R_OK):
        return False
    return os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in Path(path).parents)


@functools.cache
def _home(program):
    """Folders that an interpreter outside the system's own places needs to read: the one that holds its bin folder, but never a home."""
    folder = os.path.dirname(program)
    prefix = os.path.dirname(folder) if os.path.basename(folder) == "bin" else folder
    system = folder in ("/usr/bin", "/bin", "/usr/local/bin") or prefix in (
        "/",
        "/usr",
        "/usr/local",
    )
    return [program] if system or Path.home().is_relative_to(prefix) else [prefix]


@functools.cache
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
    raise ValueError(
        f"unknown language {name!r}: choose one of {', '.join(language_names())} (a new one is one file in sandbox/languages/)"
    )


@functools.cache
def _read(path):
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"sandbox/languages/{path.name} is not valid TOML: {error}") from None
    for key in ("limits", "compile_limits"):
        if key in table:
            table[key] = _limits(
                table[key], Language.compile_limits if key == "compile_limits" else Limits(), path
            )
    if "address_space" in table:
        table["address_space"] = _size(table["address_space"])
    unknown = sorted(set(table) - {f.name for f in fields(Language)} - {"name"})
    if unknown:
        raise ValueError(f"sandbox/languages/{path.name}: unknown key {unknown[0]!r}")
    try:
        return Language(name=path.stem, **table)
    except TypeError as error:
        raise ValueError(
            f"sandbox/languages/{path.name}: {str(error).partition(') ')[2] or error}"
        ) from None


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


def language_of(language):
    """A Language, from itself or its name."""
    return load_language(language) if isinstance(language, str) else language
