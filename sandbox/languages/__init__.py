"""Languages: one TOML file each in this folder; adding one touches nothing else.

A command in a TOML starts with a name of its [programs] table, whose candidates are looked up on
PATH (or taken from the environment variable RARECODE_NAME), or with "./name" for what its compile
command made.
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

# What every program may read; the rest of /proc, /sys, /etc and all homes stay closed. Julia aborts
# without the first of /proc and that of /sys; the others of /proc say what system calls say too
# (uname, getrandom, sysinfo). Those of /etc hold what a distribution puts there: Python's
# mimetypes fails where it may not read a list that is there, R asks for the name of the time zone.
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
    "/etc/locale.alias",
    "/etc/mime.types",
    "/etc/os-release",
    "/etc/timezone",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
    "/proc/stat",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/random/uuid",
    "/sys/devices/system/cpu",
)
LOADERS = (
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/ld-linux-aarch64.so.1",
    "/lib/ld-musl-x86_64.so.1",
    "/lib/ld-musl-aarch64.so.1",
)
# And HOME, TMPDIR, TMP and TEMP: the work folder. The same on every machine, so that no answer
# depends on who runs the trainer where.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "USER": "program",
    "LOGNAME": "program",
}


def language_names():
    """Names of all languages, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def language_of(language):
    """A Language, from itself or its name."""
    return load_language(language) if isinstance(language, str) else language


@functools.cache
def load_language(name):
    """The Language of a name or an alias, in any case; ValueError with all names if none has it."""
    wanted = name.lower()
    path = FOLDER / f"{wanted}.toml"
    if re.fullmatch(r"[\w+-]+", wanted) and path.is_file():
        return _load(path)
    for path in sorted(FOLDER.glob("*.toml")):
        language = _load(path)
        if wanted in language.aliases:
            return language
    raise ValueError(
        f"unknown language {name!r}: choose one of {', '.join(language_names())} "
        "(a new one is one file in sandbox/languages/)"
    )


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
    header: str = ""  # a line that a program must begin with, such as "#lang racket" (headers.py)
    block_comment: list[str] = field(default_factory=list)  # what opens and closes one
    nested_comments: bool = False  # a block comment holds others
    quotes: str = "\"'"  # each opens and closes a string
    defines: str = ""  # a regular expression that finds a definition of NAME
    aliases: list[str] = field(default_factory=list)
    compile: list[str] | None = None
    # syntax check. It should run nothing of the program: one that must says {nonce} after it
    check: list[str] | None = None
    version: list[str] | None = None
    limits: Limits = Limits()
    compile_limits: Limits = Limits(cpu=10.0, file_size=64 << 20, processes=64)
    address_space: int = 0  # what the runtime reserves beyond its memory limit, bytes
    isolation: dict = field(default_factory=dict)  # read, execute: more folders; environment
    # libraries of a warm interpreter (warm_prolog.py) that stands in for `run`
    warm: dict = field(default_factory=dict)
    answer: dict = field(default_factory=dict)  # rewards.py
    render: dict = field(default_factory=dict)  # tasks/render.py
    call: dict = field(default_factory=dict)  # calls.py, values.py, selfplay/

    def missing(self):
        """One sentence that says what to install, or None when all programs are here."""
        for name, candidates in self.programs.items():
            if find_program(name, tuple(candidates)) is None:
                return self._what_to_install(name)
        return None

    def _what_to_install(self, program):
        variable = f"RARECODE_{program.upper()}"
        if given := os.environ.get(variable):
            who = "every user" if os.geteuid() == 0 else "you"
            return f"{variable}={given} is not a program that {who} can start"

        hints = []
        if package := self.install.get("debian"):
            hints.append(f"apt-get install {package}")
        if package := self.install.get("brew"):
            hints.append(f"brew install {package}")
        advice = [" or ".join(hints), self.install.get("note", "")]
        advice = "; ".join(part for part in advice if part)
        return f"{self.programs[program][0]} not found: {advice} (or set {variable} to its path)"

    def stages(self, limits=None, run=None, files=None):
        """What the launcher runs, one after another: the compile command if any, then the program.

        limits, run: None: the language's own.
        files: {name: text or bytes}, which decide what warm interpreter may stand in.
        SandboxError when an interpreter is missing.
        """
        if sentence := self.missing():
            raise SandboxError(sentence)

        stages = []
        if self.compile and not run:
            stages.append(_stage(self, self.compile, self.compile_limits))
        last = _stage(self, run or self.run, limits or self.limits)
        last["last"] = True
        last["warm"] = None
        if not run and files is not None:
            last["warm"] = self._warm_libraries(files)
        return [*stages, last]

    def _warm_libraries(self, files):
        """What a warm interpreter for these files has loaded.

        alone: the library for which it must be a launcher of its own, or "".
        """
        if not self.warm:
            return None
        text = ""
        for content in files.values():
            text += content if isinstance(content, str) else content.decode("latin-1")
            text += "\n"

        libraries = list(self.warm["always"])
        for name in self.warm.get("when_mentioned", ()):
            if name in text:
                return {"libraries": [*libraries, name], "alone": name}
        return {"libraries": libraries, "alone": ""}


# ---- what the launcher is told ----


