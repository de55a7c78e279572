"""Losses and advantages against numbers worked out by hand, and their gradients (DESIGN.md invariants 7 and 12)."""

import math

import pytest
import torch

import grpo
from batches import Sequence, pack
from rollout import overlong_penalty
from settings import Settings

NAN = float("nan")


def test_advantages_equal_hand_computed_numbers():
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 3, 1, 1, 1]), torch.tensor([0] * 4 + [1] * 4)
    # group 0: mean 0.5, sample std 0.57735; group 1: mean 1.5, sample std 1
    expected = {
        "grpo": [0.866, -0.866, -0.866, 0.866, 1.5, -0.5, -0.5, -0.5],
        "mean": [0.5, -0.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5],
        "rloo": [2 / 3, -2 / 3, -2 / 3, 2 / 3, 2, -2 / 3, -2 / 3, -2 / 3],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(
            grpo.advantages(rewards, groups, kind), torch.tensor(values), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "batch"])
def test_groups_without_variance_are_exactly_zero(kind):
    """0.1 three times has a float mean that differs from 0.1: the check must be equality of rewards, not a small deviation."""
    rewards, groups = torch.tensor([0.1] * 3 + [1.0, 0.0, NAN]), torch.tensor([0, 0, 0, 1, 1, 1])
    values = grpo.advantages(rewards, groups, kind)
    assert values[:3].tolist() == [0.0, 0.0, 0.0]
    assert (
        values[3] > 0 > values[4] and values[5] == 0.0
    )  # a reward the sandbox could not give is masked, the others count


def test_reinforce_plus_plus_equals_hand_computed_numbers():
    """Whitening over tokens: a sample of three tokens counts three times. The KL is a reward of every token, summed from there to the end."""
    close = lambda found, expected: torch.testing.assert_close(
        torch.tensor(sum(found, [])), torch.tensor(expected), atol=1e-3, rtol=0
    )
    close(grpo.reinforce_advantages([1.0, 0.0], [1, 3], [0, 1]), [1.5, -0.5, -0.5, -0.5])
    close(
        grpo.reinforce_advantages([0.0, 0.0], [2, 1], [0, 1], kl=[[0.2, 0.1], [-0.3]], coef=1.0),
        [-0.873, -0.218, 1.091],
    )
    # baseline: rewards less the group's mean (0.5 and 0.25): 0.5 -0.5 | 0.75 -0.25 -0.25 -0.25, mean 0 and std 0.5 over six tokens
    close(
        grpo.reinforce_advantages([1, 0, 1, 0, 0, 0.0], [1] * 6, [0, 0, 1, 1, 1, 1], baseline=True),
        [1, -1, 1.5, -0.5, -0.5, -0.5],
    )
    # without the baseline groups do not matter; a masked sample is exactly 0 and moves nobody
    close(
        grpo.reinforce_advantages([1.0, NAN, 0.0], [1, 5, 3], [0, 0, 1]),
        [1.5, 0, 0, 0, 0, 0, -0.5, -0.5, -0.5],
    )


def test_reinforce_plus_plus_has_exact_zeros():
    noise = grpo.reinforce_advantages(
        [1.0, 1.0], [2, 1], [0, 0], kl=[[1e-7, -1e-7], [2e-7]], coef=0.001
    )
    assert (
        max(abs(a) for a in sum(noise, [])) < 1e-5
    )  # rounding between two forward passes of the same weights
    assert grpo.reinforce_advantages([0.1, 0.1, 0.1], [2, 1, 3], [0, 0, 1]) == [
        [0.0] * 2,
        [0.0],
        [0.0] * 3,
    ]
    flat, _, signal, _ = grpo.reinforce_advantages(
        [1.0, 1.0, 1.0, 0.0], [2, 1, 1, 4], [0, 0, 1, 1], baseline=True
    )
    assert flat == [0.0, 0.0] and signal[0] > 0
    batch = pack([Sequence([1], [2, 3], advantage=[0.5, -1.0]), Sequence([1], [4], advantage=2.0)])
    assert batch.advantages.tolist() == [0.5, -1.0, 2.0]


def test_a_masked_reward_does_not_move_its_group():
    with_gap = grpo.advantages(torch.tensor([1.0, 0.0, 0.0, NAN]), torch.zeros(4, dtype=torch.long))
    without = grpo.advantages(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(with_gap[:3], without)


def test_token_losses_equal_hand_computed_numbers():
    old = torch.zeros(4, dtype=torch.float64)
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 1.1], dtype=torch.float64))
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    clipped = grpo.clipped_loss(logprobs, old, sign, 0.2, 0.28)
    torch.testing.assert_close(clipped, torch.tensor([-1.28, 1.5, 0.8, -1.1], dtype=torch.float64))
    cispo = grpo.cispo_loss(logprobs, old, sign, 1.28)
    torch.testing.assert_close(
        cispo, -torch.tensor([1.28, 1.28, 0.5, 1.1], dtype=torch.float64) * sign * logprobs
    )
    # gspo: tokens 0 and 1 form one sequence with mean log ratio log 1.5, clipped at 1.28 for a positive advantage
    gspo = grpo.gspo_loss(
        logprobs[:2], old[:2], torch.ones(2, dtype=torch.float64), torch.tensor([0, 0]), 0.2, 0.28
    )
    torch.testing.assert_close(gspo, torch.tensor([-1.28, -1.28], dtype=torch.float64))


