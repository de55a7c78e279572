"""Losses and advantages against numbers worked out by hand, and their gradients."""

import itertools
import math

import pytest
import torch

import grpo
import metrics
import rollout
from batches import Sequence, pack
from kernels import advantage
from settings import Settings
from shaping import overlong_penalty
from tasks.verdicts import Parsed, Verdict

NAN = float("nan")
log = torch.log


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-3, rtol=0)


# ---- advantages ----


@pytest.mark.parametrize(
    "kind,first,second",
    [  # group 0: mean 0.5, sample std 0.57735; group 1: mean 1.5, sample std 1
        ("grpo", [0.866, -0.866, -0.866, 0.866], [1.5, -0.5, -0.5, -0.5]),
        ("mean", [0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]),
        ("rloo", [2 / 3, -2 / 3, -2 / 3, 2 / 3], [2, -2 / 3, -2 / 3, -2 / 3]),
        # all eight: mean 1, sum of squares 6, std sqrt(6 / 7) = 0.9258
        ("batch", [0.540, -0.540, -0.540, 0.540], [1.620, -0.540, -0.540, -0.540]),
    ],
)
def test_advantages_equal_hand_computed_numbers(kind, first, second):
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 1, 1, 1])
    group_ids = torch.tensor([0] * 4 + [1] * 4)
    close(grpo.advantages(rewards, group_ids, kind), first + second)


