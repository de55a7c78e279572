"""Straight-line solutions: exact values of their steps, and the steps as a program.

    [("v1", "48/2"), ("v2", "48+v1")]  ->  24, 72, and in Prolog  V1 is 48 / 2, V2 is 48 + V1

A language can be written when its TOML has a [render] table: how a variable, a number, a step and
the whole program look, and the notation of an expression: infix, prefix or ssa (LLVM IR).
"""

import ast
import operator
from dataclasses import dataclass
from fractions import Fraction

from sandbox.languages import language_of

SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
OPERATION = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
ATOM = 9  # precedence of what never needs parentheses


@dataclass(frozen=True)
class Step:
    var: str  # v1, v2, ...
    expr: str  # + - * / ( ), decimals and earlier variables, such as "48+v1"
    value: Fraction  # exact


# ---- values ----


def exact_steps(pairs):
    """[(var, expr)] -> list[Step]: [("v1", "12/60"), ("v2", "v1*50")] has the values 1/5 and 10."""
    steps, values = [], {}
    for var, expr in pairs:
        values[var] = _value(_tree(expr), values)
        steps.append(Step(var, expr, values[var]))
    return steps


def _tree(expr):
    return ast.parse(expr, mode="eval").body


def _value(node, values):
    if isinstance(node, ast.Constant):
        return Fraction(repr(node.value))
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, values)
    left = _value(node.left, values)
    right = _value(node.right, values)
    return OPERATION[type(node.op)](left, right)


# ---- programs ----


def solution(problem, language):
    """A right completion of a problem with steps: reasoning, code and query in the language."""
    language = language_of(language)
    table = language.render
    if not table:
        raise ValueError(
            f"{language.name} cannot be trained on sums or gsm8k: its TOML has no [render] table"
        )
    if not problem.steps:
        raise ValueError(
            f"{problem.id} has no steps to render: use sums or gsm8k_steps for supervised training"
        )

    reasoning = problem.reasoning
    if not reasoning:
        reasoning = ", ".join(f"{step.var} = {step.expr}" for step in problem.steps)

    names, lines = [], []
    for step in problem.steps:
        names.append(table["variable"].format(step.var[1:]))
        lines += _step_lines(step, table)
    code = table["program"].format(
        steps=table["separator"].join(lines),
        result=names[-1],
        variables=", ".join(names),
    )
    return completion(reasoning, code, table["query"], language)


def completion(reasoning, code, query, language):
    """The three parts in their tags, as rewards.parse reads them back."""
    tag = language_of(language).answer["tag"]
    return (
        f"<reasoning>\n{reasoning}\n</reasoning>\n"
        f"<code>\n{code}\n</code>\n"
        f"<{tag}>\n{query}\n</{tag}>"
    )


def _step_lines(step, table):
    """A step as one line, or in three-address code (ssa) as one line for each operation."""
    target = table.get("target", table["variable"]).format(step.var[1:])
    if table["notation"] != "ssa":
        expression = render_expression(step.expr, table)
        return [table["step"].format(target=target, expression=expression)]

    node = _tree(step.expr)
    if isinstance(node, (ast.Constant, ast.Name)):
        node = ast.BinOp(node, ast.Add(), ast.Constant(0))  # a copy takes an operation
    lines = []
    _add_operations(node, target, table, lines)
    return lines


def _add_operations(node, target, table, lines):
    """Append the lines that compute a node into `target` -> the text that reads it.

    Operands go to the target's name with a or b added: v1 = (v0+1)*2 is v1a = v0+1, v1 = v1a*2.
    """
    if isinstance(node, (ast.Constant, ast.Name)):
        return _atom(node, table)
    node = _without_sign(node)
    left = _add_operations(node.left, target + "a", table, lines)
    right = _add_operations(node.right, target + "b", table, lines)
    symbol = table["operators"][SYMBOL[type(node.op)]]
    lines.append(table["step"].format(target=target, operator=symbol, left=left, right=right))
    return target


def render_expression(expr, table):
    """A step's expression: "(1+v1)*2" -> "(1 + V1) * 2" or "(* (+ 1 v1) 2)".

    table: the language's [render] table, with notation infix or prefix.
    """
    text, _ = _render(_tree(expr), table)
    return text


def _render(node, table):
    """Text and precedence of a node."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return _atom(node, table), ATOM
    node = _without_sign(node)
    symbol = SYMBOL[type(node.op)]
    written = table.get("operators", {}).get(symbol, symbol)
    left, left_rank = _render(node.left, table)
    right, right_rank = _render(node.right, table)
    if table["notation"] == "prefix":
        return f"({written} {left} {right})", ATOM

    rank = PRECEDENCE[symbol]
    if left_rank < rank:
        left = f"({left})"
    if right_rank <= rank:  # a-(b-c), a*(b/c)
        right = f"({right})"
    return f"{left} {written} {right}", rank


def _atom(node, table):
    """A number or a variable."""
    if isinstance(node, ast.Name):
        return table["variable"].format(node.id[1:])
    number = table["integer"] if isinstance(node.value, int) else table["decimal"]
    return number.format(node.value)


def _without_sign(node):
    """-x as 0 - x: every language can say it."""
    if isinstance(node, ast.UnaryOp):
        return ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
    return node
