"""GEPO: its loss against hand-computed numbers and DPO, its gradient however members are laid out."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

import gepo
from batches import Sequence, score
from model import Config, make_segments, random_model
from settings import Settings

# ---- the loss ----


@pytest.mark.parametrize(
    "lam,unbiased,expected",
    [  # -log sigmoid(0.15) = 0.6210; Var(0, -0.2) = 0.01, unbiased 0.02
        (0.0, False, 0.6210),
        (1.0, False, 0.6310),
        (1.0, True, 0.6410),
        (2.0, False, 0.6410),
    ],
)
def test_worked_numbers(lam, unbiased, expected):
    rewards = 0.1 * (torch.tensor([-10.0, -12, -14, -11]) + 10)
    loss = gepo.gepo_loss(rewards, 2, lam, unbiased)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-4, rtol=0)


def test_winners_pulled_apart_cost_more_than_winners_together():
    """Whatever their mean: Var(1, -1) = 1."""
    apart = gepo.gepo_loss(torch.tensor([1.0, -1, 0, 0]), 2)
    together = gepo.gepo_loss(torch.tensor([0.0, 0, 0, 0]), 2)
    assert apart > together + 0.9


@pytest.mark.parametrize("lam", [0.0, 1.0])  # one winner has no variance
def test_one_against_one_is_dpo(lam):
    policy = torch.randn(5, 2, dtype=torch.float64)
    reference = torch.randn(5, 2, dtype=torch.float64)
    winner, loser = (policy - reference).T
    dpo = -F.logsigmoid(0.3 * (winner - loser))
    torch.testing.assert_close(gepo.gepo_loss(0.3 * (policy - reference), 1, lam), dpo)


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradcheck(unbiased):
    rewards = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: gepo.gepo_loss(r, 3, 0.7, unbiased), (rewards,))


# ---- the gradient ----


def settings(**changed):
    values = dict(
        gepo=0.01,
        gepo_losers=3,
        gepo_max_tokens=400,
        token_budget=4096,
        share_prompts=False,
        gepo_data="groups.jsonl",
    )
    return Settings(**values | changed)


@pytest.fixture
def model():
    config = Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return random_model(config, std=0.3)


def made_groups(model, count=3, members=5):
    """Groups of random tokens with log-probs of another random model as the reference."""
    draw = random.Random(0)

    def tokens(fewest, most):
        length = draw.randint(fewest, most)
        return [draw.randrange(97) for _ in range(length)]

    groups = []
    for number in range(count):
        prompt = tokens(3, 9)
        sequences = [Sequence(prompt, tokens(2, 30)) for _ in range(members)]
        groups.append(gepo.IRGroup(f"g{number}", sequences))

    reference = random_model(model.config, seed=1, std=0.3)
    for group in groups:
        scored = score(reference, group.members, 10**6, "cpu")
        group.reference = [sum(row) for row in scored]
        for member, logprob in zip(group.members, group.reference):
            member.ref_logprobs = logprob / len(member.tokens)
    return groups


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_losses(model, groups, length_norm):
    """Straight from the formula: one member at a time, one graph."""
    losses = []
    for group in groups:
        rewards = []
        for member, reference in zip(group.members, group.reference):
            tokens = torch.tensor([*member.prompt, *member.tokens])
            segments = make_segments([len(tokens)])
            hidden = model.hidden(tokens, torch.arange(len(tokens)), segments)
            logprobs = (hidden @ model.head_weight.T).log_softmax(-1)
            rows = logprobs[len(member.prompt) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(member.tokens)[:, None])
            length = len(member.tokens) if length_norm else 1
            rewards.append(0.1 * (chosen.sum() - reference) / length)
        losses.append(gepo.gepo_loss(torch.stack(rewards), 2))
    return torch.stack(losses)


@pytest.mark.parametrize("length_norm", [False, True])
def test_packed_and_serialised_members_give_the_gradient_of_the_plain_definition(
    model, length_norm
):
    groups = made_groups(model)
    losses = plain_losses(model, groups, length_norm)
    (0.01 * losses.mean()).backward()
    expected = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    longest = max(group.tokens for group in groups)

    # All groups in one forward, a group at a time, members one by one.
    for budget, packed in [(4096, 1.0), (longest, 1.0), (40, 0.0)]:
        for share in (False, True):
            how = dict(token_budget=budget, gepo_length_norm=length_norm, share_prompts=share)
            model.zero_grad(set_to_none=True)
            metrics = gepo.add_gradient(model, groups, settings(**how), torch.device("cpu"))
            assert metrics["gepo/packed"] == packed
            assert metrics["gepo/loss"] == pytest.approx(float(losses.detach().mean()), abs=1e-5)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, expected[name], atol=2e-5 * largest, rtol=1e-4)


def test_gradient_adds_to_what_is_there(model):
    """RL's gradient stays: the step's loss is their sum."""
    groups = made_groups(model)
    gepo.add_gradient(model, groups, settings(), torch.device("cpu"))
    alone = gradients(model)
    model.zero_grad(set_to_none=True)
    model.norm.sum().backward()  # a gradient of 1
    gepo.add_gradient(model, groups, settings(), torch.device("cpu"))
    torch.testing.assert_close(model.norm.grad, alone["norm"] + 1.0)


def trained(model, groups, **changed):
    """The model after 30 steps on the groups."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        gepo.add_gradient(model, groups, settings(gepo=1.0, **changed), torch.device("cpu"))
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_training_teaches_the_ranking_and_the_metric_shows_it(model, tmp_path):
    groups = made_groups(model, 6)
    gepo.cache_reference(groups, model, settings(), "cpu", tmp_path)
    held = gepo.Gepo(groups, groups)

    def metrics(model):
        return gepo.held_out_metrics(held, model, settings(), "cpu")

    before = metrics(model)
    assert before["gepo/rank_accuracy"] == 0.5
    assert abs(before["gepo/winner_std"]) < 1e-5
    assert 0 < before["gepo/logprob_rank_accuracy"] < 1
    after = metrics(trained(model, groups))
    assert after["gepo/rank_accuracy"] > 0.95
    assert after["gepo/margin"] > 0.3

    # What lam is for: without it winners drift apart.
    loose = metrics(trained(random_model(model.config, std=0.3), groups, gepo_lam=0.0))
    assert after["gepo/winner_std"] < 0.7 * loose["gepo/winner_std"]