def test_pass_at_k_pays_tries_of_k_samples():
    """1 0 0 1, k 2: 5 of 6 pairs pass, deviation 0.3727; all pairs of a right one, 2 / 3 of a wrong
    one's. 0 0 0 1: 1 / 2, 1 / 2, a wrong one's 1 / 3. k 3 of 1 0 0 1: every try passes."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    group_ids = torch.tensor([0] * 4 + [1] * 4)
    expected = [0.447, -0.447, -0.447, 0.447, -1 / 3, -1 / 3, -1 / 3, 1]
    close(grpo.advantages(rewards, group_ids, "pass@k", k=2), expected)
    assert grpo.advantages(rewards, group_ids, "pass@k", k=3)[:4].tolist() == [0.0] * 4


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_equals_counting_all_tries(k):
    """Every k of 6 samples, one of which could not be judged: 5 choose k tries."""
    rewards = torch.tensor([0.0, 1, NAN, 0, 0, 0])
    tries = list(itertools.combinations([0, 1, 3, 4, 5], k))
    pays = [float(rewards[list(one)].max()) for one in tries]
    mean = sum(pays) / len(pays)
    std = (sum((pay - mean) ** 2 for pay in pays) / len(pays)) ** 0.5
    found = grpo.advantages(rewards, torch.zeros(6, dtype=torch.long), "pass@k", k=k)
    for i in (0, 1, 3, 4, 5):
        own = [pay for pay, one in zip(pays, tries) if i in one]
        close(found[i], (sum(own) / len(own) - mean) / (std + 1e-6))
    assert found[2] == 0


def test_trr_takes_its_statistics_over_tokens():
    """Rewards 1 and 0 of 1 and 3 tokens: mean 1/4, variance (0.75^2 + 3 * 0.25^2) / 3 = 1/4."""
    group_ids = torch.zeros(2, dtype=torch.long)
    lengths = torch.tensor([1, 3])
    close(grpo.advantages(torch.tensor([1.0, 0.0]), group_ids, "trr++", lengths), [1.5, -0.5])


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "batch", "trr++", "pass@k"])
def test_groups_without_variance_are_exactly_zero(kind):
    """0.1 three times has a float mean that is not 0.1: rewards are compared as they are."""
    rewards = torch.tensor([0.1] * 3 + [1.0, 0.0, NAN])
    group_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    values = grpo.advantages(rewards, group_ids, kind, torch.ones(6))
    assert values[:3].tolist() == [0.0, 0.0, 0.0]
    assert values[3] > 0 > values[4]
    assert values[5] == 0.0  # could not be judged: masked, the others count


def test_a_masked_reward_does_not_move_its_group():
    one_group = torch.zeros(4, dtype=torch.long)
    with_gap = grpo.advantages(torch.tensor([1.0, 0.0, 0.0, NAN]), one_group)
    without = grpo.advantages(torch.tensor([1.0, 0.0, 0.0]), one_group[:3])
    torch.testing.assert_close(with_gap[:3], without)


def test_unknown_advantage_is_one_sentence():
    with pytest.raises(ValueError, match="unknown advantage 'gae'"):
        grpo.advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "gae")


def reinforce(rewards, lengths, group_ids, **options):
    rewards, lengths, group_ids = map(torch.tensor, (rewards, lengths, group_ids))
    return grpo.reinforce_advantages(rewards, group_ids, lengths, **options)


def test_reinforce_plus_plus_equals_hand_computed_numbers():
    # Whitened over tokens: a rollout of three tokens counts three times.
    found = reinforce([1.0, 0.0], [1, 3], [0, 1])
    close(sum(found, []), [1.5, -0.5, -0.5, -0.5])

    # The KL is a reward of every token, summed from there to the end: returns -0.3 -0.1 0.3.
    found = reinforce([0.0, 0.0], [2, 1], [0, 1], kl=[[0.2, 0.1], [-0.3]], kl_coef=1.0)
    close(sum(found, []), [-0.873, -0.218, 1.091])

    # baseline: less the group's mean (0.5, 0.25): 0.5 -0.5 0.75 -0.25 -0.25 -0.25, std 0.5.
    found = reinforce([1.0, 0, 1, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 1, 1], baseline=True)
    close(sum(found, []), [1, -1, 1.5, -0.5, -0.5, -0.5])

    # Without the baseline groups do not matter; a masked rollout is exactly 0 and moves nobody.
    found = reinforce([1.0, NAN, 0.0], [1, 5, 3], [0, 0, 1])
    close(sum(found, []), [1.5, 0, 0, 0, 0, 0, -0.5, -0.5, -0.5])


def test_reinforce_plus_plus_has_exact_zeros():
    assert reinforce([0.1, 0.1, 0.1], [2, 1, 3], [0, 0, 1]) == [[0.0] * 2, [0.0], [0.0] * 3]
    flat, _, signal, _ = reinforce([1.0, 1, 1, 0], [2, 1, 1, 4], [0, 0, 1, 1], baseline=True)
    assert flat == [0.0, 0.0]
    assert signal[0] > 0


def test_a_kl_that_is_only_rounding_is_not_blown_up_to_a_signal():
    noise = reinforce([1.0, 1.0], [2, 1], [0, 0], kl=[[1e-7, -1e-7], [2e-7]], kl_coef=0.001)
    assert max(abs(value) for value in sum(noise, [])) < 1e-5


class Run:
    """What set_advantages needs of a run."""

    device = torch.device("cpu")

    def __init__(self, **settings):
        self.settings = Settings(**settings)


def sample(group, reward, correct=None, in_form=True):
    """Right when its reward is 1, if nothing else is said."""
    verdict = Verdict(
        problem="p",
        reward=reward,
        components={},
        correct=reward == 1.0 if correct is None else correct,
        status="ok",
        value=None,
        program="",
        parsed=Parsed("", "", "", in_form),
    )
    return rollout.Sample(None, None, verdict, Sequence([1], [2], group=group))


def test_the_groups_kernel_is_what_a_rollouts_advantages_reach(monkeypatch):
    """On a GPU rewards are on the run's device, so the Triton kernel runs; here interpreted."""
    pytest.importorskip("triton")
    launches = []
    kernel = advantage._group_statistics

    def counted(*arguments):
        launches.append(len(arguments[0]))
        return kernel(*arguments)

    monkeypatch.setattr(advantage, "use_triton", lambda x: True)
    monkeypatch.setattr(advantage, "_group_statistics", counted)
    samples = [sample(0, 1.0), sample(0, 0.0), sample(1, 0.1), sample(1, 0.1), sample(1, NAN)]
    sequences = rollout.set_advantages(Run(), samples)

    assert launches == [5]  # once, with all of the step
    close([x.advantage for x in sequences], [0.7071, -0.7071, 0.0, 0.0])  # std sqrt(1/2)


