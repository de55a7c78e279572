"""Text and bytes as the worst model would choose them: completions, and what programs print.

All from a random.Random, so that a seed says everything.
"""

DIGITS = ("9" * 401, "1" + "0" * 4999, "7" * 5000, "1" * 60_000)
NUMBERS = (
    *DIGITS,
    *(f"-{digits}" for digits in DIGITS),
    *(f"{digits}.{digits}" for digits in DIGITS),
    *("1e400", "-1e400", "1e999999999", "1e-999999999", "1.0d999999", "9e99999999999999999999"),
    *("nan", "inf", "-inf", "Infinity", "+inf.0", "-nan.0", "NaN", "0x1p99999", "1_000", "1,000"),
    *("0", "-0.0", "42", "3.5", "00", "+7", ".5", "5.", "1e5", "1E+5", "-", ".", "e", "1.2.3"),
    *("\u0663", "1\u0663", "\u00b2", "\u2160", "\uff11\uff12", "\U0001d7ce"),  # other digits
)
RATIOS = ("7r2", "7/2", "7//2", "7 % 2", "7r0", "7/0", "0/0", "84/2", "-7r2", f"{'9' * 401}/7")
RATIOS += (f"7/{'9' * 5000}", f"{'8' * 4000}r{'6' * 4000}", "1e9/3", "1/1e9", "7/-2")
WORDS = ("true", "false", "True", "None", "nil", "#t", "#f", "()", "[]", "{}", "#()", "a", "'a")
WORDS += (
    ":k",
    "k=v",
    "f(x)",
    "'(1 . 2)",
    "#hash((1 . 2))",
    "Set([1])",
    "Dict(1=>2)",
    "#\\a",
    '"a"',
)
MARKS = tuple("()[]{}<>'\"`\\|;:,.=#&%$@!?*/+-^~_ \t\n\r")
MARKS += (
    "=>",
    "->",
    "...",
    "\\x",
    "\\u{110000}",
    "\\u{d800}",
    '"\\ud800"',
    "#\\",
    "#|",
    "|#",
    "(*",
)
CONTROLS = ("\0", "\x01", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ufeff", "\u202e", "\x1c", "\v\f")
SURROGATES = ("\ud800", "\udfff", "\udc80", "\ud83d", "\ude00\ud83d")  # halves of pairs
TAGS = ("reasoning", "code", "query", "funcall", "expression", "call", "answer", "think")
WRAPPING = (
    "```",
    "```\n",
    "\n```\n",
    "~~~",
    "```lua\n",
    "```python\n",
    "```input\n",
    "```output\n",
)
WRAPPING += tuple(f"<{tag}>" for tag in TAGS) + tuple(f"</{tag}>" for tag in TAGS)
CODE = ("def f(a):\n", "function f(a)", "(define (f a) ", "(defun f (a) ", "f(A, B) :- ", "main()")
CODE += (
    "return a\n",
    "end\n",
    "import (",
    "import x\n",
    "#lang racket\n",
    "?- f(1, X).",
    "g_0(",
    "{nonce}",
)
KINDS = (NUMBERS, RATIOS, WORDS, MARKS, CONTROLS, SURROGATES, WRAPPING, CODE)
HALF_UTF8 = (b"\xe2\x82", b"\xc3", b"\xf0\x9f", b"\xff\xfe", b"\x80", b"\xed\xa0\x80", b"\xc0\x80")
OPENS = (
    "(",
    "[",
    "{",
    "'(",
    "#(",
    "[[",
    '{"a": ',
    "{[1]=",
    "{{1}, ",
    "f(",
    "Any[",
    "(list ",
    "(cons 1 ",
)
OPENS += ("(1 1 1 1 1 1 1 1 1 . ", "(hash 1 ", "Set([", "Dict(1=>", "'(1 . ", "-(", "[a|", "#s(")
CLOSE = {"(": ")", "[": "]", "{": "}"}
LONGEST = 100_000  # characters: 4,096 tokens have fewer, but for those of many blanks


def text(rng):
    """Some pieces; now and then one of them a great many times."""
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(piece(rng) for _ in range(rng.randint(0, 8)))[:LONGEST]
    if kind == 1:
        return nested(rng)
    if kind == 2:
        once = piece(rng)
        most = LONGEST // len(once)
        return piece(rng) + once * rng.choice((min(30, most), most)) + piece(rng)
    if kind == 3:
        return "".join(chr(rng.randrange(rng.choice((128, 0x110000)))) for _ in range(99))
    return piece(rng)


def piece(rng):
    return rng.choice(rng.choice(KINDS))


def nested(rng):
    """Something within many brackets, which mostly are closed."""
    opened = rng.choice(OPENS)
    depth = rng.choice((3, 29, 31, 100, 1000, 5000))
    closed = "".join(CLOSE[mark] for mark in reversed(opened) if mark in CLOSE)
    return opened * depth + piece(rng) + closed * (depth - (rng.random() < 0.1))


def value(rng, language, depth=0):
    """Something like a literal of a language: its own forms around the pieces."""
    table = language.call["values"]
    forms = [form for form in table.values() if isinstance(form, str) and "..." in form]
    forms += ["'(...)", "(list ...)", "(cons ...)", "(...)", "f(...)", "-..."]
    if depth > rng.choice((0, 2, 4, 40)) or rng.random() < 0.2:
        return rng.choice((*WORDS, *RATIOS[:8], "1", "2", "1.5", "1e999", '"a"', piece(rng)))
    inner = [value(rng, language, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    between = rng.choice((", ", " ", " . ", ": ", " => ", "-", "|", table.get("arrow", ",")))
    return rng.choice(forms).replace("...", between.join(inner), 1)


def printed(rng, nonce=None, count=1):
    """Bytes of a program's output, often with the nonce and a value as its harness prints them."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        value = text(rng)[:60_000]
        if nonce and rng.random() < 0.8:
            kind = rng.choice(("value", "value", "value", "error", "no_value", "syntax", "x", ""))
            number = rng.choice((*map(str, range(count)), "-1", "9" * 5000, "\u0663", "1e5"))
            value = rng.choice((f"{value}", f"{kind} {number} {value} {nonce}"))
            value = f"\n{nonce} {value}\n"
        parts.append(value.encode(errors=rng.choice(("surrogatepass", "replace"))))
        if rng.random() < 0.2:
            parts.append(rng.choice(HALF_UTF8))
        if rng.random() < 0.1:
            parts.append(rng.randbytes(200))
    return b"".join(parts)[: 1 << 17]


def broken(rng, whole):
    """A right text with something cut out, put in or doubled."""
    for _ in range(rng.randint(0, 3)):
        start = rng.randint(0, len(whole))
        end = min(len(whole), start + rng.choice((0, 1, 20)))
        whole = whole[:start] + rng.choice(("", piece(rng), text(rng))) + whole[end:]
    return whole[: 2 * LONGEST]
