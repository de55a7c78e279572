"""Self-play: refusals, rewards, buffers, advantages, and the loop with its exact resume.

Real interpreters, real sandbox.
"""

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import grpo
import sft
from batches import Sequence
from rollout import Sample
from runs import ENVIRONMENT, ROOT, assert_same_bits, command, resume, rows, whole_run
from runtime import hugging_face
from runtime.tokenizer import ChatTokenizer
from sampler import Completion, Sampler
from sandbox import Pool
from sandbox.languages import load_language
from sandbox.languages.calls import Runner
from selfplay import loop as selfplay
from selfplay import rewards, triples
from selfplay.buffers import Buffers, add_seeds
from selfplay.judge import SolveJudge
from selfplay.parse import compose, parse_proposal
from selfplay.prompts import solve_prompt
from selfplay.proposals import begin, check
from selfplay.puzzles import PAIRS, REASONS, TASKS, Candidate, Entry, Puzzle, Refused
from settings import Settings, read_recipe
from tasks.verdicts import Parsed, Verdict
from test_values import HERE


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


@pytest.fixture(scope="module")
def lua(pool):
    return Runner(pool, load_language("lua"))


def answer(*parts):
    """A completion in the right form with blocks (name, text)."""
    blocks = "\n".join(f"```{name}\n{text}\n```" for name, text in parts)
    return f"plan</think>\n<answer>\n{blocks}\n</answer>"


def checked(runner, *entries):
    """Candidates of entries without outputs, after the check."""
    trials = [begin(runner, Candidate(entry)) for entry in entries]
    return check(runner, trials, deadline=120)


# ---- proposals ----

IDENTITY = ("lua", "function f(a) return a end")


@pytest.mark.parametrize(
    "text,task,reason",
    [
        ("no tags at all", "deduction", "format"),
        ("<answer>```lua\nx\n```</answer>", "deduction", "format"),
        (answer(("input", "1")), "deduction", "no_program"),
        (answer(IDENTITY), "abduction", "no_input"),
        (answer(IDENTITY, ("input", "f(1)")), "deduction", "input_no_value"),
        (answer(IDENTITY, ("input", "")), "deduction", "input_no_value"),
        (answer(IDENTITY, ("input", "1" * 3000)), "deduction", "too_long"),
        (answer(*[("input", "1")] * 9, ("message", "m")), "induction", "few_inputs"),
        (answer(*[("input", "1")] * 10), "induction", "no_message"),
    ],
)
def test_refusals_before_anything_runs(text, task, reason):
    with pytest.raises(Refused, match=f"^{reason}$"):
        parse_proposal(text, task, load_language("lua"), program=IDENTITY[1])


def test_refusals_by_running(lua):
    """Every reason that a program can give, with an accepted one among them, as one batch."""
    programs = {
        "syntax": "function f(a) return end end",
        "banned": "function f(a) return os.time() end",
        "no_f": "function g(a) return a end",
        "error": "function f(a) return nil + a end",
        "no_value": "function f(a) return print end",
        "too_long": "function f(a) return ('x'):rep(2500) end",
        "not_deterministic": "function f(a) return tostring({}) end",
        "cpu_limit": "function f(a) while true do end end",
        "output_limit": "function f(a) for i = 1, 1000000 do print('xxxxxxxxxx') end return 1 end",
        "ok": "function f(a) return {a, 'x'} end",
    }
    candidates = []
    for code in programs.values():
        text = answer(("lua", code), ("input", "1"))
        candidates.append(Candidate(parse_proposal(text, "deduction", lua.language)))
    candidates.append(Candidate(reason="format"))

    trials = [begin(lua, candidate) for candidate in candidates]
    found = check(lua, trials, deadline=120)
    assert [candidate.reason for candidate in found] == [*programs, "format"]
    assert found[-2].entry.outputs == ('{1, "x"}',)


@pytest.mark.parametrize(
    "name,code",
    [
        ("python", "def f(a):\n    return list({'a', 'b', 'c', 'd', 'e', 'f'})"),
        ("prolog", "f(_, B) :- atom_concat(cpu, time, X), B is X."),
        ("lua", "local seen = {}\nfunction f(a) seen[#seen + 1] = a return #seen end"),
    ],
)
def test_a_program_that_differs_the_second_time_is_refused(pool, name, code):
    """A hash order that changes from process to process, a clock, a state that is kept."""
    found = checked(Runner(pool, load_language(name)), Entry(code, ("1",), ()))
    assert found[0].reason == "not_deterministic"