def test_reference_is_computed_once_and_kept(model, tmp_path):
    groups = made_groups(model)
    gepo.cache_reference(groups, model, settings(), "cpu", tmp_path)
    kept = [member.ref_logprobs for member in gepo.members_of(groups)]
    other_weights = random_model(model.config, seed=5)  # as a resumed run has
    gepo.cache_reference(groups, other_weights, settings(), "cpu", tmp_path)
    assert [member.ref_logprobs for member in gepo.members_of(groups)] == kept

    groups[0].members[0].tokens = groups[0].members[0].tokens[1:]
    with pytest.raises(SystemExit, match="start a new run"):
        gepo.cache_reference(groups, model, settings(), "cpu", tmp_path)


def test_ranking_counts_pairs():
    """Winners 3 and 1, losers 2 and 0: three of four pairs are right; ties count half."""
    assert gepo.ranking(torch.tensor([[3.0, 1, 2, 0]]), 2) == 0.75
    assert gepo.ranking(torch.zeros(2, 4), 2) == 0.5


# ---- reading groups ----


class Letters:
    """A tokenizer of one token per letter: no file, no training."""

    stop_ids = (0,)

    def encode(self, text):
        return [ord(character) % 96 + 1 for character in text]

    def encode_chat(self, messages):
        return self.encode(messages[0]["content"])


@pytest.fixture
def groups_file(tmp_path):
    """49 groups: 40 with 2 winners and 3 losers, 5 with one winner, 4 with one loser."""
    path = tmp_path / "groups.jsonl"
    sizes = [(2, 3)] * 40 + [(1, 3)] * 5 + [(2, 1)] * 4
    lines = []
    for number, (winners, losers) in enumerate(sizes):
        group = {
            "id": f"f{number}",
            "c": f"int f{number}(void) {{ return {number}; }}",
            "winners": [{"ir": f"w{number}{j}"} for j in range(winners)],
            "losers": [{"kind": "swap", "ir": f"l{number}{j}"} for j in range(losers)],
            "cheap": [{"kind": "cheap", "ir": "c"}],
        }
        lines.append(json.dumps(group) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_groups_that_do_not_fit_are_counted(groups_file):
    said = []
    train, held_out = gepo.load_groups(settings(gepo_data=groups_file), Letters(), said.append)
    assert len(train) + len(held_out) == 40
    assert held_out
    assert not {group.id for group in train} & {group.id for group in held_out}
    assert all(len(group.members) == 5 for group in train)
    counted = "40 of 49 groups; 5 have fewer than 2 winners, 4 fewer than 3 losers, 0 are longer"
    assert counted in said[0]
    assert said[1] == "GEPO's losers: swap 100%"


def test_one_against_one_takes_all_groups(groups_file):
    dpo = settings(gepo_data=groups_file, gepo_winners=1, gepo_losers=1)
    train, held_out = gepo.load_groups(dpo, Letters(), lambda _: None)
    assert len(train) + len(held_out) == 49


@pytest.mark.parametrize(
    "changed,sentence",
    [({"gepo_max_tokens": 20}, "leaves 0 groups"), ({"gepo_data": "no.jsonl"}, "gepo.py build")],
)
def test_no_group_left_is_one_sentence(groups_file, changed, sentence):
    with pytest.raises(SystemExit, match=sentence):
        gepo.load_groups(
            settings(**{"gepo_data": groups_file} | changed), Letters(), lambda _: None
        )
