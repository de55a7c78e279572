"""GEPO: its loss against hand-computed numbers and DPO, its gradient however members are laid out."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gepo
from batches import Sequence, score
from model import Config, make_segments, random_model
from settings import Settings
from tasks import ir_exclusions, translate
from tasks.c_functions import read_units
from tasks.data import find_data
from tasks.translate import is_held_out
from tasks.translate_data import Translation, built_in

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


def test_variance_up_to_eps_costs_nothing():
    """Var(0, -0.2) = 0.01: lam * relu(0.01 - eps) is 0.006 at eps 0.004 and 0 at 0.02."""
    rewards = torch.tensor([0.0, -0.2, -0.4, -0.1], requires_grad=True)
    plain = gepo.gepo_loss(rewards, 2, lam=0.0)
    above = gepo.gepo_loss(rewards, 2, lam=1.0, eps=0.004)
    torch.testing.assert_close(above - plain, torch.tensor(0.006), atol=1e-6, rtol=0)
    below = gepo.gepo_loss(rewards, 2, lam=1.0, eps=0.02)
    assert below == plain
    torch.testing.assert_close(
        torch.autograd.grad(below, rewards), torch.autograd.grad(plain, rewards)
    )


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
        kinds = ("swap",) * (members - 2)
        groups.append(gepo.IRGroup(f"g{number}", sequences, kinds=kinds))

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
    """RL's gradient stays: the step's loss is their sum. Each part's norm is told."""
    groups = made_groups(model)
    gepo.add_gradient(model, groups, settings(), torch.device("cpu"))
    alone = gradients(model)
    model.zero_grad(set_to_none=True)
    model.norm.sum().backward()  # a gradient of 1 for each of 32 weights: norm sqrt(32)
    metrics = gepo.add_gradient(model, groups, settings(), torch.device("cpu"))
    torch.testing.assert_close(model.norm.grad, alone["norm"] + 1.0)
    assert metrics["gepo/rl_grad_norm"] == pytest.approx(32**0.5)
    squares = sum(float(gradient.square().sum()) for gradient in alone.values())
    assert metrics["gepo/grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("weight", [0.01, 0.1, 1.0])
def test_adamw_makes_gepo_alone_a_whole_step_whatever_its_weight(model, weight):
    """So GEPO waits for a signal of RL's. At lr 1e-3 every weight moves by about 1e-3."""
    groups = made_groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, eps=1e-12)
    before = model.norm.detach().clone()
    gepo.add_gradient(model, groups, settings(gepo=weight), torch.device("cpu"))
    optimizer.step()
    torch.testing.assert_close(
        (model.norm - before).abs(), torch.full((32,), 1e-3), rtol=1e-2, atol=0
    )


def test_gepo_waits_for_a_signal_unless_told_not_to():
    """An advantage is a number, or one for each token."""
    silent = [Sequence([1], [2, 3], advantage=0.0), Sequence([1], [2, 3], advantage=[0.0, 0.0])]
    told = [*silent, Sequence([1], [2, 3], advantage=[0.0, -0.1])]
    assert gepo.in_turn(["group"], silent, settings()) == []
    assert gepo.in_turn(["group"], told, settings()) == ["group"]
    assert gepo.in_turn(["group"], silent, settings(gepo_alone=True)) == ["group"]


def test_members_are_packed_or_serial_by_a_switch(model):
    """Whatever the budget, serial holds one member at a time: its memory does not grow with n + m."""
    groups = made_groups(model)
    together = []
    model.register_forward_pre_hook(lambda _, given: together.append(given[0].count))
    for members, budget, packed in [("serial", 4096, 0), ("packed", 40, 1), ("auto", 40, 0)]:
        together.clear()
        how = settings(gepo_members=members, token_budget=budget)
        metrics = gepo.add_gradient(model, groups, how, torch.device("cpu"))
        assert metrics["gepo/packed"] == packed
        assert (max(together) == 1) == (members == "serial")


@pytest.mark.parametrize("size", [(2, 3), (10, 20)])
def test_groups_of_the_papers_largest_sizes_train(model, size):
    groups = made_groups(model, count=1, members=sum(size))
    how = settings(gepo_winners=size[0], gepo_losers=size[1], gepo_lam=2.0)
    metrics = gepo.add_gradient(model, groups, how, torch.device("cpu"))
    assert metrics["gepo/grad_norm"] > 0


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