def test_an_entry_that_changes_later_is_forgotten(lua):
    """A clock that stood still while it was checked. Of two equal draws both go, and no other."""
    clock = "function f(a) return os.time() end"
    stored = Entry(clock, ("1",), ("7",), step=1)
    honest = Entry("function f(a) return a + 6 end", ("1",), ("7",), step=1)
    fresh = replace(stored, inputs=("2",), step=5)
    unbanned = {**lua.language.call, "banned": [], "mentions": []}
    runner = Runner(lua.pool, replace(lua.language, call=unbanned))

    buffers = Buffers(9, lua.language)
    for entry in (stored, honest, fresh):
        buffers["deduction"].add(entry)
    play = SimpleNamespace(
        judge=SimpleNamespace(runner=runner),
        settings=Settings(),
        buffers=buffers,
        waited=0.0,
    )
    picked = [("deduction", entry) for entry in (stored, honest, stored, fresh)]
    kept, forgotten = selfplay.forget_changed(play, 5, picked)
    assert kept == [("deduction", honest), ("deduction", fresh)]
    assert forgotten == 1
    assert list(buffers["deduction"]) == [honest, fresh]


def test_a_value_that_changes_on_its_way_is_refused(lua):
    """A real run with an identity function that is not one."""
    call = {**lua.language.call, "identity": "function f(a) return a .. 'x' end"}
    broken = Runner(lua.pool, replace(lua.language, call=call))
    found = checked(broken, Entry("function f(a) return 'v' end", ("1",), ()))
    assert found[0].reason == "no_round_trip"


def test_ways_a_job_can_end_are_reasons():
    ends = {"wall_limit", "memory_limit", "file_limit", "crash", "compile_error", "sandbox_error"}
    assert ends <= set(REASONS)


@pytest.mark.parametrize("name", HERE)
def test_synthetic_triples_are_what_the_interpreter_says(pool, name):
    language = load_language(name)
    entries = [triples.triple("test", 0, i, language) for i in range(6)]
    entries += [triples.triple("test", 0, i, language, PAIRS) for i in (6, 7)]
    found = checked(Runner(pool, language), *(replace(one, outputs=()) for one in entries))
    assert [candidate.reason for candidate in found] == ["ok"] * 8
    assert [candidate.entry for candidate in found] == entries


@pytest.mark.parametrize("name", HERE)
def test_no_synthetic_triple_is_in_both_splits(name):
    def programs_with_inputs(split):
        entries = [triples.triple(split, 0, i, load_language(name)) for i in range(300)]
        return {(entry.program, entry.inputs) for entry in entries}

    assert not programs_with_inputs("train") & programs_with_inputs("test")


def test_a_demonstrated_solver_thinks_what_is_true():
    """The thought of 7 -> 7 * 2 + 1 is "7 * 2 + 1 = 15"; a list's has its elements in order."""
    language = load_language("lua")
    demonstrations = triples.demonstrations(language, 600, 0, 2, short=True)
    thoughts = {answer.partition("</think>")[0] for _, answer in demonstrations} - {"ok"}
    sums = {thought for thought in thoughts if re.fullmatch(r"[\d+* ]+ = \d+", thought)}
    assert len(sums) > 100
    for thought in sums:
        left, _, right = thought.partition(" = ")
        assert eval(left) == int(right)
    for thought in thoughts - sums:
        left, _, right = thought.partition(" = ")
        used, answer = (re.findall(r"\d+", side) for side in (left, right))
        if "|" in left:  # one more element, then a list
            assert sorted(used) == sorted(answer)
        elif ">" in left:
            assert answer == [x for x, k in zip(used[::2], used[1::2]) if int(x) > int(k)]
        else:
            assert answer == [str(int(x) + int(k)) for x, k in zip(used[::2], used[1::2])]


def test_a_teacher_who_misreads_works_with_the_next_constant():
    """For `return a + 3` of 7 it writes 7 + 4 = 11; without mistakes 7 + 3 = 10."""
    language = load_language("lua")
    for mistakes, step in ((0.0, 0), (1.0, 1)):
        seen = 0
        for prompt, answer in triples.demonstrations(language, 600, 0, 2, True, mistakes):
            shown = re.findall(r"return a \+ (\d)\n", prompt)
            thought = re.match(r"\d+ \+ (\d) = \d+<", answer)
            if prompt.startswith("solve deduction") and shown and thought:
                assert int(thought[1]) == int(shown[0]) + step
                seen += 1
        assert seen > 5


TWICE = "function f(a)\n  return a * 2\nend"


