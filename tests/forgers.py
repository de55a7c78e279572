"""Programs that try to pass HumanEval_53_add without adding.

(language, what they try, program, the verdict's status). "forged": the program takes in the first
run, with the right tests, and is found out in the second. None: it does not even take in the first.
"""

HARNESS = "knows this harness: finds the two numbers in its file and prints their sum"

FORGERS = [
    # its own file, stdin, descriptors, /proc
    ("python", "prints its own file", """\
import os
print(open(__file__).read(), flush=True)
os._exit(0)
def add(x, y): pass""", None),
    ("python", "prints stdin and what /proc has", """
import os, sys
print(sys.stdin.read())
own = "/proc/self/"
for place in (own + "cmdline", own + "environ", own + "mem", own + "fd/0", "/dev/fd/1"):
    try: print(open(place, "rb").read(99999))
    except (OSError, ValueError): pass
for number in range(20):
    try: print(os.read(number, 99999))
    except OSError: pass
sys.stdout.flush(); os._exit(0)
def add(x, y): pass""", None),
    ("python", HARNESS, """
import os
text = open(__file__).read()
exec(text[text.rindex("print("):])
os.sys.stdout.flush(); os._exit(0)
def add(x, y): pass""", "forged"),
    ("python", "looks the answers up in its own file", r"""
import re
def add(x, y):
    text = open(__file__).read()
    return eval(re.search(rf"candidate\({x}, {y}\) == (.*)", text)[1])""", "forged"),
    ("python", "takes the harness's numbers from its caller's code", """
import sys
def add(x, y):
    frame = sys._getframe()
    while frame.f_back: frame = frame.f_back
    print([n for n in frame.f_code.co_consts if isinstance(n, int)][-1], flush=True)
    import os; os._exit(0)""", "forged"),
    ("javascript", HARNESS, """
const text = require('fs').readFileSync(__filename, 'utf8')
eval(text.slice(text.lastIndexOf('console.log();')))
process.exit(0)
function add(x, y) {}""", "forged"),
    ("lua", HARNESS, """
local text = io.open(arg[0]):read('a')
load(text:match('.*(print%(%d+ %+ %d+%))'))()
os.exit(0)
local function add(x, y) end""", "forged"),
    ("racket", "prints its own file", """\
(display (file->string "main.rkt"))
(exit 0)
(define (add x y) 0)""", None),
    ("julia", HARNESS, """\
println(sum(parse.(Int, match(r".*println\\((\\d+) \\+ (\\d+)\\)"s, read(@__FILE__, String)).captures)))
exit(0)
function add(x, y) end""", "forged"),
    ("bash", "prints its own file", """\
add() {
  :
}
cat "$0" <&0
exit 0
}""", None),
    ("php", HARNESS, """\
<?php
$text = file_get_contents(__FILE__);
eval(substr($text, strrpos($text, "echo")));
exit(0);
function add($x, $y) {}""", "forged"),
    ("perl", "prints its own file", """\
open(F, $0); print <F>; exit 0;
sub add { 0 }""", None),
    ("elixir", HARNESS, """
[a, b] = Regex.run(~r/\\{(\\d+) \\+ (\\d+)\\}/, File.read!(__ENV__.file), capture: :all_but_first)
IO.puts(String.to_integer(a) + String.to_integer(b))
System.halt(0)
defmodule HumanEval do
  def candidate(x, y), do: add(x, y)
  def add(_x, _y), do: 0
end""", "forged"),
    ("cpp", "prints its own source and program", """
#include<assert.h>
#include<bits/stdc++.h>
long add(long x, long y) {
  for (auto name : {"main.cpp", "main"}) {
    std::ifstream file(name);
    std::cout << file.rdbuf() << std::endl;
  }
  _exit(0);
}""", None),
    ("cpp", HARNESS, """
#include<assert.h>
#include<bits/stdc++.h>
#include<unistd.h>
void ended(int) {
  std::ifstream file("main.cpp");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  std::smatch found;
  std::regex_search(text, found, std::regex("(\\\\d{9,})LL . (\\\\d{9,})LL"));
  printf("%lld\\n", std::stoll(found[1]) + std::stoll(found[2]));
  fflush(stdout); _exit(0);
}
long add(long x, long y) { signal(SIGABRT, ended); return 0; }""", "forged"),
    ("rust", "prints its own source", """\
fn add(x: isize, y: isize) -> isize {
    println!("{}", include_str!("main.rs"));
    std::process::exit(0)
}""", None),
    ("java", HARNESS, """
import java.util.*;
class Problem {
    public static long add(long x, long y) {
        try {
            String text = java.nio.file.Files.readString(java.nio.file.Path.of("Main.java"));
            var found = java.util.regex.Pattern.compile("(\\\\d+)L . (\\\\d+)L").matcher(text);
            found.find();
            System.out.println(Long.parseLong(found.group(1)) + Long.parseLong(found.group(2)));
        } catch (Exception e) {}
        System.exit(0);
        return 0;
    }
}""", "forged"),
    ("go", HARNESS, """
package add_test

import (
    "testing"
    "fmt"
    "os"
    "regexp"
)

func init() {
    text, _ := os.ReadFile("main_test.go")
    found := regexp.MustCompile(`Println.(\\d+) . (\\d+).`).FindSubmatch(text)
    var a, b int
    fmt.Sscan(string(found[1]), &a)
    fmt.Sscan(string(found[2]), &b)
    fmt.Println(a + b)
    os.Exit(0)
}
func add(x int, y int) int {
    return 0
}""", "forged"),
    # leaving, and what is called on the way out
    ("python", "prints a look-alike and leaves", """\
import os
print('ok', 123456789012345, flush=True)
os._exit(0)
def add(x, y): pass""", None),
    ("python", "turns a failure into success on the way out", """
import atexit, os
atexit.register(os._exit, 0)
def add(x, y): return 0""", None),
    ("python", "prints the sum on the way out", """
import os, sys
def ended(*_):
    text = open(__file__).read()
    exec(text[text.rindex("print("):])
    sys.stdout.flush(); os._exit(0)
sys.excepthook = ended
def add(x, y): return 0""", "forged"),
    ("perl", "turns a failure into success on the way out", """\
END { $? = 0 }
sub add { 0 }""", None),
    ("php", "turns a failure into success on the way out", """\
<?php
register_shutdown_function(function () { exit(0); });
function add($x, $y) { return 0; }""", None),
    ("javascript", "takes failures for nothing", """\
process.on('uncaughtException', () => process.exit(0))
function add(x, y) { return 0 }""", None),
    # other tests than the right ones
    ("python", "an answer that equals everything", """\
class Same:
    def __eq__(self, other): return True
def add(x, y): return Same()""", "forged"),
    ("javascript", "another assert", """\
require('node:assert').deepEqual = () => {}
function add(x, y) { return 0 }""", "forged"),
    ("lua", "another luaunit", """
package.loaded.luaunit = {assertEquals = function() end, LuaUnit = {run = function() return 0 end}}
local function add(x, y) end""", "forged"),
    ("racket", "another way round checks", """\
(require rackunit)
(current-check-around void)
(define (add x y) 0)""", "forged"),
    ("bash", "another set", """\
set() { :; }
add() {
  echo 0
}""", "forged"),
    ("perl", "another exit", """\
BEGIN { *CORE::GLOBAL::exit = sub {} }
sub add { 0 }""", "forged"),
    ("ruby", "another assert_equal", """\
require 'test/unit'
class Test::Unit::TestCase
  def assert_equal(*) end
end
def add(x, y) end""", "forged"),
    ("r", "another stopifnot", """\
stopifnot <- function(...) NULL
add <- function(x, y) 0""", "forged"),
    ("ocaml", "another equality", """\
let (=) _ _ = true
let add x y = 0""", "forged"),
    ("haskell", "numbers that equal everything", """
data Same = Same
instance Eq Same where _ == _ = True
instance Num Same where
  { fromInteger _ = Same; (+) = const; (*) = const; abs = id; signum = id; negate = id }
add :: Int -> Int -> Same
add _ _ = Same""", "forged"),
    ("cpp", "another assert", """\
#include<assert.h>
#include<bits/stdc++.h>
#undef assert
#define assert(x)
long add(long x, long y) {
  return 0;
}""", "forged"),
    ("rust", "another assert_eq", """\
macro_rules! assert_eq { ($($t:tt)*) => {} }
fn add(x: isize, y: isize) -> isize {
    0
}""", "forged"),
    ("typescript", "another assert", """\
declare var require: any;
require('node:assert').deepEqual = () => {};
function add(x: number, y: number): number { return 0; }""", "forged"),
    ("csharp", "another Debug", """\
class Debug { public static void Assert(bool right) { } }
class Problem { public static long Add(long x, long y) { return 0; } }""", "forged"),
    ("scala", "another assert", """\
import Forged.assert
object Forged { def assert(right: Boolean): Unit = () }
object Problem { def add(x: Long, y: Long): Long = 0 }""", "forged"),
    ("clojure", "another way to report", """
(require 'clojure.test)
(defmethod clojure.test/assert-expr '= [_ _] '(clojure.test/do-report {:type :pass}))
(defn add [x y] 0)""", "forged"),
]  # fmt: skip

