"""GEPO: its loss against hand-computed numbers and DPO, its gradient however members are laid out."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gepo
from batches import Sequence, score
from model import Config, random_model

# ---- the loss ----


def test_worked_numbers():
    rewards = 0.1 * (torch.tensor([-10.0, -12, -14, -11]) + 10)
    for lam, unbiased, expected in [
        (0.0, False, 0.6210),
        (1.0, False, 0.6310),
        (1.0, True, 0.6410),
        (2.0, False, 0.6410),
    ]:
        torch.testing.assert_close(
            gepo.gepo_loss(rewards, 2, lam, unbiased), torch.tensor(expected), atol=1e-4, rtol=0
        )
    # winners pulled apart cost more than winners together, whatever their mean
    assert (
        gepo.gepo_loss(torch.tensor([1.0, -1, 0, 0]), 2)
        > gepo.gepo_loss(torch.tensor([0.0, 0, 0, 0]), 2) + 0.9
    )


def test_one_against_one_without_variance_is_dpo():
    policy, reference = (
        torch.randn(5, 2, dtype=torch.float64),
        torch.randn(5, 2, dtype=torch.float64),
    )
    dpo = -F.logsigmoid(0.3 * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1])))
    torch.testing.assert_close(gepo.gepo_loss(0.3 * (policy - reference), 1, lam=0.0), dpo)
    torch.testing.assert_close(
        gepo.gepo_loss(0.3 * (policy - reference), 1, lam=1.0), dpo
    )  # one winner has no variance


def test_gradcheck():
    rewards = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for unbiased in (False, True):
        assert torch.autograd.gradcheck(lambda r: gepo.gepo_loss(r, 3, 0.7, unbiased), (rewards,))


# ---- the gradient ----


def settings(**changed):
    values = dict(
        gepo=0.01,
        gepo_batch=3,
        gepo_winners=2,
        gepo_losers=3,
        gepo_beta=0.1,
        gepo_lam=1.0,
        gepo_length_norm=False,
        gepo_unbiased=False,
        gepo_cheap=False,
        gepo_max_tokens=400,
        token_budget=4096,
        share_prompts=False,
        seed=0,
        gepo_data="groups.jsonl",
    )
    return SimpleNamespace(**values | changed)


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
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(97) for _ in range(n)]
    groups = []
    for i in range(count):
        prompt = ids(draw.randint(3, 9))
        groups.append(
            gepo.IRGroup(
                f"g{i}", [Sequence(prompt, ids(draw.randint(2, 30))) for _ in range(members)]
            )
        )
    reference = random_model(model.config, seed=1, std=0.3)
    for g in groups:
        g.reference = [sum(row) for row in score(reference, g.members, 10**6, "cpu")]
        for q, total in zip(g.members, g.reference):
            q.ref_logprobs = total / len(q.tokens)
    return groups


def gradient(model, groups, s):
    model.zero_grad(set_to_none=True)
    metrics = gepo.add_gradient(model, groups, s, torch.device("cpu"))
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("length_norm", [False, True])
def test_packed_and_serialised_members_give_the_gradient_of_the_plain_definition(
    model, length_norm
):
    groups = made_groups(model)
    plain = []
    for g in groups:  # straight from the formula: one member at a time, one graph
        rewards = []
        for q in g.members:
            tokens = torch.tensor(q.prompt + q.tokens)
            hidden = model.hidden(
                tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
            )
            rows = (hidden @ model.head_weight.T).log_softmax(-1)[len(q.prompt) - 1 : -1]
            ratio = (
                rows.gather(1, torch.tensor(q.tokens)[:, None]).sum() - g.reference[len(rewards)]
            )
            rewards.append(0.1 * ratio / (len(q.tokens) if length_norm else 1))
        plain.append(gepo.gepo_loss(torch.stack(rewards), 2))
    model.zero_grad(set_to_none=True)
    (0.01 * torch.stack(plain).mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in expected.values())
    for budget, packed, share in [
        (4096, 1.0, False),
        (4096, 1.0, True),
        (max(g.tokens for g in groups), 1.0, False),
        (40, 0.0, False),
        (40, 0.0, True),
    ]:
        metrics, found = gradient(
            model,
            groups,
            settings(token_budget=budget, gepo_length_norm=length_norm, share_prompts=share),
        )
        assert metrics["gepo/packed"] == packed
        assert metrics["gepo/loss"] == pytest.approx(
            float(torch.stack(plain).detach().mean()), abs=1e-5
        )
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=2e-5 * largest, rtol=1e-4)


def test_gradient_adds_to_what_is_there(model):
    """RL's gradient stays: the step's loss is their sum."""
    groups = made_groups(model)
    _, alone = gradient(model, groups, settings())
    model.zero_grad(set_to_none=True)
    model.norm.sum().backward()
    gepo.add_gradient(model, groups, settings(), torch.device("cpu"))
    torch.testing.assert_close(model.norm.grad, alone["norm"] + 1.0)


def test_training_teaches_the_ranking_and_the_metric_shows_it(model, tmp_path):
    groups, s = made_groups(model, 6), settings(gepo=1.0)
    gepo.cache_reference(groups, model, s, "cpu", tmp_path)
    held = gepo.Gepo(groups, groups)
    before = gepo.held_out_metrics(held, model, s, "cpu")
    assert (
        before["gepo/rank_accuracy"] == 0.5
        and abs(before["gepo/winner_std"]) < 1e-5
        and 0 < before["gepo/logprob_rank_accuracy"] < 1
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        gepo.add_gradient(model, groups, s, torch.device("cpu"))
        optimizer.step()
        optimizer.zero_grad()
    after = gepo.held_out_metrics(held, model, s, "cpu")
    assert after["gepo/rank_accuracy"] > 0.95 and after["gepo/margin"] > 0.3
    loose, sloppy = random_model(model.config, std=0.3), settings(gepo=1.0, gepo_lam=0.0)
    optimizer = torch.optim.Adam(loose.parameters(), 1e-2)
    for _ in range(30):
        gepo.add_gradient(loose, groups, sloppy, torch.device("cpu"))
        optimizer.step()
        optimizer.zero_grad()
    assert (
        after["gepo/winner_std"]
        < 0.7 * gepo.held_out_metrics(held, loose, s, "cpu")["gepo/winner_std"]
    )  # what lam is for


def test_reference_is_computed_once_and_kept(model, tmp_path):
    groups = made_groups(model)
    gepo.cache_reference(groups, model, settings(), "cpu", tmp_path)
    kept = [q.ref_logprobs for g in groups for q in g.members]
    gepo.cache_reference(
        groups, random_model(model.config, seed=5), settings(), "cpu", tmp_path
    )  # a resumed run, with other weights
    assert [q.ref_logprobs for g in groups for q in g.members] == kept
    groups[0].members[0].tokens.append(1)
    with pytest.raises(SystemExit, match="start a new run"):
        gepo.cache_reference(groups, model, settings(), "cpu", tmp_path)


def test_ranking_counts_pairs():
    assert (
        gepo.ranking(torch.tensor([[3.0, 1, 2, 0]]), 2) == 0.75
        and gepo.ranking(torch.zeros(2, 4), 2) == 0.5
    )


# ---- reading groups ----


class Letters:
    """A tokenizer of one token per letter: no file, no training."""

    stop_ids = (0,)

    def encode(self, text):
        return [ord(c) % 96 + 1 for c in text]

    def encode_chat(self, messages):
        return self.encode(messages[0]["content"])


def write_groups(path, sizes):
    rows = [
        {
            "id": f"f{i}",
            "c": f"int f{i}(void) {{ return {i}; }}",
            "winners": [{"ir": f"w{i}{j}"} for j in range(n)],
            "losers": [{"kind": "swap", "ir": f"l{i}{j}"} for j in range(m)],
            "cheap": [{"kind": "cheap", "ir": "c"}],
        }
        for i, (n, m) in enumerate(sizes)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_groups_that_do_not_fit_are_counted(tmp_path):
    path, said = tmp_path / "groups.jsonl", []
    write_groups(path, [(2, 3)] * 40 + [(1, 3)] * 5 + [(2, 1)] * 4)
    train, held_out = gepo.load_groups(settings(gepo_data=str(path)), Letters(), said.append)
    assert (
        len(train) + len(held_out) == 40
        and held_out
        and not {g.id for g in train} & {g.id for g in held_out}
    )
    assert (
        all(len(g.members) == 5 for g in train)
        and "40 of 49 groups; 5 have fewer than 2 winners, 4 fewer than 3 losers, 0 are longer"
        in said[0]
    )
    assert said[1] == "GEPO's losers: swap 100%"
    one = gepo.load_groups(
        settings(gepo_data=str(path), gepo_winners=1, gepo_losers=1), Letters(), said.append
    )
    assert sum(map(len, one)) == 49  # DPO takes them all
    for changed, words in [
        (dict(gepo_max_tokens=20), "leaves 0 groups"),
        (dict(gepo_data=str(tmp_path / "no.jsonl")), "gepo.py build"),
    ]:
        with pytest.raises(SystemExit, match=words):
            gepo.load_groups(
                settings(**dict(gepo_data=str(path)) | changed), Letters(), said.append
            )