def test_a_composed_program_calls_the_earlier_one(lua):
    whole = compose("function f(a)\n  return g_0(a) + 1\nend", [TWICE], lua.language)
    found = checked(lua, Entry(whole, ("5",), ()))
    assert found[0].entry.outputs == ("11",)  # 5 * 2 + 1


@pytest.mark.parametrize(
    "code",
    [
        "function f(a) return a end",
        "function g_0(a) return 0 end\nfunction f(a) return g_0(a) end",
    ],
)
def test_a_program_that_does_not_build_on_the_earlier_one_is_refused(code):
    with pytest.raises(Refused, match="no_composite"):
        compose(code, [TWICE], load_language("lua"))


# ---- answers ----

PAIR = Entry("function f(a) return {a, a} end", ("3",), ("{3, 3}",))
PAIR_OF_TEN = replace(
    PAIR,
    inputs=tuple(str(i) for i in range(PAIRS)),
    outputs=tuple(f"{{{i}, {i}}}" for i in range(PAIRS)),
    message="twice",
)
ONLY_SHOWN = "function f(a) if a < 5 then return {a, a} end return 0 end"
FAILS = "function f(a) return nil + 1 end"
READS_CLOCK = "function f(a) return os.time() end"


def test_solver_rewards_every_branch(pool):
    cases = [
        ("deduction", answer(("output", "{3,3}")), 1.0, "ok"),
        ("deduction", answer(("output", "{3, 4}")), 0.0, "ok"),
        ("deduction", answer(("output", "f(3)")), -0.5, "no_value"),
        ("deduction", answer(("lua", "3")), -1.0, "no_output"),
        ("deduction", "{3, 3}", -1.0, "format"),
        ("abduction", answer(("input", "3.0")), 1.0, "ok"),
        ("abduction", answer(("input", "4")), 0.0, "ok"),
        ("abduction", answer(("input", "x")), -0.5, "input_no_value"),
        ("abduction", answer(("output", "3")), -1.0, "no_input"),
        ("induction", answer(("lua", PAIR.program)), 1.0, "ok"),
        ("induction", answer(("lua", ONLY_SHOWN)), 0.0, "ok"),
        ("induction", answer(("lua", FAILS)), -0.5, "error"),
        ("induction", answer(("lua", READS_CLOCK)), -0.5, "banned"),
        ("induction", answer(("input", "1")), -1.0, "no_program"),
    ]
    judge = SolveJudge(pool, load_language("lua"))
    answers = []
    for task, text, *_ in cases:
        puzzle = Puzzle("p", task, PAIR_OF_TEN if task == "induction" else PAIR)
        answers.append(judge.submit(puzzle, text))
    found = [(verdict.reward, verdict.status) for verdict in judge.collect(answers, 60)]
    assert found == [(reward, status) for *_, reward, status in cases]


def test_penalties_of_answers_stand_in_place_of_the_equations(pool):
    """The public implementation's -0.5 for a wrong answer, and a table of kinds of errors."""
    cases = [
        ("deduction", answer(("output", "{3,3}")), 1.0),
        ("deduction", answer(("output", "{3, 4}")), -0.5),  # 0 by equation (2)
        ("deduction", answer(("output", "f(3)")), -0.5),  # no_value: not named, equation (2)
        ("deduction", answer(("lua", "3")), -0.9),  # no_output
        ("induction", answer(("lua", "function f(a) return end end")), -0.7),  # syntax
        ("induction", answer(("lua", FAILS)), -0.6),  # error
        ("induction", answer(("lua", ONLY_SHOWN)), -0.5),
    ]
    named = "wrong=-0.5,syntax=-0.7,error=-0.6,no_output=-0.9"
    settings = Settings(task="selfplay", solve_penalties=named)
    play = selfplay.Play(settings, load_language("lua"), pool, None, None)
    answers = []
    for task, text, _ in cases:
        puzzle = Puzzle("p", task, PAIR_OF_TEN if task == "induction" else PAIR)
        answers.append(play.judge.submit(puzzle, text))
    found = [verdict.reward for verdict in play.judge.collect(answers, 60)]
    assert found == [reward for *_, reward in cases]


def test_an_answer_cannot_force_true(pool):
    """The public implementation pastes answers into "f(ANSWER) == gold", where the first passes."""
    judge = SolveJudge(pool, load_language("python"))
    puzzle = Puzzle("p", "abduction", Entry("def f(a):\n    return a + 1", ("5",), ("6",)))
    given = ["1) == 0 or (1", "5", "5.0", "4", "'x'"]
    answers = [judge.submit(puzzle, answer(("input", text))) for text in given]
    found = [(v.correct, v.reward, v.status) for v in judge.collect(answers, 60)]
    assert found == [
        (False, -0.5, "input_no_value"),
        (True, 1.0, "ok"),
        (True, 1.0, "ok"),
        (False, 0.0, "ok"),
        (False, -0.5, "error"),
    ]