def _stage(language, command, limits):
    """What the launcher needs to know to run one command.

    "{name}" of a program stands for its real path.
    """
    found = {}
    for program, candidates in language.programs.items():
        found[program] = find_program(program, tuple(candidates))
    name, *words = command
    if name not in found and not name.startswith("./"):
        raise SandboxError(
            f"a command of {language.name} must start with one of {', '.join(found)}, ./FILE; "
            f"not {name!r}"
        )

    isolation = language.isolation
    read = [*SYSTEM_READ, *_places(tuple(isolation.get("read", ())))]
    execute = [*LOADERS, *_places(tuple(isolation.get("execute", ())))]
    for program in found.values():
        real = _real(program)
        read += _home(real)
        execute += [real, *_script(real)]

    argv = [found.get(name, name)]
    argv += [_fill(word, found) for word in words]
    environment = dict(ENVIRONMENT)
    for key, text in isolation.get("environment", {}).items():
        environment[key] = _fill(text, found)

    return {
        "program": _real(found[name]) if name in found else name,
        "argv": argv,
        "environment": environment,
        "read": read,
        "execute": execute,
        "run_work": language.compile is not None,
        "cpu": limits.cpu,
        "wall": 4 * limits.cpu + 2 if limits.wall is None else limits.wall,
        "memory": limits.memory,
        "address_space": limits.memory + language.address_space,
        "output": limits.output,
        # never less than the runtime itself needs
        "file_size": max(limits.file_size, language.limits.file_size),
        "processes": limits.processes or language.limits.processes or 1,
        "open_files": limits.open_files,
        "last": False,
    }


def _fill(text, found):
    """Text with places such as "{R}/../lib" filled in: the lib folder beside R's real path."""

    def place(match):
        program, rest = match.groups()
        if program not in found:
            return match[0]
        return os.path.normpath(_real(found[program]) + rest)

    return re.sub(r"\{(\w+)\}((?:/[\w.-]+)*)", place, text)


@functools.cache
def _real(program):
    """An interpreter's real path: looked up for every job it took a third of submitting one."""
    return os.path.realpath(program)


@functools.cache
def _places(patterns):
    """Real paths of patterns such as /usr/lib/llvm-*/bin and of tools by name, if they are here."""
    places = []
    for pattern in patterns:
        if "/" in pattern:
            places += glob.glob(pattern)
        elif tool := shutil.which(pattern):
            places.append(tool)
    return [os.path.realpath(place) for place in places]


@functools.cache
def find_program(name, candidates):
    """Path of the first candidate that is here and that a program may start, or None.

    candidates: names, paths or patterns of paths, a tuple. The environment's RARECODE_NAME goes
        before all of them.
    """
    given = os.environ.get(f"RARECODE_{name.upper()}")
    for candidate in [given] if given else candidates:
        if os.sep in candidate:
            paths = sorted(glob.glob(candidate), reverse=True)
        else:
            paths = [os.path.join(folder, candidate) for folder in os.get_exec_path()]
        for path in paths:
            # a version manager's stand-in only finds the interpreter with the user's home and
            # environment
            stand_in = "/shims/" in path or "/.cargo/" in path
            if os.path.isfile(path) and not stand_in and _open_to_all(os.path.realpath(path)):
                return path
    return None


def _open_to_all(path):
    """Programs of root run as a user of their own, which must be able to reach the interpreter."""
    if not os.access(path, os.R_OK):
        return False
    if os.geteuid() != 0:
        return True
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).parents)


@functools.cache
def _home(program):
    """What an interpreter outside the system's own places needs to read, but never a home.

    That is the folder that holds its bin folder.
    """
    folder = os.path.dirname(program)
    prefix = os.path.dirname(folder) if os.path.basename(folder) == "bin" else folder
    if folder in ("/usr/bin", "/bin", "/usr/local/bin") or prefix in ("/", "/usr", "/usr/local"):
        return [program]
    if Path.home().is_relative_to(prefix):
        return [program]
    return [prefix]


@functools.cache
def _script(program):
    """A script also needs to execute the interpreter in its first line, and what lies beside it."""
    with open(program, "rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!"):
        return []
    interpreter = first[2:].decode(errors="replace").split()[0]
    return [os.path.realpath(interpreter), *_home(program)]


# ---- reading a TOML ----


@functools.cache
def _load(path):
    where = f"sandbox/languages/{path.name}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid TOML: {error}") from None

    if "limits" in table:
        table["limits"] = _limits(table["limits"], Limits(), where)
    if "compile_limits" in table:
        default = Language.compile_limits
        table["compile_limits"] = _limits(table["compile_limits"], default, where)
    if "address_space" in table:
        table["address_space"] = _size(table["address_space"])

    known = {entry.name for entry in fields(Language)}
    unknown = sorted(set(table) - known - {"name"})
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}")
    try:
        return Language(name=path.stem, **table)
    except TypeError as error:  # "Language.__init__() missing 1 required ...", or two names
        raise ValueError(f"{where}: {str(error).partition(') ')[2] or error}") from None


def _limits(table, default, where):
    known = {entry.name for entry in fields(Limits)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"{where}: unknown limit {unknown[0]!r}")
    given = {name: _size(value) for name, value in table.items()}
    return Limits(**vars(default) | given)


def _size(value):
    """512 or "512 MiB" -> bytes."""
    if not isinstance(value, str):
        return value
    number, unit = value.split()
    bits = {"KiB": 10, "MiB": 20, "GiB": 30}
    return int(number) << bits[unit]
