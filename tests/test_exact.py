"""The exact mode (exact.py): sampler and trainer agree to the last bit, through the Triton kernels (interpreted without a GPU)."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
import kernels.attention
import kernels.head
import kernels.layers
from batches import Sequence, score
from kernels.linear import _linear
from model import Config, random_model
from runtime import exact
from sampler import Request, Sampler

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
)  # the interpreter multiplies bf16 as raw bits (triton issue 11584)
CONFIG = Config(
    vocab_size=150,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


@pytest.fixture
def model(monkeypatch):
    torch.set_num_threads(1)
    if not ON_GPU:
        for module in (kernels.layers, kernels.attention):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
        monkeypatch.setattr(kernels.head, "fits", lambda hidden: True)
        monkeypatch.setattr(
            kernels.attention, "SPLIT", 32
        )  # so that short sequences have several splits and pages: the interpreter is slow
        monkeypatch.setattr(exact, "page_size", lambda config: 32)
    return random_model(CONFIG, seed=1, std=0.2).to(DEVICE, DTYPE)


def sample(model, asked, **options):
    sampler = Sampler(model, exact=True, page_size=exact.page_size(CONFIG), **options)
    sampler.cpu = False  # CUDA's way, on whatever device this is
    return sampler.generate(asked)


def trainer_logprobs(model, asked, groups, temperature):
    """(trainer's, sampler's) of every sample, all packed into one forward in which a prompt stands once for all its samples."""
    pairs = [(r, c) for r, group in zip(asked, groups) for c in group]
    rows = score(
        model,
        [Sequence(r.prompt, c.tokens) for r, c in pairs],
        10_000,
        DEVICE,
        temperature,
        share_prompts=True,
    )
    return [p for row in rows for p in row], [p for _, c in pairs for p in c.logprobs]


def test_logprobs_equal_the_trainers_to_the_last_bit(model):
    """Ragged prompts (one beyond two pages and splits), some shared by two samples, four rows at a time, against one packed forward."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, 150, (n,), generator=generator).tolist()
        for n in (1, 5, 300 if ON_GPU else 70)
    ]
    asked = [
        Request(p, n=1 if len(p) > 9 else 2, max_new_tokens=2, temperature=0.8, seed=5, id=i)
        for i, p in enumerate(prompts)
    ]
    groups = sample(model, asked, slots=4)
    plain, sampler = trainer_logprobs(model, asked, groups, 0.8)
    exact.make_exact(model)
    trainer, sampler = trainer_logprobs(model, asked, groups, 0.8)
    assert trainer == sampler != plain
    alone = sample(model, [dataclasses.replace(asked[1], n=1)], slots=1)
    assert (alone[0][0].tokens, alone[0][0].logprobs) == (
        groups[1][0].tokens,
        groups[1][0].logprobs,
    )
    with pytest.raises(ValueError, match="one temperature"):
        sample(model, [asked[0], dataclasses.replace(asked[1], temperature=0.0)])


def test_gradient_is_the_ordinary_one(model):
    def gradient():
        tokens, positions = (
            torch.arange(24, device=DEVICE),
            torch.cat((torch.arange(17), torch.arange(7))).to(DEVICE),
        )
        ends = torch.tensor([0, 17, 24], dtype=torch.int32, device=DEVICE)
        hidden = model.hidden(tokens, positions, ends)
        upstream = torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)
        return hidden, torch.autograd.grad(
            (hidden.float() * upstream).sum(), list(model.parameters())
        )

    plain_hidden, plain = gradient()
    exact.make_exact(model)
    hidden, ours = gradient()
    tolerance = dict(atol=3e-2, rtol=3e-2) if ON_GPU else dict(atol=1e-4, rtol=1e-4)
    assert not torch.equal(
        hidden, plain_hidden
    )  # or this test would compare the ordinary way with itself
    torch.testing.assert_close(hidden, plain_hidden, **tolerance)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **tolerance)


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_of_the_product_do_not_depend_on_their_number(arch):
    if ON_GPU and arch > torch.cuda.get_device_capability()[0] * 10:
        pytest.skip("TMA needs Hopper")
    x, weight = torch.randn(150, 128).to(DEVICE, DTYPE), torch.randn(200, 128).to(DEVICE, DTYPE)
    whole = _linear(x, weight, arch)
    torch.testing.assert_close(whole, x @ weight.T, atol=0.3 if ON_GPU else 1e-4, rtol=1e-2)
    for rows in (slice(0, 1), slice(7, 9), slice(20, 149)):
        assert torch.equal(_linear(x[rows], weight, arch), whole[rows])