def test_dynamic_sampling_leaves_groups_without_signal_out_of_the_loss():
    """Group 1 has equal rewards, group 2 one judged sample: only group 0 is left."""
    samples = [sample(0, 1.0), sample(0, 0.0), sample(1, 1.0), sample(1, 1.0)]
    samples += [sample(2, 1.0), sample(2, NAN)]
    kept = rollout.set_advantages(Run(dynamic_sampling=2), samples)
    assert [sequence.group for sequence in kept] == [0, 0]
    everyone = rollout.set_advantages(Run(), samples)
    assert [sequence.group for sequence in everyone] == [0, 0, 1, 1, 2]


def kept_by_dynamic_sampling(samples, **settings):
    kept = rollout.set_advantages(Run(dynamic_sampling=2, **settings), samples)
    return [sequence.group for sequence in kept]


def test_lengths_alone_are_no_signal_for_dynamic_sampling():
    """Eight wrong answers, the last in the overlong buffer: 81 of 100 tokens with 20 -> -0.05.

    Mean -0.00625, deviation 0.01768: seven wrong answers would be reinforced by 0.354 each.
    """
    penalty = overlong_penalty(81, 100, 20)
    all_wrong = [sample(0, 0.0) for _ in range(7)] + [sample(0, penalty, correct=False)]
    everyone = rollout.set_advantages(Run(), all_wrong)
    close([x.advantage for x in everyone], [0.354] * 7 + [-2.475])
    assert kept_by_dynamic_sampling(all_wrong) == []

    all_right = [sample(0, 1.0), sample(0, 1.0 + penalty, correct=True)]
    assert kept_by_dynamic_sampling(all_right) == []
    one_right = [sample(0, 1.0 + penalty, correct=True), sample(0, 0.0)]
    assert kept_by_dynamic_sampling(one_right) == [0, 0]


def test_format_points_alone_are_no_signal_for_dynamic_sampling():
    """A published sum: -1 wrong, 0.5 for the form. Both samples are wrong."""
    wrong = [sample(0, -0.5), sample(0, -1.0, in_form=False)]
    assert kept_by_dynamic_sampling(wrong, format_gate=False) == []


def test_what_the_format_gate_does_not_pay_is_not_right_for_dynamic_sampling():
    """A right program outside the form and a wrong one: gated both get 0, summed 1 and 0."""
    gated = [sample(0, 0.0, correct=True, in_form=False), sample(0, 0.0)]
    assert kept_by_dynamic_sampling(gated) == []
    summed = [sample(0, 1.0, correct=True, in_form=False), sample(0, 0.0)]
    assert kept_by_dynamic_sampling(summed, format_gate=False) == [0, 0]


# ---- losses ----


def gradient(settings, ratios, advantage=1.0, sequences=1):
    """d loss / d log-prob, with the tokens' ratios spread over equal sequences."""
    size = len(ratios) // sequences
    rows = [Sequence([1], [2] * size, [0.0] * size, advantage) for _ in range(sequences)]
    logprobs = log(tensor(*ratios)).float().requires_grad_()
    grpo.token_loss(logprobs, None, pack(rows), settings).sum().backward()
    return logprobs.grad


def test_cispo_by_name_weighs_tokens_by_their_ratio_up_to_five():
    """With dapo's 0.28 as its cap every weight was 0.28: the ratio of no token mattered."""
    found = gradient(Settings(loss="cispo"), [1.0, 0.61, 1.65, 7.0])
    close(found, torch.tensor([-1.0, -0.61, -1.65, -5.0]))
    close(gradient(Settings(loss="cispo", cispo_cap=1.5), [1.0, 1.65]), torch.tensor([-1.0, -1.5]))


