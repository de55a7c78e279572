"""Straight-line solutions: exact values of their steps, and the same steps as a program in any language whose TOML has a [render] table."""

import ast
from dataclasses import dataclass
from fractions import Fraction

from sandbox.languages import language_of


@dataclass(frozen=True)
class Step:
    var: str  # v1, v2, ...
    expr: str  # + - * / ( ), decimals and earlier variables, such as "48+v1"
    value: Fraction  # exact


def exact_steps(pairs):
    """[(var, expr)] -> list[Step] with exact values: [("v1", "12/60"), ("v2", "v1*50")] has the values 1/5 and 10."""
    steps, values = [], {}
    for var, expr in pairs:
        values[var] = _value(ast.parse(expr, mode="eval").body, values)
        steps.append(Step(var, expr, values[var]))
    return steps


def _value(node, values):
    if isinstance(node, ast.Constant):
        return Fraction(repr(node.value))
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, values)
    left, right = _value(node.left, values), _value(node.right, values)
    operation = {
        ast.Add: left.__add__,
        ast.Sub: left.__sub__,
        ast.Mult: left.__mul__,
        ast.Div: left.__truediv__,
    }
    return operation[type(node.op)](right)


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def render_expression(expr, form):
    """A step's expression in a language: "(1+v1)*2" -> "(1 + V1) * 2" or "(* (+ 1 v1) 2)". form: the [render] table."""
    return _render(ast.parse(expr, mode="eval").body, form)[0]


def _render(node, form):
    """Text and precedence (9: never needs parentheses)."""
    if isinstance(node, ast.Constant):
        number = form["integer"] if isinstance(node.value, int) else form["decimal"]
        return number.format(node.value), 9
    if isinstance(node, ast.Name):
        return form["variable"].format(node.id[1:]), 9
    if isinstance(node, ast.UnaryOp):  # -x becomes 0 - x: every language can say it
        node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
    symbol = SYMBOL[type(node.op)]
    operator = form.get("operators", {}).get(symbol, symbol)
    (left, left_rank), (right, right_rank) = _render(node.left, form), _render(node.right, form)
    if form["notation"] == "prefix":
        return f"({operator} {left} {right})", 9
    rank = PRECEDENCE[symbol]
    left = f"({left})" if left_rank < rank else left
    right = f"({right})" if right_rank <= rank else right  # a-(b-c), a*(b/c)
    return f"{left} {operator} {right}", rank


def _step_lines(step, form):
    """A step as one line, or in three-address code ("ssa", LLVM IR) as one line per operation."""
    target = form.get("target", form["variable"]).format(step.var[1:])
    if form["notation"] != "ssa":
        return [form["step"].format(target=target, expression=render_expression(step.expr, form))]
    lines = []

    def visit(node, target):
        if isinstance(node, (ast.Constant, ast.Name)):
            return _render(node, form)[0]
        if isinstance(node, ast.UnaryOp):
            node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
        left, right = visit(node.left, target + "a"), visit(node.right, target + "b")
        lines.append(
            form["step"].format(
                target=target,
                operator=form["operators"][SYMBOL[type(node.op)]],
                left=left,
                right=right,
            )
        )
        return target

    body = ast.parse(step.expr, mode="eval").body
    visit(
        body
        if isinstance(body, (ast.BinOp, ast.UnaryOp))
        else ast.BinOp(body, ast.Add(), ast.Constant(0)),
        target,
    )
    return lines


def solution(problem, language):
    """The full right completion of a problem with steps: reasoning, code and query, as the language's [render] table says."""
    language = language_of(language)
    form = language.render
    if not form:
        raise ValueError(
            f"{language.name} cannot be trained on sums or gsm8k: its TOML has no [render] table"
        )
    if not problem.steps:
        raise ValueError(
            f"{problem.id} has no steps to render: use sums or gsm8k_steps for supervised training"
        )
    reasoning = problem.reasoning or ", ".join(
        f"{step.var} = {step.expr}" for step in problem.steps
    )
    names = [form["variable"].format(step.var[1:]) for step in problem.steps]
    lines = [line for step in problem.steps for line in _step_lines(step, form)]
    code = form["program"].format(
        steps=form["separator"].join(lines), result=names[-1], variables=", ".join(names)
    )
    return completion(reasoning, code, form["query"], language)


def completion(reasoning, code, query, language):
    """The three parts in their tags, as rewards.parse reads them back."""
    tag = language_of(language).answer["tag"]
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<code>\n{code}\n</code>\n<{tag}>\n{query}\n</{tag}>"
