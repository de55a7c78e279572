"""SWI-Prolog inside the launcher: loaded once, forked per job.

The child is locked down like any other program. A start of swipl takes 12 ms of CPU
(library(clpfd) 110 ms more), a fork of this 4 ms (5 with clpfd). Nothing flows back: the child is
another process. What the child does is what `swipl -g main -t halt main.pl` does after its own
start, by the same predicates, so results are the same. When libswipl is not there or is another
version, WarmProlog raises an error that says why, and programs start cold.
"""

import contextlib
import ctypes
import os
import re
import resource
import subprocess

# Predicates of SWI-Prolog's own boot/toplevel.pl, in the order of its initialise_prolog/0
_START = """
catch(( set_prolog_gc_thread(true),
        set_prolog_flag(os_argv, {argv}),
        absolute_file_name('{file}', Path),
        set_prolog_flag(associated_file, Path),
        load_files(user:'{file}', [expand(false)]),
        '$toplevel':run_init_goals([main]),
        '$toplevel':run_program_init,
        '$toplevel':run_main_init
      ), E, '$toplevel':initialise_error(E))
"""
_NEEDED = ("run_init_goals/1", "run_program_init/0", "run_main_init/0", "initialise_error/1")


class WarmProlog:
    """A Prolog in this process.

    argv: the command line of a cold start, which ends in `-g main -t halt FILE`.
    libraries: are loaded, but not imported.
    """

    def __init__(self, program, argv, libraries, environment):
        os.environ.clear()
        os.environ.update(environment)
        # a cold start sees its limit when it starts, and sizes its stacks by it
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, hard))

        self.argv = argv
        self.library = ctypes.CDLL(_find_library(program), ctypes.RTLD_GLOBAL)
        self.library.PL_new_term_ref.restype = ctypes.c_size_t
        self.library.PL_chars_to_term.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self.library.PL_call.argtypes = [ctypes.c_size_t, ctypes.c_void_p]

        # As on the command line, but without the file, and with `true` in place of `main`.
        words = [word.encode() for word in argv[:-1]]
        words[words.index(b"main")] = b"true"
        c_words = (ctypes.c_char_p * (len(words) + 1))(*words, None)
        with _program_streams():
            if not self.library.PL_initialise(len(words), c_words):
                raise RuntimeError("libswipl did not start")

        # a thread would be lost by the fork, and `halt` wait for it; the child may have one
        self._call("set_prolog_gc_thread(false)")
        for name in _NEEDED:
            if not self._call(f"current_predicate('$toplevel':{name})"):
                raise RuntimeError(f"this version of SWI-Prolog has no {name}")
        for name in libraries:
            if not self._call(f"catch(use_module(library({name}), []), _, fail)"):
                raise RuntimeError(f"library({name}) did not load")

    def ready(self):
        """True when a fork is safe: no thread but this one."""
        return len(os.listdir("/proc/self/task")) == 1

    def run_in_child(self):
        """Continue as `swipl` would; never returns."""
        argv = "[" + ",".join(f"'{word}'" for word in self.argv) + "]"
        started = self._call(_START.format(argv=argv, file=self.argv[-1]))
        ended_well = started and self.library.PL_toplevel()
        self.library.PL_halt(0 if ended_well else 1)

    def _call(self, goal):
        term = self.library.PL_new_term_ref()
        if not self.library.PL_chars_to_term(goal.encode(), term):
            return False
        return self.library.PL_call(term, None)


def _find_library(program):
    """Path of the libswipl that belongs to this swipl."""
    command = [program, "--dump-runtime-variables"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    variables = dict(re.findall(r'^(\w+)="(.*)";$', ran.stdout, re.MULTILINE))
    path = variables.get("PLLIBSWIPL", "")
    if not os.path.isfile(path):
        raise RuntimeError(f"{program} names no libswipl")
    return path


@contextlib.contextmanager
def _program_streams():
    """Streams of the kind that programs get (not a terminal, not a file), while Prolog looks."""
    saved = [os.dup(number) for number in range(3)]
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    try:
        yield
    finally:
        for number, descriptor in enumerate(saved):
            os.dup2(descriptor, number)
        for descriptor in (*saved, reader, writer):
            os.close(descriptor)