def test_what_the_sandbox_cannot_judge_is_masked():
    entry = Entry("function f(a) while true do end end", ("3",), ("3",))
    with Pool(workers=1) as pool:
        judge = SolveJudge(pool, load_language("lua"))
        submitted = judge.submit(Puzzle("p", "abduction", entry), answer(("input", "3")))
        verdict = judge.collect([submitted], deadline=0.01)[0]
    assert math.isnan(verdict.reward)
    assert verdict.status == "sandbox_error"


def test_the_first_answer_of_a_ramble_is_judged(pool):
    """What a model asks and answers itself behind it changes nothing, however it looks."""
    judge = SolveJudge(pool, load_language("lua"))
    right, wrong = answer(("output", "{3, 3}")), answer(("output", "{4}"))
    puzzle = Puzzle("p", "deduction", PAIR)
    ramble = "\nUser: again\nAssistant: <think> "
    texts = [right + ramble + wrong, wrong + ramble + right, "no tags </answer>" + ramble + right]
    answers = [judge.submit(puzzle, text) for text in texts]
    found = [(v.reward, v.status) for v in judge.collect(answers, 60)]
    assert found == [(1.0, "ok"), (0.0, "ok"), (-1.0, "format")]

    proposals = answer(IDENTITY, ("input", "1")), answer(IDENTITY, ("input", "2"))
    entry = parse_proposal(ramble.join(proposals), "deduction", load_language("lua"))
    assert entry.inputs == ("1",)


class Letters:
    """A tokenizer of one token a character."""

    stop_ids = (0,)

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, tokens):
        return "".join(chr(token) for token in tokens)


