"""What must always hold of rollouts (DESIGN.md, invariants 1, 3, 6, 9), on random models and to the last bit where it says so."""

import dataclasses

import pytest
import torch

import decode
from kernels import native
from kernels.logprob import token_logprobs
from kernels.sampling import sample_tokens
from model import Config, random_model
from sampler import Request, Sampler, StalePageError

CONFIG = Config(
    vocab_size=331,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=1, std=0.15).requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs time


def requests(
    n=4,
    new=40,
    stop_ids=(3, 5, 8, 13, 21, 34, 55, 89),
    lengths=(1, 2, 15, 16, 17, 40, 65, 90),
    **more,
):
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(0, CONFIG.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]
    return [
        Request(p, n=n, max_new_tokens=new, stop_ids=stop_ids, seed=11, id=100 + i, **more)
        for i, p in enumerate(prompts)
    ]


def values(groups):
    return [[(c.sample, c.tokens, c.logprobs, c.finish_reason) for c in group] for group in groups]


def trainer_logprobs(model, request, completion):
    tokens = torch.tensor(request.prompt + completion.tokens)
    hidden = model.hidden(
        tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
    )
    start = len(request.prompt) - 1
    targets = torch.tensor(completion.tokens)
    rows, temperature = hidden[start:-1], request.temperature or 1.0
    return token_logprobs(rows, model.head_weight, targets, temperature)[0]


def same_logprobs(model, asked, groups):
    """As the trainer's, up to fp32's rounding: on these requests the trainer's own are up to 1.4e-5 and in the mean 2e-6 from float64."""
    pairs = [(r, c) for r, group in zip(asked, groups) for c in group]
    gap = torch.cat(
        [trainer_logprobs(model, r, c) - torch.tensor(c.logprobs) for r, c in pairs]
    ).abs()
    return gap.max() < 2e-5 and gap.mean() < 4e-6


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_the_trainers(model, temperature):
    asked = requests(temperature=temperature)
    groups = Sampler(model).generate(asked)
    assert {c.finish_reason for g in groups for c in g} == {"stop", "length"} or temperature == 0
    assert same_logprobs(model, asked, groups)


def test_logprobs_of_long_sequences_are_the_trainers(model):
    asked = requests(n=2, new=410, stop_ids=(), lengths=(380, 400, 800))
    groups = Sampler(model).generate(asked)
    assert same_logprobs(model, asked, groups)
    assert values(Sampler(model, slots=2, page_size=64).generate(asked)) == values(groups)


def test_without_packed_weights_and_compiler_the_step_is_the_same_model(model, monkeypatch):
    """Where oneDNN is missing (macOS) the products are F.linear's, and without a C compiler attention is torch's: other rounding, the same log-probs."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(native, "library", lambda: None)
    sampler, asked = Sampler(model), requests()
    assert same_logprobs(model, asked, sampler.generate(asked)) and not sampler.decoder.packed


PAGE_BYTES = 2 * 2 * 2 * 32 * 16 * 4  # keys and values, layers, KV heads, head dim, tokens, fp32

VARIANTS = {
    "one slot": dict(slots=1),
    "few slots": dict(slots=7),
    "large pages": dict(page_size=64),
    "little memory": dict(slots=48, memory=40 * PAGE_BYTES),
    "no sharing": dict(share_prefix=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_do_not_depend_on_the_batch(model, variant):
    """Tokens and log-probs are equal to the last bit whatever the batch, slots, pages and sharing."""
    asked = requests()
    assert values(Sampler(model, **VARIANTS[variant]).generate(asked)) == values(
        Sampler(model).generate(asked)
    )


def test_samples_do_not_depend_on_the_batch_without_a_compiler(model, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    asked = requests(n=2, new=20)
    assert values(Sampler(model, slots=3).generate(asked)) == values(Sampler(model).generate(asked))


def test_looking_at_the_rows_every_few_steps_changes_nothing(model):
    """On CUDA the host looks every 8 steps: rows that ended in between stay dead, write nothing and keep what they drew. And buffers are reused."""
    asked = requests()
    expected = values(Sampler(model).generate(asked))
    sampler = Sampler(model, slots=20)
    sampler.look_every = 7
    assert values(sampler.generate(asked)) == expected
    kept = sampler.state["tables"].data_ptr()
    assert values(sampler.generate(asked[:3])) == expected[:3]
    assert sampler.state["tables"].data_ptr() == kept
    sampler.release()
    assert values(sampler.generate(asked[3:])) == expected[3:]


def test_the_way_through_the_kernels_draws_the_same_tokens(model):
    """What CUDA runs (kernels/, packed prefill, fixed sizes of batches), here on the kernels' torch references: same tokens, other last bits."""
    asked = requests()
    expected = Sampler(model).generate(asked)
    sampler = Sampler(model, slots=20, page_size=32)
    sampler.cpu, sampler.look_every = False, 3
    groups = sampler.generate(asked)
    assert [[c.tokens for c in g] for g in groups] == [[c.tokens for c in g] for g in expected]
    assert values(groups) != values(expected)
    assert same_logprobs(model, asked, groups)


