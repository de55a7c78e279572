"""--gold: known right programs of problems whose samples are all wrong."""

from types import SimpleNamespace

import torch

import grpo
from batches import Sequence, pack
from rollout import Sample, gold_sequences
from sandbox.languages import load_language
from settings import Settings
from tasks.problems import load_problems
from tasks.render import solution
from tasks.verdicts import Parsed, Verdict

PROLOG = load_language("prolog")
FIRST, SECOND = load_problems("sums", "train", count=2)
TOKENIZER = SimpleNamespace(encode=lambda text: list(text.encode()), stop_ids=[0])
SETTINGS = Settings(task="sums", old_logprobs="trainer", gold=0.25)


def sample(problem, group, correct, format_ok=True):
    parsed = Parsed("", "", "", format_ok)
    verdict = Verdict(problem.id, float(correct), {}, correct, "ok", None, "", parsed)
    return Sample(problem, None, verdict, Sequence([7, 8], [9], [-1.0], group=group))


def golds(*samples):
    run = SimpleNamespace(settings=SETTINGS, language=PROLOG, tokenizer=TOKENIZER)
    return gold_sequences(run, samples)


def test_only_groups_without_a_right_sample_get_their_program():
    right_in_no_form = sample(FIRST, 0, True, format_ok=False)  # the gate does not pay it
    (gold,) = golds(
        right_in_no_form, sample(FIRST, 0, False), sample(SECOND, 1, True), sample(SECOND, 1, False)
    )
    *text, stop = gold.tokens.tolist()
    assert bytes(text).decode() == solution(FIRST, PROLOG)
    assert stop == 0
    assert (gold.prompt.tolist(), gold.group, gold.advantage) == ([7, 8], 0, 0.25)


def test_what_was_not_judged_is_not_wrong():
    unjudged = sample(FIRST, 0, False)
    unjudged.verdict.reward = float("nan")
    assert golds(unjudged, sample(FIRST, 0, False)) == []


def test_a_problem_without_known_steps_has_none():
    unknown = SimpleNamespace(id="gsm8k/train/9", steps=[])
    assert golds(sample(unknown, 0, False)) == []


def test_its_gradient_is_that_of_its_log_probs_times_the_advantage():
    """At ratio 1 each token's loss has the gradient -0.25."""
    (gold,) = golds(sample(FIRST, 0, False))
    gold.logprobs = gold.old_logprobs = [-2.0] * len(gold.tokens)
    batch = pack([gold])
    logprobs = batch.old_logprobs.clone().requires_grad_()
    grpo.token_loss(logprobs, None, batch, SETTINGS).sum().backward()
    assert torch.equal(logprobs.grad, torch.full_like(logprobs, -0.25))