class Writes:
    """A sampler that answers every prompt with its text, whatever it is."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, requests, on_done, decode):
        for i, text in enumerate(self.texts):
            tokens = Letters().encode(text)
            on_done(i, [Completion(i, 0, tokens, [0.0] * len(tokens), "stop")])


def propose_in_lua(pool, texts, references=(), stored=(), **settings):
    """What comes of completions that a deduction proposer gives, with entries in its prompt."""
    language = load_language("lua")
    settings = Settings(task="selfplay", max_prompt_tokens=9999, **settings)
    play = selfplay.Play(settings, language, pool, Writes(texts), Letters())
    for one in (*references, *stored):
        play.buffers["deduction"].add(one)
    asked = selfplay.Proposal("p", "deduction", "prompt", references=tuple(references))
    return selfplay.propose(play, 1, [asked] * len(texts)), play


COPY = answer(("lua", "function f(a)  -- again\n  return {a, a}\nend"), ("input", "3"))
OTHER_INPUT = answer(("lua", PAIR.program), ("input", "4"))
TRIPLED = Entry("function f(a) return a * 3 end", ("2",), ("6",))
STORED = answer(("lua", TRIPLED.program), ("input", "2"))


def test_a_copy_of_a_reference_is_counted_and_paid_as_published(pool):
    """Comments and white space make no other program; another input makes another puzzle."""
    found, play = propose_in_lua(pool, [COPY, OTHER_INPUT, STORED], [PAIR], [TRIPLED])
    assert [one.copied for one in found] == [True, False, False]
    assert [one.reason for one in found] == ["ok"] * 3
    assert selfplay.store(play, found)["deduction"] == 1  # the other input alone is new


def test_copies_can_be_refused(pool):
    """Of a reference, also one that the buffer has dropped since, and of what it holds."""
    found, play = propose_in_lua(
        pool, [COPY, OTHER_INPUT, STORED], [PAIR], [TRIPLED], refuse_copies=True
    )
    assert [one.reason for one in found] == ["duplicate", "ok", "duplicate"]
    assert [one.copied for one in found] == [True, False, False]
    sample = selfplay.proposer_sample(play, 1, found[0])
    assert (sample.verdict.reward, sample.verdict.status) == (-1.0, "duplicate")


class Repeats:
    """A sampler that answers every request with one text."""

    def __init__(self, text):
        self.text = text

    def generate(self, requests, on_done, decode):
        tokens = Letters().encode(self.text)
        for i, request in enumerate(requests):
            surprise = [0.0] * len(tokens)
            on_done(i, [Completion(i, n, tokens, surprise, "stop") for n in range(request.n)])


def test_copies_and_what_was_known_are_in_a_steps_metrics(pool):
    """Two proposals a task, all the one reference: four of six are copies, four of four known.

    Induction's two are no copies: they are refused, a text without ten inputs.
    """
    settings = Settings(
        task="selfplay", advantage="trr++", prompts=2, learn_samples=1, max_prompt_tokens=9999
    )
    play = selfplay.Play(settings, load_language("lua"), pool, Repeats(COPY), Letters())
    for task in TASKS:
        play.buffers[task].add(PAIR_OF_TEN if task == "induction" else PAIR)
    run = SimpleNamespace(play=play, settings=settings)
    _, _, found = selfplay.rollout(run, 1)
    assert found["propose/valid_frac"] == pytest.approx(4 / 6)
    assert found["propose/copy_frac"] == pytest.approx(4 / 6)
    assert found["propose/known_frac"] == 1.0
    assert found["refused/few_inputs"] == 2


@pytest.mark.parametrize("short", [True, False])
def test_a_solver_does_not_see_the_answer(short):
    """Deduction hides the output, abduction the input, induction the program and half the pairs."""
    program = "(define (f a)\n  (+ a 70000))"
    inputs = tuple(str(1111 * i) for i in range(1, 11))
    outputs = tuple(str(1111 * i + 70000) for i in range(1, 11))
    entry = Entry(program, inputs, outputs, "a hint")
    language = load_language("racket")
    seen = {task: solve_prompt(Puzzle("p", task, entry), language, short) for task in TASKS}
    assert all(text.endswith("Assistant: <think>") for text in seen.values())

    assert program in seen["deduction"]
    assert "1111" in seen["deduction"]
    assert "71111" not in seen["deduction"]

    assert program in seen["abduction"]
    assert "71111" in seen["abduction"]
    assert "```input\n1111\n" not in seen["abduction"]

    for text in (*inputs[:5], *outputs[:5], "a hint"):
        assert text in seen["induction"]
    for text in ("(define (f a)\n  (+", *inputs[5:], *outputs[5:]):
        assert text not in seen["induction"]


# ---- rewards, advantages, settings ----


def test_equations_of_the_proposers_reward():
    accuracies = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [rewards.equation_3(a) for a in accuracies] == [-0.5, 0.75, 0.5, 0.25, -0.5]
    assert [rewards.equation_4(a) for a in accuracies] == [0.5, 0.875, 1.0, 0.875, 0.5]


@pytest.mark.parametrize(
    "setting,accuracy,step,solver_accuracy,reward",
    [
        ("eq3", 0.0, 200, 0.0, -0.5),
        ("eq4", 0.0, 1, 0.0, 0.5),
        ("switch", 0.0, 64, 0.0, -0.5),
        ("switch", 0.0, 65, 0.0, 0.5),
        ("switch:3", 0.0, 3, 0.0, -0.5),
        ("switch:3", 0.0, 4, 0.0, 0.5),
        ("blend", 0.0, 1, 0.0, -0.5),
        ("blend", 0.0, 1, 1.0, 0.5),
        ("blend", 0.25, 1, 0.4, 0.8),  # 0.6 * 0.75 + 0.4 * 0.875
    ],
)
def test_how_the_equations_are_mixed(setting, accuracy, step, solver_accuracy, reward):
    found = rewards.proposer_reward(setting, accuracy, step, solver_accuracy)
    assert found == pytest.approx(reward)


def proposed(entry, reason, accuracy):
    """A proposal of which nothing matters but what came of it."""
    asked = selfplay.Proposal("p", "deduction", "")
    return selfplay.Proposed(asked, None, None, entry, reason, accuracy=accuracy)


@pytest.mark.parametrize(
    "entry,reason,accuracy,reward",
    [
        (PAIR, "ok", 0.25, 0.75),
        (None, "syntax", None, -1.0),
        (None, "sandbox_error", None, math.nan),  # the sandbox could not check it
        (PAIR, "ok", None, math.nan),  # nor judge any answer to it
    ],
)
def test_a_proposal_that_was_not_judged_has_no_reward(entry, reason, accuracy, reward):
    play = selfplay.Play(
        Settings(propose_reward="eq3"), load_language("lua"), None, None, tokenizer=None
    )
    sample = selfplay.proposer_sample(play, 1, proposed(entry, reason, accuracy))
    assert sample.verdict.reward == pytest.approx(reward, nan_ok=True)


def advantages_of(proposals, answers, **settings):
    """Advantages of samples of one task with these rewards, in this order."""
    run = SimpleNamespace(device=torch.device("cpu"), settings=Settings(**settings))
    asked = selfplay.Proposal("p", "deduction", "")
    puzzle = Puzzle("q", "deduction", PAIR)
    samples = []
    for problem, rewards_of in ((asked, proposals), (puzzle, answers)):
        for reward in rewards_of:
            verdict = Verdict("p", reward, {}, False, "ok", None, "", Parsed("", "", "", True))
            completion = Completion(0, 0, [1], [0.0], "stop")
            samples.append(Sample(problem, completion, verdict, Sequence([1], [2])))
    selfplay.set_advantages(run, samples)
    return [sample.sequence.advantage for sample in samples]


def test_lambda_weighs_the_solver_beside_the_proposer():
    """Equation (1). Rewards 1 and 0 have advantages 0.707 and -0.707 in either role."""
    found = advantages_of([1.0, 0.0], [1.0, 0.0], solve_weight=0.25)
    assert found == pytest.approx([0.7071, -0.7071, 0.1768, -0.1768], abs=1e-4)


@pytest.mark.parametrize("reason,reward", [("syntax", -0.8), ("banned", -1.0)])
def test_a_refused_proposal_has_the_penalty_of_its_reason(reason, reward):
    settings = Settings(task="selfplay", propose_penalties="syntax=-0.8,duplicate=-0.5")
    play = selfplay.Play(settings, load_language("lua"), None, None, tokenizer=None)
    sample = selfplay.proposer_sample(play, 1, proposed(None, reason, None))
    assert sample.verdict.reward == reward


def test_a_proposer_is_compared_with_proposers_and_a_solver_with_solvers():
    """Of one task: proposals 1, 0 and answers 1, 1. Alone the answers have no signal."""

    first, second, *answers = advantages_of([1.0, 0.0], [1.0, 1.0])
    assert first > 0 > second
    assert answers == [0.0, 0.0]


def test_advantages_are_normal_per_task_and_role_over_tokens():
    """TRR++: rewards 1 of one token and 0 of three: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4.

    Equal rewards, and a reward beside one that is masked, give exactly 0.
    """
    values = grpo.advantages(
        torch.tensor([1.0, 0.0, -0.5, -0.5, 1.0, math.nan]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        "trr++",
        torch.tensor([1, 3, 5, 2, 4, 4]),
    ).tolist()
    assert values[:2] == pytest.approx([1.5, -0.5])
    assert values[2:] == [0.0] * 4


PAPER = {
    "task": "selfplay",
    "prompts": 64,
    "learn_samples": 8,
    "references": 6,
    "seed_problems": 256,
    "buffer_size": 16384,
    "lr": 1e-6,
    "max_norm": 1.0,
    "temperature": 1.0,
    "eval_temperature": 0.0,
    "max_prompt_tokens": 6144,
    "max_new_tokens": 8096,
    "steps": 256,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_coef": 0.0,
}


@pytest.mark.parametrize("name", ["azr_racket", "azr_julia"])
def test_recipes_hold_the_papers_values(name):
    settings = Settings(**read_recipe(ROOT / "recipes" / f"{name}.toml"))
    assert {key: getattr(settings, key) for key in PAPER} == PAPER
    assert rewards.read_setting(settings.propose_reward) == ("switch", 64)


SELF_PLAY = sorted((ROOT / "recipes").glob("azr_*.toml"))
OF_THE_PAPER = {  # recipe -> proposer's reward, steps
    "azr_racket_eq3": ("eq3", 500),
    "azr_racket_eq4": ("eq4", 256),
    "azr_racket": ("switch:64", 256),
    "azr_racket_blend": ("blend", 256),
    "azr_javascript": ("eq3", 500),
}


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_recipes_of_the_papers_rewards_differ_in_nothing_else(name):
    settings = Settings(**read_recipe(ROOT / "recipes" / f"{name}.toml"))
    assert (settings.propose_reward, settings.steps) == OF_THE_PAPER[name]
    paper = PAPER | {"steps": settings.steps}
    assert {key: getattr(settings, key) for key in paper} == paper
    assert (settings.solve_penalties, settings.refuse_copies) == ("", False)


@pytest.mark.parametrize("path", SELF_PLAY, ids=lambda path: path.stem)
def test_every_self_play_recipe_is_accepted(path):
    selfplay.check_settings(Settings(**read_recipe(path)))


def test_the_public_implementations_penalty_is_a_recipe():
    settings = Settings(**read_recipe(ROOT / "recipes/azr_racket_public.toml"))
    assert selfplay.penalties_of(settings) == ({"wrong": -0.5}, {})


@pytest.mark.parametrize(
    "wrong,sentence",
    [
        ({"propose_reward": "eq5"}, "eq3, eq4"),
        ({"propose_reward": "eq3:5"}, "switch:N"),
        ({"propose_reward": "switch:"}, "switch:N"),
        ({"propose_reward": "switch:-1"}, "switch:N"),
        ({"composite": 2.0}, "from 0 to 1"),
        ({"seeds": "nowhere.jsonl"}, "does not exist"),
        ({"dynamic_sampling": 2}, "self-play does not use it"),
        ({"overlong_buffer": 20}, "self-play does not use it"),
        ({"reward": "random"}, "self-play does not use it"),
        ({"solve_penalties": "wrong:-1"}, "names with numbers"),
        ({"solve_penalties": "typo=-1"}, "unknown reason 'typo'"),
        ({"solve_penalties": "sandbox_error=-1"}, "unknown reason"),
        ({"solve_penalties": "wrong=0.5"}, "a penalty is at most 0"),
        ({"propose_penalties": "wrong=-0.5"}, "unknown reason 'wrong'"),
    ],
)
def test_wrong_settings_get_one_sentence(wrong, sentence):
    settings = Settings(task="selfplay", **wrong)
    with pytest.raises((ValueError, SystemExit), match=sentence):
        selfplay.load_evaluation(settings, load_language("lua"), None)


# ---- buffers ----


def entry(i, step=0):
    return Entry(f"function f(a) return a + {i} end", ("1",), (str(i + 1),), "", step)


def test_a_buffer_holds_an_entry_once():
    """Comments, white space and the step make no difference; another input does."""
    buffer = Buffers(3, load_language("lua"))["deduction"]
    commented = "function f(a)  -- a comment\n  return a + 1\nend"
    assert buffer.add(entry(1))
    assert not buffer.add(entry(1, step=5))
    assert not buffer.add(replace(entry(1), program=commented))
    assert buffer.add(replace(entry(1), inputs=("2",), outputs=("3",)))


def test_the_oldest_entry_of_a_full_buffer_makes_room():
    buffer = Buffers(3, load_language("lua"))["deduction"]
    for i in range(4):
        buffer.add(entry(i, step=i))
    assert [kept.step for kept in buffer] == [1, 2, 3]


def test_draws_from_a_buffer():
    """The solver gets the newest first, and some again where there are too few."""
    buffers = Buffers(3, load_language("lua"))
    buffer = buffers["deduction"]
    for i in range(3):
        buffer.add(entry(i, step=i))

    picked = buffer.newest_first(random.Random(0), 5, step=2)
    assert picked[0] == entry(2, step=2)
    assert len(picked) == 5
    assert picked == buffer.newest_first(random.Random(0), 5, step=2)
    assert len(buffer.draw(random.Random(0), 6)) == 3
    assert buffers["abduction"].newest_first(random.Random(0), 2, step=2) == []


def test_buffers_come_back_exactly_from_their_text():
    buffers = Buffers(3, load_language("lua"))
    for i in range(4):
        buffers["deduction"].add(entry(i, step=i))
    buffers["induction"].add(Entry("p", tuple("12"), tuple("34"), "m", 7))
    buffers.solver_accuracy = 1 / 3

    other = Buffers(3, load_language("lua"))
    other.from_text(buffers.to_text())
    assert other.to_text() == buffers.to_text()
    for task in TASKS:
        assert list(other[task].entries.items()) == list(buffers[task].entries.items())


def test_seeds_from_the_public_buffers(pool):
    path = ROOT.parent / "shared" / "data" / "azr_seeds"
    if not path.is_dir():
        pytest.skip("azr_seeds is not in ../shared/data")
    language = load_language("python")
    buffers = Buffers(100, language)
    runner = Runner(pool, language)
    refused = add_seeds(buffers, path / "3b_coder_seed_io.jsonl.gz", runner, 8, 120)
    refused |= add_seeds(buffers, path / "3b_coder_code_f_seed_io.jsonl.gz", runner, 4, 120)

    assert set(refused) <= set(REASONS)
    assert len(buffers["deduction"]) == len(buffers["abduction"]) == 8
    assert len(buffers["induction"]) >= 2
    for one in buffers["induction"]:
        assert len(one.inputs) == len(one.outputs) == PAIRS
        assert one.message


# ---- the loop ----

LOOP = (
    "--steps 4 --save_every 2 --prompts 3 --seed_problems 4 --learn_samples 2 --references 0 "
    "--max_new_tokens 140 --eval_every 0 --eval_problems 3 --eval_samples 1 --wandb off"
).split()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A tiny model that nearly knows six demonstrations by heart, and a file of seeds.

    Without references a proposer's prompt is always the same.
    """
    folder = tmp_path_factory.mktemp("warm")
    language = load_language("lua")
    settings = sft.WarmStart(
        task="selfplay",
        lang="lua",
        model="tiny",
        out=str(folder / "model"),
        problems=6,
        short_prompt=True,
        references=0,
        steps=26,
        warmup=5,
        batch=6,
        lr=4e-3,
    )
    sft.run(settings, [], language, torch.device("cpu"), lambda *_: None)

    lines = []
    for i in range(18):
        one = triples.triple("train", 0, i, language, PAIRS if i % 3 == 0 else 1)
        if len(one.inputs) > 1:
            row = {"program": one.program, "inputs": one.inputs, "message": one.message}
        else:
            row = {"code": one.program, "input": one.inputs[0]}
        lines.append(json.dumps(row) + "\n")
    (folder / "seeds.jsonl").write_text("".join(lines))
    return folder


