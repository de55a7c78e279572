"""From a chat answer to a whole program with a benchmark's tests.

Instruct models put their code into fenced blocks, between prose, uses of it and what it prints:

    answer_code     the block that defines the asked function, or what is not fenced
    whole_program   the block as a program: what only goes on from the begun function is put behind
                    it, what the prompt imports is added, and the tests follow

A program is whole before the tests come, also where MultiPL-E's tests close the function of the
prompt: that brace is left out of them. What differs by language stands in its [answer.tests]:

    close    what ends a function: "}", ")" or "end"; none where the layout says it
    drop     regular expression of what may not stand before tests (a module's last `return`)
    imports  regular expression of what the program, or else the prompt, imports; they come first,
             each once, as `import` says ({item})
    holder   regular expression of the class whose function is asked, with its name as a group;
    held     how a function without one is put into one; call: what the tests call, by {holder}
    private  regular expression of what keeps it from being called from outside: "public " instead
    whole    the program: {preamble} or {imports}, {code}, {tests}
"""

import re

from sandbox.languages.comments import blanked
from sandbox.languages.definitions import find_definition
from sandbox.languages.headers import with_header, without_header
from sandbox.languages.templates import filled
from tasks.fences import defining_block, fenced_blocks, unix_lines

WHOLE = "\n{preamble}{code}\n{tests}"
# "Here is the function:", "This adds both.": a line of prose where nothing is fenced.
SENTENCE = re.compile(r"[A-Z][a-z']*[,!]?(?: [\w'`,.()-]+){2,}|[A-Z][a-z]+[!:]$", re.MULTILINE)


# ---- which part of an answer ----


def answer_code(text, name, language):
    """The code of an answer, behind its reasoning; "" when there is none.

    name: the asked function.
    """
    answer = unix_lines(text.rpartition("</think>")[2])
    if blocks := fenced_blocks(answer):
        return defining_block(blocks, name, language).code.strip("\n")
    code = without_prose(answer)
    close = language.answer["tests"].get("close")
    goes_on = code.startswith(("  ", "\t")) or (close and code.endswith(close))
    return code if goes_on or find_definition(code, name, language) else ""


def without_prose(text):
    """A text without the paragraphs of prose before and behind its code."""
    paragraphs = re.split(r"\n[ \t]*\n", text)
    while paragraphs and SENTENCE.match(paragraphs[0]):
        del paragraphs[0]
    while paragraphs and SENTENCE.match(paragraphs[-1]):
        del paragraphs[-1]
    return "\n\n".join(paragraphs).strip("\n").rstrip()


# ---- a whole program ----


def whole_program(row, code, language):
    """The code of an answer as a program, with the row's tests behind it."""
    table = language.answer["tests"]
    if find_definition(code, row.entry, language):
        code = with_header(code, language)
    else:
        code = gone_on(row.prompt.rstrip(), code, language)
    if drop := table.get("drop"):
        code = re.sub(drop, "", code)
    if entry := language.answer.get("entry"):
        code = re.sub(entry, "program_main", code)

    imports = ""
    if "imports" in table:
        imports, code = moved_imports(row.prompt, code, language)
    tests = row.tests
    if table.get("close") == "}":  # the brace that closes the prompt's function
        tests = tests.lstrip().removeprefix("}")
    if "holder" in table:
        holder, code = held(code, row.entry, language)
        called = table["call"].replace("NAME", re.escape(row.entry))
        tests = re.sub(called, f"{holder}.{row.entry}", tests)

    words = {
        "preamble": missing_preamble(row, code, language),
        "imports": imports,
        "code": code,
        "tests": tests,
    }
    return filled(table.get("whole", WHOLE), words).lstrip("\n")


def gone_on(prompt, body, language):
    """The begun function of a prompt with a body that goes on from it, and what it leaves open."""
    close = language.answer["tests"].get("close")
    if close is None:
        return f"{prompt}\n{indented(body)}"
    if close == "end":
        return "\n".join([prompt, body, *missing_ends(prompt, body)])

    whole = f"{prompt}\n{body.rstrip()}"
    depth = open_brackets(whole, language)
    for _ in range(-depth):
        whole = whole.removesuffix(close).rstrip()
    return whole + f"\n{close}" * depth


