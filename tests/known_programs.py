"""Programs whose verdict is known, as sandbox jobs: they test the harness itself (test_eval.py).

humaneval_x, mbxp_csharp and exercism yield (name, Job, passed) where passed(result) says whether
the program was found right; multipl_e, solved and carried_over give (row, completion).
"""

import gzip
import json
import re
from pathlib import Path

from sandbox import Job, Limits
from sandbox.languages import load_language
from tasks.multipl_e import TestJudge, load_benchmark

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NONCE = "known5a0f3c"
CPU = 15.0  # seconds for a program


def rows(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def with_more_time(limits):
    return Limits(**{**vars(limits), "cpu": CPU})


def humaneval_solutions(file):
    """{number of the task: program}."""
    known = {}
    for row in rows(file):
        number = row["task_id"].split("/")[1]
        known[number] = _program(row)
    return known


def _program(row):
    return row["prompt"] + row["canonical_solution"]


# ---- MultiPL-E ----


def multipl_e(bench, pool):
    """Canonical Python solutions of HumanEval and (sanitized) MBPP in MultiPL-E's Python rows."""
    if bench == "humaneval":
        known = humaneval_solutions("humaneval/HumanEval.jsonl.gz")
    else:
        mbpp = rows("mbpp/sanitized-mbpp.jsonl.gz")
        known = {str(row["task_id"]): row["code"] for row in mbpp}

    pairs = []
    for row in load_benchmark(bench, "python"):
        number = re.search(r"_(\d+)_", row.id)[1]
        pairs.append((row, f"```python\n{known[number]}\n```"))
    return pairs


def carried_over(name):
    """HumanEval-X solutions as answers to MultiPL-E's rows.

    Only types and names are adapted, so not all of them fit.
    """
    code = {"cpp": "cpp", "javascript": "js", "typescript": "js"}[name]
    known = humaneval_solutions(f"humaneval_x/humaneval_{code}.jsonl.gz")
    for row in load_benchmark("humaneval", name):
        number, function = re.search(r"_(\d+)_(\w+)", row.id).groups()
        text = known[number]
        if name == "cpp":
            text = re.sub(r"\bint\b", "long", text.replace("#include", "\n#include"))
        else:
            names = re.findall(r"(?m)^const (\w+) = ", text)
            if names and function not in names:
                text += f"\nconst {function} = {names[-1]}"
        yield row, f"```{load_language(name).fence[0]}\n{text}\n```"


# Whole answers to MultiPL-E's rows in languages for which no published solutions are here.
SOLVED = {
    "scala": {
        "HumanEval_0_has_close_elements": """
object Solution {
  def hasCloseElements(numbers: List[Float], threshold: Float): Boolean =
    numbers.sorted.sliding(2).exists { case List(a, b) => b - a < threshold case _ => false }
}""",
        "HumanEval_3_below_zero": """
def belowZero(operations: List[Long]): Boolean = operations.scanLeft(0L)(_ + _).exists(_ < 0)""",
        "HumanEval_8_sum_product": """
object Problem {
  def sumProduct(numbers: List[Long]): (Long, Long) = {
    var sum = 0L
    var product = 1L
    for (n <- numbers) { sum += n; product *= n }
    (sum, product)
  }
}""",
        "HumanEval_44_change_base": """
object Problem extends App {
  def changeBase(x: Long, base: Long): String =
    if (x < base) x.toString else changeBase(x / base, base) + x % base
  println(changeBase(8L, 3L))
}""",
        "HumanEval_58_common": """
import scala.collection.immutable.TreeSet

object Problem {
  def common(l1: List[Long], l2: List[Long]): List[Long] = {
    val second = l2.toSet
    (TreeSet.empty[Long] ++ l1.filter(second)).toList
  }
}""",
        "HumanEval_90_next_smallest": """
object Problem {
    def nextSmallest(lst : List[Long]) : Option[Long] = lst.distinct.sorted match {
        case _ :: second :: _ => Some(second)
        case _ => None
    }
}""",
        "HumanEval_158_find_max": """
object Problem {
  private def letters(word: String) = word.toSet.size
  def findMax(words: List[String]): String = words.minBy(word => (-letters(word), word))
}""",
    },
    "csharp": {
        "HumanEval_0_has_close_elements": """
class Problem {
    public static bool HasCloseElements(List<float> numbers, float threshold) {
        var sorted = numbers.OrderBy(x => x).ToList();
        return sorted.Zip(sorted.Skip(1), (a, b) => b - a).Any(gap => gap < threshold);
    }
}""",
        "HumanEval_3_below_zero": """
public static bool BelowZero(List<long> operations) {
    long balance = 0;
    foreach (var operation in operations) {
        balance += operation;
        if (balance < 0) { return true; }
    }
    return false;
}""",
        "HumanEval_8_sum_product": """
using System;
using System.Collections.Generic;
using System.Linq;

public class Solution {
    public static Tuple<long, long> SumProduct(List<long> numbers)
        => Tuple.Create(numbers.Sum(), numbers.Aggregate(1L, (x, y) => x * y));
}""",
        "HumanEval_44_change_base": """
namespace Bases {
    public static class Change {
        public static string ChangeBase(long x, long numBase) {
            return x < numBase ? $"{x}" : ChangeBase(x / numBase, numBase) + x % numBase;
        }
        public static void Main() { System.Console.WriteLine(ChangeBase(8, 3)); }
    }
}""",
        "HumanEval_31_is_prime": """
class Problem {
    static bool IsPrime(long n) {
        if (n < 2) return false;
        for (long k = 2; k * k <= n; k++) if (n % k == 0) return false;
        return true;
    }
}""",
        "HumanEval_90_next_smallest": """
class Problem {
    public static Nullable<long> NextSmallest(List<long> lst) {
        var sorted = new SortedSet<long>(lst);
        return sorted.Count < 2 ? (long?)null : sorted.ElementAt(1);
    }
}""",
        "HumanEval_158_find_max": """
class Problem {
    public static string FindMax(List<string> words) {
        return words.OrderByDescending(word => word.Distinct().Count())
            .ThenBy(word => word, StringComparer.Ordinal).First();
    }
}""",
    },
}


def solved(name):
    """Right answers to some of MultiPL-E's HumanEval rows."""
    for row in load_benchmark("humaneval", name):
        if code := SOLVED[name].get(row.id.rpartition("/")[2]):
            yield row, f"```{load_language(name).fence[0]}\n{code}\n```"


# ---- MBXP ----

# What the tests' library does, as far as they use it.
COMPARE = """
class CompareResult { public bool AreEqual; }
class CompareLogic {
    static bool Same(object a, object b) {
        if (a is string || !(a is System.Collections.IEnumerable)) return Equals(a, b);
        if (!(b is System.Collections.IEnumerable)) return false;
        var first = System.Linq.Enumerable.Cast<object>((System.Collections.IEnumerable)a);
        var second = System.Linq.Enumerable.Cast<object>((System.Collections.IEnumerable)b);
        if (System.Linq.Enumerable.Count(first) != System.Linq.Enumerable.Count(second)) return false;
        return System.Linq.Enumerable.All(System.Linq.Enumerable.Zip(first, second, Same), x => x);
    }
    public CompareResult Compare(object a, object b) { return new CompareResult { AreEqual = Same(a, b) }; }
}
"""


def mbxp_csharp():
    """C# solutions of MBXP under its own tests, as whole programs.

    Those in TypeScript are a model's, and many do not end.
    """
    limits = with_more_time(load_language("csharp").limits)
    for row in rows("mbxp/mbcsp_release_v1.2.jsonl.gz"):
        if row["canonical_solution"]:
            program = row["prompt"] + row["canonical_solution"] + row["test"]
            program = program.replace("using KellermanSoftware.CompareNetObjects;", "") + COMPARE
            yield row["task_id"], Job("csharp", {"Main.cs": program}, limits=limits), _is_ok


# ---- HumanEval-X ----


def humaneval_x(name):
    """Canonical solutions of HumanEval-X under its own tests."""
    code, build = {
        "python": ("python", _python),
        "cpp": ("cpp", _cpp),
        "java": ("java", _java),
        "javascript": ("js", _javascript),
        "go": ("go", _go),
        "rust": ("rust", _rust),
    }[name]
    language = load_language(name)
    judge = TestJudge(None, language)

    def passed(result):
        if result.status != "ok" or b"Assertion failed" in result.stderr:
            return False
        return judge.passes(result, NONCE)

    for row in rows(f"humaneval_x/humaneval_{code}.jsonl.gz"):
        job = build(row)
        job.limits = job.limits or with_more_time(language.limits)
        yield row["task_id"], job, passed


def _python(row):
    program = _program(row)
    return Job("python", {"main.py": f"{program}\n{row['test']}\nprint('{NONCE}')\n"})


def _cpp(row):
    program = _program(row)
    test = re.sub(r"\}\s*\Z", f'puts("{NONCE}"); }}\n', row["test"])
    return Job("cpp", {"main.cpp": f"#include <stdio.h>\n{program}\n{test}"})


def _java(row):
    """Java runs the first class of a source file.

    So the tests' Main goes before the solution, and the imports before both.
    """
    program = _program(row)
    imports = r"(?m)^import .*;$"
    hoisted = re.findall(imports, program) + re.findall(imports, row["test"])
    program = re.sub(imports, "", program)
    test = re.sub(imports, "", row["test"])
    test = re.sub(r"\}\s*\}\s*\Z", f'System.out.println("{NONCE}"); }} }}\n', test)
    hoisted = "\n".join(hoisted)
    return Job("java", {"Main.java": f"{hoisted}\n{test}\n{program}"})


def _javascript(row):
    program = _program(row)
    return Job("javascript", {"main.js": f"{program}\n{row['test']}\nconsole.log('{NONCE}')\n"})


def _rust(row):
    """The #[test] functions are called from main.

    The crates that the data imports everywhere are not here.
    """
    declaration = re.sub(r"(?m)^\s*use (rand|regex|md5)\b.*;$", "", row["declaration"])
    program = declaration + row["canonical_solution"]
    test = re.sub(r"#\[(cfg\(test\)|test)\]", "", row["test"])
    test = test.replace("    fn test_", "    pub fn test_")
    calls = "".join(f"tests::{name}(); " for name in re.findall(r"fn (test_\w+)", test))
    main = f'fn main() {{ {calls}println!("{NONCE}"); }}'
    return Job("rust", {"main.rs": f"{program}\n{test}\n{main}\n"})


# What testify's assert does, in the standard library.
GO_ASSERT = """
type checker struct{ t *testing.T }
func (c checker) New(t *testing.T) checker { return checker{t} }
func (c checker) Equal(a, b interface{}, _ ...interface{}) { if !reflect.DeepEqual(a, b) { c.t.Fatalf("%v is not %v", a, b) } }
func (c checker) Nil(a interface{}) { if a != nil && !reflect.ValueOf(a).IsNil() { c.t.Fatalf("%v is not nil", a) } }
func (c checker) True(a bool) { c.Equal(a, true) }
func (c checker) False(a bool) { c.Equal(a, false) }
var assert checker
"""
GO_STANDARD = {"testing", "reflect", "os", "math", "sort", "strings"}


def _go(row):
    imports = r"(?m)^import\s*\([^)]*\)|^import .*$"
    program = f"{_program(row)}\n{row['test']}"
    program = re.sub(imports, "", program) + GO_ASSERT
    # runs last
    program += f'\nfunc TestZzz(t *testing.T) {{ os.Stdout.WriteString("{NONCE}\\n") }}\n'

    # Go refuses an import that is not used.
    imported = re.findall(r'"([\w/]+)"', row["import"] + row["prompt"] + row["test_setup"])
    lines = ""
    for name in sorted(GO_STANDARD | set(imported)):
        package = name.rpartition("/")[2]
        if name[0].islower() and re.search(rf"\b{package}\.\w", program):
            lines += f'import "{name}"\n'
    return Job(
        "go",
        {"main_test.go": f"package main\n{lines}{program}"},
        limits=with_more_time(load_language("go").compile_limits),
        run=["go", "test", "-vet=off", "-v", "main_test.go"],
    )


# ---- Exercism ----


def exercism(track):
    """Example solutions of Exercism under the exercise's own tests."""
    limits = with_more_time(load_language(track).limits)
    for row in rows(f"exercism/{track}.jsonl.gz"):
        files = {**row["support"], **row["editor"], **row["tests"]}
        files |= dict(zip(row["stub"], row["example"].values()))
        if track == "julia":  # an option of @testset that Julia 1.5 does not have
            for name, text in files.items():
                files[name] = text.replace("@testset verbose = true ", "@testset ")
        job = Job(track, files, limits=limits, run=_test_command(track, row))
        yield row["slug"], job, _is_ok


def _is_ok(result):
    return result.status == "ok"


def _test_command(track, row):
    tests = list(row["tests"])
    if track == "prolog":
        stub = list(row["stub"])[0]
        load = ["swipl", "-f", stub, "-s", tests[0]]
        return [*load, "-g", "run_tests,halt", "-t", "halt(1)", "--", "--all"]
    if track == "racket":
        return ["racket", "-N", "raco", "-l-", "raco", "test", *tests]
    if track == "python":
        modules = [Path(name).stem for name in tests]
        return ["python3", "-B", "-m", "unittest", *modules]
    if track == "scheme":
        return ["guile", "--no-auto-compile", "-s", "test.scm"]
    if track == "julia":
        return ["julia", "--startup-file=no", "--history-file=no", *tests]
    raise ValueError(track)