def test_gspo_by_name_clips_as_its_paper_does():
    """Sequence ratios 1.0003 and 1.0005 against 1 + 4e-4: the second has no gradient.

    The first: each of its two tokens has half of its ratio, for both tokens: 1.0003. With dapo's
    0.28 neither was clipped.
    """
    found = gradient(Settings(loss="gspo"), [1.0003, 1.0003, 1.0005, 1.0005], sequences=2)
    close(found, torch.tensor([-1.0003, -1.0003, 0.0, 0.0]))


def test_dr_grpo_by_name_does_not_divide_by_the_deviation():
    """Rewards 1 and 0: 0.5 and -0.5, where GRPO's are 0.707 and -0.707."""
    for loss, size in (("dr_grpo", 0.5), ("grpo", 0.7071)):
        sequences = rollout.set_advantages(Run(loss=loss), [sample(0, 1.0), sample(0, 0.0)])
        close([x.advantage for x in sequences], [size, -size])


def measured(loss, logprobs, entropy, batch, settings):
    where_clipped = grpo.clipped(logprobs, batch, settings)
    return metrics.measure(loss, logprobs, entropy, where_clipped, batch, settings)


@pytest.mark.parametrize(
    "loss,low,high",
    [
        ("dapo", [0, 1, 0, 0], [1, 0, 0, 1]),
        # Its ratio is the sequence's: sqrt(1.5 * 0.5) = 0.87 and sqrt(1.5 * 6) = 3.
        ("gspo", [0, 1, 0, 0], [0, 0, 0, 1]),
        ("cispo", [0, 0, 0, 0], [0, 0, 0, 1]),  # only above 5
    ],
)
def test_what_is_counted_as_clipped_is_what_the_loss_clips(loss, low, high):
    """Ratios 1.5, 0.5 of a first sequence and 1.5, 6 of a second; advantages 1, -1 and -1, 1."""
    logprobs = log(torch.tensor([1.5, 0.5, 1.5, 6.0]))
    signs = [[1.0, -1.0], [-1.0, 1.0]]
    batch = pack([Sequence([1], [2, 2], [0.0, 0.0], row) for row in signs])
    found = grpo.clipped(logprobs, batch, Settings(loss=loss))
    assert [mask.int().tolist() for mask in found] == [low, high]


def test_token_losses_equal_hand_computed_numbers():
    old = torch.zeros(4, dtype=torch.float64)
    logprobs = log(tensor(1.5, 1.5, 0.5, 1.1))
    sign = tensor(1, -1, -1, 1)
    close(grpo.clipped_loss(logprobs, old, sign, 0.2, 0.28), tensor(-1.28, 1.5, 0.8, -1.1))
    weights = tensor(1.28, 1.28, 0.5, 1.1)
    close(grpo.cispo_loss(logprobs, old, sign, 1.28), -weights * sign * logprobs)


def test_gspo_has_one_ratio_for_a_sequence():
    """Ratios 1.5 and 1.5 have the mean 1.5, clipped at 1.28; 1.5 and 2/3 have the mean 1."""
    logprobs = log(tensor(1.5, 1.5, 1.5, 2 / 3))
    sequence = torch.tensor([0, 0, 1, 1])
    zeros, ones = torch.zeros_like(logprobs), torch.ones_like(logprobs)
    found = grpo.gspo_loss(logprobs, zeros, ones, sequence, 2, 0.2, 0.28)
    close(found, tensor(-1.28, -1.28, -1.0, -1.0))