def flags(warm, *more):
    recipe = ROOT / "recipes" / "azr_tiny.toml"
    files = f"--recipe {recipe} --model {warm / 'model'} --seeds {warm / 'seeds.jsonl'}"
    return [*files.split(), "--lang", "lua", *LOOP, *more]


@pytest.fixture(scope="module")
def straight(warm):
    """The folder of a run of four steps."""
    return whole_run(warm, *flags(warm), name="straight")


def test_self_play_learns_from_proposals_and_answers(straight):
    assert any(row["propose/valid_frac"] > 0 for row in rows(straight))
    assert any(row["grad_norm"] > 0 for row in rows(straight))

    # The buffer has grown from its four seeds, and the checkpoint holds it.
    size = rows(straight)[-1]["buffer/deduction"]
    stored = json.loads((straight / "checkpoints/step_4/selfplay.json").read_text())
    assert size > 4
    assert len(stored["deduction"]) == size
    assert any(one["step"] > 0 for one in stored["deduction"])


def test_every_proposal_is_valid_or_refused_for_a_reason(straight):
    for row in rows(straight):
        refused = sum(row[f"refused/{reason}"] for reason in REASONS)
        assert refused == round(
            9 * (1 - row["propose/valid_frac"])
        )  # 3 prompts for each of 3 tasks