def test_accuracy_by_kind_of_edit():
    """Winners 3 and 1: a swap 2 loses to one of two, a drop 0 to both, another drop 4 to none."""
    scores = torch.tensor([[3.0, 1, 2, 0], [3.0, 1, 4, 0]])
    found = gepo.by_kind("accuracy", scores, 2, [("swap", "drop"), ("drop", "drop")])
    assert found == {"accuracy/swap": 0.5, "accuracy/drop": pytest.approx(2 / 3)}


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
    """49 groups, two a file: 40 with 2 winners and 3 losers, 5 with one winner, 4 with one loser."""
    path = tmp_path / "groups.jsonl"
    sizes = [(2, 3)] * 40 + [(1, 3)] * 5 + [(2, 1)] * 4
    lines = []
    for number, (winners, losers) in enumerate(sizes):
        group = {
            "id": f"f{number}",
            "family": f"file{number // 2}.c",
            "language": "c",
            "source": f"int f{number}(void) {{ return {number}; }}",
            "entry": f"f{number}",
            "winners": [{"level": "O1", "ir": f"w{number}{j}"} for j in range(winners)],
            "losers": [{"kind": "swap", "ir": f"l{number}{j}"} for j in range(losers)],
            "cheap": [{"kind": "cheap_dangling", "ir": "c"}],
        }
        lines.append(json.dumps(group) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_groups_that_do_not_fit_are_counted(groups_file):
    said = []
    train, held_out = gepo.load_groups(settings(gepo_data=groups_file), Letters(), said.append)
    assert len(train) + len(held_out) == 40
    assert held_out
    assert not {group.family for group in train} & {group.family for group in held_out}
    assert all(len(group.members) == 5 for group in train)
    counted = "40 of 49 groups; 5 have fewer than 2 winners, 4 fewer than 3 losers, 0 are longer"
    assert counted in said[0]
    assert said[1] == "GEPO's losers: swap 100%"


def loaded(path, **changed):
    """{group id: its members' tokens}, on either side."""
    groups = gepo.load_groups(settings(gepo_data=path, **changed), Letters(), lambda _: None)
    return {group.id: [list(x.tokens) for x in group.members] for side in groups for group in side}


def test_dpo_trains_on_pairs_of_gepos_groups(groups_file):
    """n = m = 1 would admit 49 groups, where 2 + 3 admits 40: another data set."""
    gepos = loaded(groups_file, gepo_winners=2, gepo_losers=3)
    dpos = loaded(groups_file, gepo_winners=1, gepo_losers=1, gepo_admit_losers=3)
    alone = dict(gepo_admit_winners=1, gepo_admit_losers=1)
    assert len(loaded(groups_file, gepo_winners=1, gepo_losers=1, **alone)) == 49
    assert dpos.keys() == gepos.keys() and len(dpos) == 40
    for name, (winner, loser) in dpos.items():
        assert [winner, loser] == [gepos[name][0], gepos[name][2]]


def test_length_is_taken_over_what_the_larger_arm_needs(tmp_path, groups_file):
    """A group whose third loser is too long is in no arm, also where that loser is not drawn."""
    rows = [json.loads(line) for line in open(groups_file)]
    rows[0]["losers"][2]["ir"] = "x" * 500
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = [dict(gepo_losers=3), dict(gepo_winners=1, gepo_losers=1, gepo_admit_losers=3)]
    for arm in arms:
        assert "f0" not in loaded(path, **arm)


def test_levels_go_before_other_winners(groups_file, tmp_path):
    """n = 2 takes two optimisation levels, as SLTrans has; more take passes and edits too."""
    rows = [json.loads(line) for line in open(groups_file)]
    for row in rows:
        row["winners"] = [
            {"level": name, "ir": name} for name in ("mem2reg", "Oz", "commute", "O3")
        ]
        for winner in row["winners"]:
            winner["ir"] += row["id"]  # no two groups share one
    path = tmp_path / "levels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, members in loaded(path).items():
        texts = {tuple(tokens[:-1]) for tokens in members[:2]}
        levels = [f"```llvm\n{level}{name}```" for level in ("Oz", "O3")]
        assert texts == {tuple(Letters().encode(level)) for level in levels}


@pytest.mark.parametrize(
    "kinds,expected",
    [
        ("run", {"swap"}),
        ("swap,cheap_dangling", {"swap", "cheap_dangling"}),
        ("run,cheap", {"swap", "cheap_dangling"}),
        ("cheap", {"cheap_dangling"}),
    ],
)
def test_kinds_choose_the_losers(groups_file, kinds, expected):
    chosen = settings(gepo_data=groups_file, gepo_kinds=kinds, gepo_losers=1, gepo_admit_losers=1)
    found = Counter()
    for side in gepo.load_groups(chosen, Letters(), lambda _: None):
        for group in side:
            found.update(group.kinds)
    assert found.keys() == expected


# ---- nothing held out elsewhere ----


def row_of(family, source, entry="f_gold", number=0):
    return {
        "id": f"{family}:{number}",
        "family": family,
        "language": "c",
        "source": source,
        "entry": entry,
        "winners": [{"level": "O1", "ir": f"{family}{j}"} for j in range(2)],
        "losers": [{"kind": "swap", "ir": f"{family}l{j}"} for j in range(3)],
        "cheap": [],
    }


def test_what_translation_holds_out_is_in_no_group(groups_file, tmp_path):
    """By its name in the built-in sets, and by 13 words in a row in anybody's.

    translate/gfg/NAME is held out for one name in ten: here for the first such N.
    """
    number = next(
        n for n in range(99) if is_held_out(Translation(f"translate/gfg/N{n}/cpp", *"cx", "", ()))
    )
    user = next(n for n in range(99) if is_held_out(Translation(f"user/{n}/cpp", *"cx", "", ())))
    words = " ".join(f"v{n} = v{n + 1};" for n in range(10))
    problem = {
        "id": user,
        "source": f"int sum_green() {{ {words} }}",
        "source_language": "cpp",
        "entry": "sum_green",
    }
    problem["tests"] = [{"args": [n], "expected": n + 1} for n in range(3)]
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")

    rows = [row_of(f"gfg/N{number}", "int f_gold(int x) { return x; }")]
    rows += [row_of("mine/copy", f"int copied(void) {{ {words} return 0; }}", "copied")]
    rows += [row_of("mine/named", "int sumGreen(int x) { return x; }", "sumGreen")]
    path = tmp_path / "groups.jsonl"
    path.write_text(Path(groups_file).read_text() + "".join(json.dumps(x) + "\n" for x in rows))

    said = []
    how = settings(gepo_data=str(path), translate_data=str(tmp_path / "problems.jsonl"))
    sides = gepo.load_groups(how, Letters(), said.append)
    assert len(sides[0] + sides[1]) == 40
    assert "GEPO: 3 groups left out, held out by translation" in said


needs_data = pytest.mark.skipif(
    find_data("transcoder_gfg/gfg.jsonl") is None, reason="no data folder: set RARECODE_DATA"
)


@needs_data
def test_real_functions_that_other_parts_hold_out_are_left_out():
    """Of GeeksforGeeks' 539 C functions: translation holds out 55 by name and 31 that share 13
    words in a row; 12 overlap MultiPL-E. All were in GEPO's groups."""
    units = read_units([find_data("transcoder_gfg/gfg.jsonl")])
    exclusions = ir_exclusions.Exclusions()
    reasons = Counter(exclusions.reason(x.family, x.entry, x.source) for x in units)
    assert len(units) == 539
    assert reasons[ir_exclusions.HELD_OUT] == 86
    assert reasons[ir_exclusions.BENCHMARK] == 12

    held_out = [problem for problem in built_in() if is_held_out(problem)]
    names = {translate.family(problem) for problem in held_out}
    left = [x for x in units if not exclusions.reason(x.family, x.entry, x.source)]
    assert not names & {f"translate/{unit.family}" for unit in left}


def test_a_prompt_names_its_function(groups_file):
    """One Exercism file has several: 101 of 156 functions shared a prompt with another."""
    row = gepo.Candidates.of(row_of("a", "int one(); int two();", "two"), {"swap"})
    (message,) = gepo.ir_messages(row)
    assert "function `two` of this C code" in message["content"]


@pytest.mark.parametrize(
    "changed,sentence",
    [({"gepo_max_tokens": 20}, "leaves 0 groups"), ({"gepo_data": "no.jsonl"}, "gepo.py build")],
)
def test_no_group_left_is_one_sentence(groups_file, changed, sentence):
    with pytest.raises(SystemExit, match=sentence):
        gepo.load_groups(
            settings(**{"gepo_data": groups_file} | changed), Letters(), lambda _: None
        )