def test_clipped_tokens_get_no_gradient_and_the_others_do():
    logprobs = log(torch.tensor([1.5, 1.5, 0.5, 1.1])).requires_grad_()
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0])
    grpo.clipped_loss(logprobs, torch.zeros(4), sign, 0.2, 0.28).sum().backward()
    close(logprobs.grad, torch.tensor([0.0, 1.5, 0.0, -1.1]))


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_truncated_importance_weights_scale_the_gradient_and_get_none(loss):
    """Trainer 0.3, 0.1, 0.2 against sampler 0.1, 0.2, 0.2 with cap 2: weights 2, 0.5, 1."""
    old = log(torch.tensor([0.3, 0.1, 0.2])).requires_grad_()
    sampler = log(torch.tensor([0.1, 0.2, 0.2])).requires_grad_()
    weights = grpo.importance_weights(old, sampler, 2.0)
    close(weights, torch.tensor([2.0, 0.5, 1.0]))
    assert not weights.requires_grad
    batch = pack([Sequence([1], [2, 3, 4], sampler.tolist(), 0.7, old_logprobs=old.tolist())])

    def gradient(tis):
        bounds = {"cispo_cap": 5.0} if loss == "cispo" else {"clip_low": 1.0, "clip_high": 5.0}
        settings = Settings(loss=loss, old_logprobs="trainer", tis=tis, **bounds)
        logprobs = old.detach().clone().requires_grad_()
        grpo.token_loss(logprobs, None, batch, settings).sum().backward()
        return logprobs.grad

    if loss == "gspo":  # the sequence's one ratio gets its tokens' weights together
        weights = weights.mean()
    torch.testing.assert_close(gradient(2.0), gradient(0.0) * weights)


def test_masked_importance_weights_drop_what_is_beyond_the_cap():
    old, sampler = log(torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.2]]))
    close(grpo.importance_weights(old, sampler, 2.0, mask=True), torch.tensor([0.0, 0.5, 1.0]))


def test_right_answers_can_teach_less_than_wrong_ones():
    """Ratio 1: a token's loss is -A, at weight 0.1 where A is positive."""
    batch = pack([Sequence([1], [2, 3], [-1.0, -1.0], [0.5, -0.5])])
    settings = Settings(positive_weight=0.1)
    losses = grpo.token_loss(batch.old_logprobs, None, batch, settings)
    close(losses, torch.tensor([-0.05, 0.5]))


def uneven_batch():
    """Two sequences in float64, and log-probs some 0.05 away from the old ones."""
    torch.manual_seed(0)
    first = Sequence([1], [2, 3], [-1.0, -2.0], 0.7)
    second = Sequence([1], [2, 3, 4], [-1.5, -0.5, -1.0], -1.2)
    batch = pack([first, second])
    batch.old_logprobs = batch.old_logprobs.double()
    batch.advantages = batch.advantages.double()
    logprobs = batch.old_logprobs + 0.05 * torch.randn(5, dtype=torch.float64)
    return batch, logprobs.requires_grad_()


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_gradcheck(loss):
    batch, logprobs = uneven_batch()
    settings = Settings(loss=loss, clip_low=0.2, clip_high=0.28)
    assert torch.autograd.gradcheck(
        lambda x: grpo.token_loss(x, None, batch, settings), (logprobs,)
    )


def test_cispo_has_the_gradient_of_its_closed_form():
    """Its weight is a constant, so finite differences see another function: -rho A."""
    batch, logprobs = uneven_batch()
    grpo.token_loss(logprobs, None, batch, Settings(loss="cispo")).sum().backward()
    ratio = torch.exp(logprobs.detach() - batch.old_logprobs)
    torch.testing.assert_close(logprobs.grad, -ratio * batch.advantages)


def test_token_weights_are_the_stated_denominators():
    assert grpo.token_weights("grpo", [2, 6], 10) == [1 / 4, 1 / 12]
    assert grpo.token_weights("dapo", [2, 6], 10) == [1 / 8, 1 / 8]
    assert grpo.token_weights("dr_grpo", [2, 6], 10) == [1 / 20, 1 / 20]
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        grpo.token_weights("ppo", [2], 10)