def indented(body):
    """A body whose first line stands deeper than its function.

    Where only that line lost its blanks it gets those of the next one.
    """
    lines = [line for line in body.splitlines() if line.strip()]
    if not lines or lines[0][0].isspace():
        return body
    if len(lines) > 1 and lines[1][0].isspace():
        return lines[1][: -len(lines[1].lstrip())] + body
    return re.sub(r"(?m)^(?=.)", "    ", body)


def missing_ends(prompt, body):
    """The lines "end" that a body lacks: each closes a line of the prompt with less indentation.

    Elixir's "defmodule M do / def f(x) do" is closed by two: below def, and below defmodule.
    """
    signature = prompt.splitlines()[-1]
    own = signature[: -len(signature.lstrip())]
    ends = [f"{own}end", "end"] if own else ["end"]
    return [end for end in ends if not re.search(rf"(?m)^{end}\b", body)]


def open_brackets(code, language):
    """How many brackets are open at the end of some code; negative: it closes too many."""
    opening, closing = "()" if language.answer["tests"].get("close") == ")" else "{}"
    text = blanked(code, language)
    return text.count(opening) - text.count(closing)


# ---- what stands around it ----


def missing_preamble(row, code, language):
    """The prompt's lines above its function (imports, types, helpers) that the code lacks."""
    asked = find_definition(row.prompt, row.entry, language)
    if not asked:
        return ""
    above = without_header(row.prompt[: asked.start()].rpartition("\n")[0], language)
    bare = blanked(above, language).splitlines()
    lines = [line for line, rest in zip(above.splitlines(), bare) if rest.strip()]

    here = {without_blanks(line) for line in code.splitlines()}
    missing = ""
    for part in parts(lines, language):
        text = "".join(f"{line}\n" for line in part)
        is_signature = find_definition(text, row.entry, language)  # Haskell's type of the function
        if without_blanks(part[0]) not in here and not is_signature:
            missing += text
    return missing


def without_blanks(line):
    return "".join(line.split())


def parts(lines, language):
    """Lines in groups: a definition, which goes on while it is indented or has open brackets."""
    groups = []
    for line in lines:
        is_open = groups and open_brackets("\n".join(groups[-1]), language) > 0
        if groups and (is_open or line[0].isspace()):
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def moved_imports(prompt, code, language):
    """(imports of prompt and code, each once; the code without its own)"""
    table = language.answer["tests"]
    hoist = re.compile(language.answer["hoist"])
    statements = "\n".join(hoist.findall(prompt) + hoist.findall(code))
    items = dict.fromkeys(re.findall(table["imports"], statements))
    form = table.get("import", "{item}")
    return "\n".join(form.replace("{item}", item) for item in items), hoist.sub("", code)


def held(code, name, language):
    """(name of the class that holds a function, the code), put into one where it has none.

    A class inside another, or in a namespace, is called by both: "Outer.Inner".
    """
    table = language.answer["tests"]
    asked = find_definition(code, name, language)
    bare = blanked(code, language)[: asked.start()] if asked else ""
    names = open_holders(bare, table["holder"])
    if table["close"] != "}":
        names = re.findall(table["holder"], bare)[-1:]
    if private := table.get("private"):
        code = re.sub(private, "public ", code)
    if not names:
        return re.search(table["holder"], table["held"])[1], filled(table["held"], {"code": code})
    return ".".join(names), code


def open_holders(bare, holder):
    """Names of the classes that are open at the end of some code: "class A { class B { f() {"."""
    blocks = []  # the name of each open one, None where it is no class's
    name = None
    for mark in re.finditer(rf"{holder}|[{{}}]", bare):
        if mark[0] == "{":
            blocks.append(name)
            name = None
        elif mark[0] == "}":
            del blocks[-1:]
        else:
            name = mark[1]
    return [name for name in blocks if name]