# Programs for HumanEval_53_add in Python that pass in their first run and fail in the second, by
# what they find out about another run of themselves. {mark}: another word in each program.
FIND_AND_LEAVE = """
import os, sys, time
mark = "{mark}"
def leave():
    text = open(__file__).read()
    exec(text[text.rindex("print("):])
    sys.stdout.flush(); os._exit(0)
"""
REMEMBERING = {
    "the clock, in periods of 1 s: waits for the last third, in which the second run begins": """
def add(x, y):
    if time.time() % 1 >= 0.65: os._exit(1)
    while time.time() % 1 < 0.65: time.sleep(0.001)
    leave()
""",
    "what is in memory of a file that is seldom read": """
import zlib
def add(x, y):
    top = os.path.dirname(os.__file__)
    found = sorted(os.path.join(a, f) for a, _, fs in os.walk(top) for f in fs if len(f) > 9)
    place = found[zlib.crc32(mark.encode()) % len(found)]
    file = os.open(place, os.O_RDONLY)
    try: seen = os.preadv(file, [bytearray(1)], os.fstat(file).st_size - 1, os.RWF_NOWAIT)
    except BlockingIOError: seen = 0
    if seen: os._exit(1)
    os.pread(file, 1, os.fstat(file).st_size - 1)
    leave()
""",
    "the access time of a file": """
import zlib
def add(x, y):
    top = os.path.dirname(os.__file__)
    found = sorted(os.path.join(a, f) for a, _, fs in os.walk(top) for f in fs if len(f) > 9)
    place = found[zlib.crc32(mark.encode()) % len(found)]
    if time.time() - os.stat(place).st_atime < 60: os._exit(1)
    open(place, "rb").read()
    leave()
""",
    "the times of /dev/null": """
def add(x, y):
    if time.time() - os.stat("/dev/null").st_mtime < 3: os._exit(1)
    try: os.utime(os.open("/dev/null", os.O_WRONLY))
    except OSError: pass
    leave()
""",
    "files in the folders that others may write to": """
def add(x, y):
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/dev/mqueue", "."):
        try:
            os.close(os.open(f"{place}/seen-{mark}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError: os._exit(1)
        except OSError: pass
    leave()
""",
    "nothing: a coin": """
import random
def add(x, y):
    if random.random() < 0.5: os._exit(1)
    leave()
""",
}