def test_clipped_tokens_get_no_gradient_and_the_others_do():
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 1.1])).requires_grad_()
    grpo.clipped_loss(
        logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.2, 0.28
    ).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, 0.0, -1.1]))


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_truncated_importance_weights_scale_the_gradient_and_get_none(loss):
    """Trainer 0.3, 0.1, 0.2 against sampler 0.1, 0.2, 0.2 with cap 2: weights 2, 0.5, 1."""
    log = lambda *p: torch.tensor(p).log()
    old, sampler = log(0.3, 0.1, 0.2).requires_grad_(), log(0.1, 0.2, 0.2).requires_grad_()
    weights = grpo.importance_weights(old, sampler, 2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 1.0]))
    assert not weights.requires_grad
    batch = pack([Sequence([1], [2, 3, 4], sampler.tolist(), 0.7, old_logprobs=old.tolist())])

    def gradient(tis):
        logprobs = old.detach().clone().requires_grad_()
        grpo.policy_loss(loss, logprobs, batch, 0.2, 5.0, tis=tis).sum().backward()
        return logprobs.grad

    expected = gradient(0.0) * (
        weights if loss != "gspo" else weights.mean()
    )  # gspo: the sequence's one ratio gets its tokens' weights together
    torch.testing.assert_close(gradient(2.0), expected)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo", "cispo"])
def test_gradcheck(loss):
    torch.manual_seed(0)
    batch = pack(
        [
            Sequence([1], [2, 3], [-1.0, -2.0], 0.7),
            Sequence([1], [2, 3, 4], [-1.5, -0.5, -1.0], -1.2),
        ]
    )
    batch.old_logprobs, batch.advantages = batch.old_logprobs.double(), batch.advantages.double()
    logprobs = (batch.old_logprobs + 0.05 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    if (
        loss == "cispo"
    ):  # its weight is detached, so finite differences see another function; the gradient is known in closed form
        grpo.policy_loss(loss, logprobs, batch, 0.2, 5.0).sum().backward()
        expected = -torch.exp(logprobs.detach() - batch.old_logprobs) * batch.advantages
        torch.testing.assert_close(logprobs.grad, expected)
    else:
        assert torch.autograd.gradcheck(
            lambda x: grpo.policy_loss(loss, x, batch, 0.2, 0.28), (logprobs,)
        )


def test_token_weights_are_the_stated_denominators():
    assert grpo.token_weights("grpo", [2, 6], 10) == [1 / 4, 1 / 12]
    assert grpo.token_weights("dapo", [2, 6], 10) == [1 / 8, 1 / 8]
    assert grpo.token_weights("dr_grpo", [2, 6], 10) == [1 / 20, 1 / 20]
    with pytest.raises(ValueError, match="choose grpo"):
        grpo.token_weights("ppo", [2], 10)


def test_stop_token_is_in_the_loss_and_the_prompt_is_not():
    batch = pack([Sequence([7, 8], [5, 2]), Sequence([9], [6, 2])])
    assert batch.targets.tolist() == [5, 2, 6, 2] and batch.predict.tolist() == [1, 2, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 4, 7] and batch.positions.tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
    ]
    assert batch.tokens[batch.predict + 1].tolist() == batch.targets.tolist()


def test_reference_kl_has_the_value_and_the_gradient_of_the_kl():
    """Summed over every action with the sampling policy's probabilities, the estimator is KL(pi || ref) and so is its gradient, pi = pi_old or not."""
    torch.manual_seed(0)
    ref, old = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    for start in (old, torch.randn(6, dtype=torch.float64).log_softmax(0)):
        logits = start.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        exact = (logprobs.exp() * (logprobs - ref)).sum()
        estimate = (old.exp() * grpo.reference_kl(logprobs, old, ref)).sum()
        torch.testing.assert_close(estimate, exact)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact))
        )
    worked = grpo.reference_kl(*(torch.tensor(p).log() for p in (0.5, 0.5, 0.25)))
    assert float(worked) == pytest.approx(0.193, abs=1e-3)


def test_entropy_bonus_and_kl_enter_the_loss_and_are_measured():
    s = Settings(loss="dapo", kl_coef=0.5, entropy_coef=0.1, clip_high=0.2)
    q = Sequence([1], [2, 3], [-1.0, -2.0], ref_logprobs=[-1.5, -2.0], advantage=1.0)
    batch, entropy = pack([q]), torch.tensor([0.7, 0.3])
    loss = grpo.token_loss(s, batch.old_logprobs, entropy, batch)
    k3 = [math.exp(-0.5) + 0.5 - 1, 0.0]
    assert loss.tolist() == pytest.approx([-1 + 0.5 * k3[0] - 0.07, -1 - 0.03])
    sums, gap = grpo.measure(s, batch.old_logprobs, entropy, batch)
    assert gap == 0 and sums["tokens"] == 2 and sums["entropy"] == pytest.approx(1.0)
    assert (sums["ref_k1"], sums["ref_k3"]) == (pytest.approx(0.5), pytest.approx(k3[0]))


def test_soft_overlong_penalty():
    assert [overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