def test_a_resumed_run_is_the_straight_run_to_the_last_bit(warm, straight):
    cut = warm / "runs" / "cut"
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "step_4")
    resume(cut)
    assert_same_bits(cut, straight, 4, "selfplay.json")


def test_samples_end_with_their_answer(warm, monkeypatch):
    """The token that completes "</answer>" is the last one of the sequence that is trained on.

    So that an untrained model comes to it, the end of an answer is the letter "e" here.
    """
    monkeypatch.setattr(selfplay, "ANSWER_END", "e")
    tokenizer = ChatTokenizer(warm / "model")
    sampler = Sampler(hugging_face.load_model(warm / "model"))
    settings = Settings(task="selfplay", max_new_tokens=60)
    play = selfplay.Play(settings, load_language("lua"), None, sampler, tokenizer)

    found = selfplay.sample_prompts(
        play, ["solve", "propose"], 0, lambda i, sample, text: text, n=8
    )
    assert len(found) == 16
    stopped = [one for one in found if "e" in one.started]
    assert len(stopped) > 4
    for one in stopped:
        assert one.completion.finish_reason == "stop"
        assert one.sequence.tokens.tolist() == one.completion.tokens
        assert "e" in tokenizer.decode(one.completion.tokens)
        assert "e" not in tokenizer.decode(one.completion.tokens[:-1])


@pytest.mark.slow
def test_two_ranks_propose_and_solve_the_same(warm, straight):
    two = whole_run(warm, *flags(warm, "--steps", "1"), name="two", ranks=2)

    def of_self_play(row):
        groups = ("propose", "solve", "buffer", "refused", "learn")
        return {key: value for key, value in row.items() if key.split("/")[0] in groups}

    assert of_self_play(rows(two)[0]) == of_self_play(rows(straight)[0])


@pytest.mark.slow
def test_crux_evaluation_of_a_buffer(warm, straight, tmp_path):
    buffer = straight / "checkpoints/step_4/selfplay.json"
    files = f"--model {warm / 'model'} --programs {buffer} --out out"
    limits = "--bench crux --lang lua --short_prompt true --problems 4 --max_new_tokens 60"
    done = subprocess.run(
        command(*files.split(), *limits.split(), script="eval.py"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [cell["cell"] for cell in results] == ["crux output lua", "crux input lua"]
    assert [cell["problems"] for cell in results] == [4, 4]