def test_reference_kl_has_the_value_and_the_gradient_of_the_kl():
    """Summed over every action with the sampling policy's probabilities, pi = pi_old or not."""
    torch.manual_seed(0)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)
    old = torch.randn(6, dtype=torch.float64).log_softmax(0)
    for start in (old, torch.randn(6, dtype=torch.float64).log_softmax(0)):
        logits = start.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        exact = (logprobs.exp() * (logprobs - ref)).sum()
        estimate = (old.exp() * grpo.reference_kl(logprobs, old, ref)).sum()
        torch.testing.assert_close(estimate, exact)
        (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(estimate, logits)[0], gradient)
    worked = grpo.reference_kl(*log(tensor(0.5, 0.5, 0.25)))
    assert float(worked) == pytest.approx(0.193, abs=1e-3)


def test_distilling_has_the_gradient_of_the_kl_to_the_teacher():
    """All tokens of a vocabulary of four, each as often as the policy draws it."""
    logits = torch.tensor([0.3, -0.2, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    own = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), logits)

    own = logits.log_softmax(0)
    values = grpo.distill_advantages(own.tolist(), teacher.tolist())
    losses = grpo.clipped_loss(own, own.detach(), torch.tensor(values).double(), 0.2, 0.28)
    (found,) = torch.autograd.grad((own.exp().detach() * losses).sum(), logits)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert grpo.distill_advantages([math.log(0.5)], [math.log(0.25)])[0] == pytest.approx(
        -0.693, abs=1e-3
    )


def test_entropy_bonus_and_kl_enter_the_loss_and_are_measured():
    settings = Settings(loss="dapo", kl_coef=0.5, entropy_coef=0.1, clip_high=0.2)
    sequence = Sequence([1], [2, 3], [-1.0, -2.0], ref_logprobs=[-1.5, -2.0], advantage=1.0)
    batch = pack([sequence])
    entropy = torch.tensor([0.7, 0.3])
    k3 = math.exp(-0.5) + 0.5 - 1  # of the first token; 0 of the second

    loss = grpo.token_loss(batch.old_logprobs, entropy, batch, settings)
    assert loss.tolist() == pytest.approx([-1 + 0.5 * k3 - 0.07, -1 - 0.03])

    sums = measured(loss.sum(), batch.old_logprobs, entropy, batch, settings)
    assert (sums["largest_gap"], sums["tokens"]) == (0, 2)
    assert sums["entropy"] == pytest.approx(1.0)
    assert sums["ref_k1"] == pytest.approx(0.5)
    assert sums["ref_k3"] == pytest.approx(k3)


def test_measure_tells_clipped_tokens_and_the_mismatch_apart():
    """Ratios 1.5 (A 1: clipped high), 0.5 (A -1: clipped low), 1.5 (A -1: not), 1.1 (A 1: not)."""
    logprobs = log(torch.tensor([1.5, 0.5, 1.5, 1.1]))
    signs = [1.0, -1.0, -1.0, 1.0]
    batch = pack([Sequence([1], [2] * 4, [0.1] * 4, signs, old_logprobs=[1e-9] * 4)])
    sums = measured(torch.zeros(()), logprobs, torch.zeros(4), batch, Settings())
    assert (sums["clip_high"], sums["clip_low"]) == (1, 1)
    gap = (logprobs - 0.1).abs()  # from the sampler's log-probs
    assert sums["largest_gap"] == pytest.approx(float(gap.max()))
    assert sums["gap"] == pytest.approx(float(gap.sum()))


# ---- packing and shaping ----


def test_stop_token_is_in_the_loss_and_the_prompt_is_not():
    batch = pack([Sequence([7, 8], [5, 2]), Sequence([9], [6, 2])])
    assert batch.targets.tolist() == [5, 2, 6, 2]
    assert batch.predict.tolist() == [1, 2, 4, 5]
    assert batch.segments.query_ends.tolist() == [0, 4, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.tokens[batch.predict + 1].tolist() == batch.targets.tolist()


def test_an_advantage_is_one_number_for_all_tokens_or_one_for_each():
    sequences = [Sequence([1], [2, 3], advantage=[0.5, -1.0]), Sequence([1], [4], advantage=2.0)]
    assert pack(sequences).advantages.tolist() == [0.5, -1.0, 2.0]


def test_soft_overlong_penalty():
    assert [overlong_penalty(length, 100, 20) for length in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