def test_qwen3_takes_both_ways():
    """Its norms of q and k stand before attention, so that neither way knows of them: same draws alone and together, trainer's log-probs."""
    model = random_model(
        dataclasses.replace(CONFIG, model_type="qwen3"), seed=1, std=0.15
    ).requires_grad_(False)
    for layer in model.layers:  # random norms, or an error in them would not show
        layer.q_norm.data.uniform_(0.5, 2.0), layer.k_norm.data.uniform_(0.5, 2.0)
    asked = requests()
    expected, kernels = Sampler(model).generate(asked), Sampler(model, slots=20, page_size=32)
    assert same_logprobs(model, asked, expected)
    alone = [Sampler(model, slots=3).generate([r])[0] for r in asked]
    assert [[(c.tokens, c.logprobs) for c in g] for g in alone] == [
        [(c.tokens, c.logprobs) for c in g] for g in expected
    ]
    kernels.cpu, kernels.look_every = False, 3
    groups = kernels.generate(asked)
    assert [[c.tokens for c in g] for g in groups] == [
        [c.tokens for c in g] for g in expected
    ] and same_logprobs(model, asked, groups)


def test_samples_do_not_depend_on_order_ranks_or_threads(model):
    asked = requests()
    expected = values(Sampler(model).generate(asked))
    assert values(Sampler(model).generate(asked[::-1]))[::-1] == expected
    ranks = [values(Sampler(model).generate(asked[rank::3])) for rank in range(3)]
    assert [ranks[i % 3][i // 3] for i in range(len(asked))] == expected
    torch.set_num_threads(2)
    assert values(Sampler(model).generate(asked[-2:])) == expected[-2:]
    assert (
        len({tuple(tokens) for group in expected for _, tokens, _, _ in group}) > 25
    )  # samples do differ among themselves
    other_seed = [dataclasses.replace(r, seed=12) for r in asked]
    assert values(Sampler(model).generate(other_seed)) != expected


def test_first_token_frequencies_are_the_models_distribution(model):
    (request,) = requests(n=4000, new=1, lengths=(9,))
    (group,) = Sampler(model).generate([request])
    tokens = torch.tensor(request.prompt)
    hidden = model.hidden(tokens, torch.arange(9), torch.tensor([0, 9], dtype=torch.int32))
    p = (hidden[-1] @ model.head_weight.T).softmax(-1)
    seen = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=len(p))
    common = p > 5 / 4000
    chi2 = ((seen - 4000 * p) ** 2 / (4000 * p))[common].sum().item()
    dof = int(common.sum())
    assert dof > 10 and abs(chi2 - dof) < 5 * (2 * dof) ** 0.5


def test_cpu_draw_is_the_kernels_draw():
    """decode.draw on CPU takes fewer passes than kernels.sampling; the tokens must be the same ones."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(64, 32, generator=generator),
        torch.randn(331, 32, generator=generator),
    )
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3]).repeat(16)
    key = (torch.full((64,), 5), torch.arange(64), torch.arange(64) % 4, torch.arange(64) + 1000)
    tokens, logprobs, _ = sample_tokens(hidden, weight, temperature, *key)
    ours = decode.draw(hidden @ weight.T, temperature, *key)
    assert torch.equal(tokens, ours[0]) and (logprobs - ours[1]).abs().max() < 1e-6


def test_greedy_is_the_argmax_of_a_plain_forward(model):
    (request,) = requests(n=1, new=20, stop_ids=(), lengths=(12,), temperature=0.0)
    tokens = list(request.prompt)
    for _ in range(20):
        hidden = model(
            torch.tensor(tokens),
            torch.arange(len(tokens)),
            torch.tensor([0, len(tokens)], dtype=torch.int32),
        )
        tokens.append(int((hidden[-1] @ model.head_weight.T).argmax()))
    assert Sampler(model).generate([request])[0][0].tokens == tokens[12:]


def test_stop_token_is_kept_and_any_of_several_stops(model):
    free = Sampler(model).generate(requests(n=2, new=30, stop_ids=()))
    stop_ids = (free[5][0].tokens[11], free[6][1].tokens[4])
    for full, cut in zip(free, Sampler(model).generate(requests(n=2, new=30, stop_ids=stop_ids))):
        for a, b in zip(full, cut):
            ends = [i for i, t in enumerate(a.tokens) if t in stop_ids]
            length = ends[0] + 1 if ends else 30
            assert (b.tokens, b.logprobs) == (a.tokens[:length], a.logprobs[:length])
            assert b.finish_reason == ("stop" if ends else "length")


def test_top_k_and_top_p(model):
    def check(request, allowed):
        (group,) = Sampler(model).generate([request])
        for c in group:
            tokens = torch.tensor(request.prompt + c.tokens)
            hidden = model(
                tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
            )
            p = (
                hidden[len(request.prompt) - 1 : -1] @ model.head_weight.T / request.temperature
            ).softmax(-1)
            kept = allowed(p)
            chosen = torch.tensor(c.tokens)[:, None]
            assert kept.gather(1, chosen).all()
            expected = (p.gather(1, chosen) / (p * kept).sum(-1, keepdim=True)).log().squeeze(1)
            assert (expected - torch.tensor(c.logprobs)).abs().max() < 1e-4

    (request,) = requests(n=6, new=25, stop_ids=(), lengths=(20,), temperature=0.8)
    check(dataclasses.replace(request, top_k=5), lambda p: p >= p.topk(5).values[:, -1:])
    ordered = lambda p: p.sort(descending=True)
    smallest = lambda p: ordered(p).values.gather(
        1, ((ordered(p).values.cumsum(-1) < 0.5).sum(-1, keepdim=True))
    )
    check(dataclasses.replace(request, top_p=0.5), lambda p: p >= smallest(p))
    one = Sampler(model).generate(
        [dataclasses.replace(request, top_k=1), dataclasses.replace(request, temperature=0.0)]
    )
    assert [c.tokens for c in one[0]] == [c.tokens for c in one[1]]


def test_groups_are_handed_over_as_they_finish(model):
    """So that rewards overlap sampling: half of the groups are with the judge before half of the steps are done."""
    asked, seen = requests(n=3), []
    sampler = Sampler(model, slots=5)
    groups = sampler.generate(
        asked, on_done=lambda i, completions: seen.append((i, completions, sampler.stats["steps"]))
    )
    assert sorted(i for i, *_ in seen) == list(range(len(asked)))
    assert all(values([completions]) == values([groups[i]]) for i, completions, _ in seen)
    assert (
        seen[len(seen) // 2 - 1][2] < 0.6 * sampler.stats["steps"]
        and seen[-1][2] == sampler.stats["steps"]
    )
    assert sampler.stats["tokens"] == sum(len(c.tokens) for g in groups for c in g)
    assert (
        sorted(sampler.pool.free_runs) == list(range(sampler.pool.runs))
        and len(sampler.pool.free) == sampler.pool.prompts
    )
    static = sum(
        max(len(c.tokens) for c in g) for g in groups
    )  # steps of a batch that waits for its longest
    assert sampler.stats["steps"] < 0.8 * static


def test_the_longest_expected_starts_first(model):
    asked, order = requests(n=1, new=4, stop_ids=(), lengths=(9, 9, 9)), []
    asked = [
        dataclasses.replace(r, expected_tokens=expected) for r, expected in zip(asked, (1, 3, 2))
    ]
    Sampler(model, slots=1).generate(asked, on_done=lambda i, _: order.append(i))
    assert order == [1, 2, 0]


def test_memory_is_what_the_requests_need_or_what_is_allowed(model, monkeypatch):
    """24 rows of 3 pages, and the 6 pages of the longest prompt for each of 7 (one has a single token, which is no row's past).

    Never a share of what happens to be free; held until release()."""
    asked = requests(n=3)
    sampler = Sampler(model)
    expected = values(sampler.generate(asked))
    assert sampler.held_bytes() == (24 * 3 + 7 * 6) * PAGE_BYTES
    allowed = Sampler(model, memory=30 * PAGE_BYTES)
    assert values(allowed.generate(asked)) == expected and allowed.rows == 3
    assert allowed.held_bytes() <= allowed.memory
    scarce = Sampler(model)
    monkeypatch.setattr("sampler.free_bytes", lambda device: 60 * PAGE_BYTES - scarce.held_bytes())
    for _ in range(2):
        assert (
            values(scarce.generate(asked)) == expected
            and scarce.rows == 3
            and scarce.held_bytes() <= 30 * PAGE_BYTES
        )
    scarce.release()
    assert scarce.held_bytes() == 0


def test_new_weights_are_used_and_old_pages_refused(model):
    asked = requests(n=2)
    changing = random_model(CONFIG, seed=1, std=0.15).requires_grad_(False)
    sampler = Sampler(changing, slots=5)
    before = values(sampler.generate(asked))
    fresh = {name: p + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    with pytest.raises(StalePageError, match="weight version 0.*now version 1"):
        sampler.generate(asked, on_done=lambda *_: sampler.load(fresh))
    groups = sampler.generate(asked)
    assert values(groups) != before
    assert same_logprobs(changing, asked, groups)
    assert values(Sampler(changing).generate(asked)) == values(groups)
    page = sampler.pool.take(1, version=0)  # a page of the old weights
    with pytest.raises(StalePageError):
        sampler.pool.check(page, sampler.version)


def test_what_cannot_run_is_refused_with_a_sentence(model):
    def refused(match, sampler=None, **changes):
        with pytest.raises(ValueError, match=match):
            (sampler or Sampler(model)).generate(
                [dataclasses.replace(requests(lengths=(40,))[0], **changes)]
            )

    refused(
        "need 6 pages of 16 tokens and there is room for 4", Sampler(model, memory=4 * PAGE_BYTES)
    )
    refused("longer than the model's 2048 positions", max_new_tokens=2020)
    refused("empty prompt", prompt=[])
    refused("outside the model's vocabulary of 331", prompt=[1, 331])
    refused("at least 1", n=0)
    with pytest.raises(ValueError, match="multiple of 16"):
        Sampler(model, page_size=24)
    assert Sampler(model).generate([]) == []
