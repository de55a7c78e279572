"""The memory plan counts what is there, and refuses what does not fit before anything is loaded."""

from dataclasses import replace

import pytest
import torch

import eval as evaluation
import model as model_file
import sft
import train
from kernels import native
from runs import SMALL, needs_prolog
from runtime import lora, machine, memory
from sampler import Request, Sampler
from sandbox.languages import load_language
from settings import Settings
from tasks.problems import load_problems, program_messages
from test_update import CONFIG, WIDE


def test_parameters_are_those_of_the_model_and_its_adapters():
    model = model_file.random_model(CONFIG)
    everything, layer, ends = memory.parameters(CONFIG)
    assert everything == sum(p.numel() for p in model.parameters())
    assert everything == 2 * layer + ends

    lora.attach(model, 8, 8.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapter_parameters(CONFIG, 8) == trained


# Billions of parameters that Qwen2.5-Coder's model cards say.
@pytest.mark.parametrize(
    "size, published", [("0.5B", 0.49), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62)]
)
def test_parameters_are_the_published_ones(size, published):
    everything, _, _ = memory.parameters(memory.qwen(size))
    assert round(everything / 1e9, 2) == published


@pytest.mark.parametrize("in_c", [True, False])
def test_activation_estimate_bounds_what_a_step_keeps(in_c, monkeypatch):
    """Bytes saved for the backward pass, counted by autograd's own hooks on CPU."""
    if not in_c:
        monkeypatch.setattr(native, "library", lambda target: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
    config = replace(WIDE, num_hidden_layers=4) if in_c else CONFIG
    model = model_file.random_model(config)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def save(x):
        if x.data_ptr() not in parameters and x.is_floating_point():
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    positions = torch.arange(64)  # kernels/linear.py fills up to it, which the plan leaves out
    tokens = positions % config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.hidden(tokens, positions, model_file.make_segments([64]))
    longest = dict(max_prompt_tokens=54, max_new_tokens=10, share_prompts=False)
    settings = Settings(token_budget=64, gradient_checkpointing=False, **longest)
    planned = memory.plan(config, settings, ranks=1, cuda=False)["activations"]
    assert 0.8 * planned < sum(kept.values()) < 1.05 * planned


# gpu: one H200 at 73dc1a7, one rank of FSDP, 16 prompts of 512 tokens x 16 completions of 256, and
# a frozen 0.5B in 16 bits beside it: tokens of a micro-batch, checkpointing, shared prompts, GB.
MEASURED = [
    (16_384, True, True, 15.6),
    (65_536, True, True, 20.6),
    (16_384, False, True, 32.3),
    (65_536, False, True, 86.8),
    (65_536, False, False, 83.3),
]


@pytest.mark.parametrize("tokens, checkpointing, shared, measured", MEASURED)
def test_the_plan_is_within_5_percent_of_the_measured_peaks(
    tokens, checkpointing, shared, measured
):
    settings = Settings(
        token_budget=tokens,
        gradient_checkpointing=checkpointing,
        share_prompts=shared,
        samples=16,
        max_prompt_tokens=512,
        max_new_tokens=512,  # completions of 256 on average
    )
    parts = memory.plan(memory.qwen("0.5B"), settings, ranks=1, cuda=True, sharded=True)

    # What the code of that commit kept more, of 2 bytes a value, token and layer: qkv with its bias
    # (1,152), of which v was a view, in place of v; with shared prompts also rotated k (128) and a
    # joined copy of what comes out (896), less the prompts' own rows of k and v.
    more = 1152 - 128
    if shared:
        more = 1152 + 128 + 896 - 2 * 128 * 512 / (512 + 16 * 256)
    if checkpointing:
        more = 0
    total = sum(parts.values()) + 2 * 24 * more * tokens
    assert total / 1e9 == pytest.approx(measured, rel=0.05)


def fitted(size, ranks=1, gigabytes=80, **changes):
    """Settings of a run of 64 x 16 samples, prompts and completions of up to 1,024 tokens, of which
    256 are sampled at a time."""
    sizes = {"prompts": 64, "samples": 16, "max_new_tokens": 1024, "slots": 256}
    settings = Settings(**sizes | changes)
    config = memory.qwen(size)
    return settings, memory.fitted(config, settings, ranks, gigabytes * 1e9)


def test_micro_batches_are_as_large_as_the_plan_has_room_for():
    """0.5B keeps 1.0 MB a token: 65,536 fit an H200, about 48,000 an 80 GB card beside the rest.

    1.5B keeps 2.1 MB: less than 16,384 fit 80 GB, so activations are computed twice.
    """
    _, half = fitted("0.5B", gigabytes=150)
    assert (half.token_budget, half.gradient_checkpointing) == (65_536, False)
    _, half = fitted("0.5B")
    assert 40_000 < half.token_budget < 56_000
    assert not half.gradient_checkpointing
    _, larger = fitted("1.5B")
    assert larger.gradient_checkpointing
    _, on_h200 = fitted("1.5B", gigabytes=150)
    assert not on_h200.gradient_checkpointing
    assert on_h200.token_budget > 32_000


def test_what_the_user_says_about_micro_batches_stands():
    _, asked = fitted("1.5B", token_budget=8192)
    assert (asked.token_budget, asked.gradient_checkpointing) == (8192, False)  # they fit
    _, asked = fitted("1.5B", token_budget=60_000)
    assert (asked.token_budget, asked.gradient_checkpointing) == (60_000, True)
    _, never = fitted("1.5B", gradient_checkpointing=False)
    assert not never.gradient_checkpointing
    assert memory.FEWEST_TOKENS <= never.token_budget < 16_384


@pytest.mark.parametrize("size, ranks", [("0.5B", 1), ("1.5B", 1), ("3B", 1), ("7B", 8)])
@pytest.mark.parametrize("gigabytes", [80, 150])
def test_a_fitted_plan_and_the_samplers_pages_fit_together(size, ranks, gigabytes):
    """The sampler keeps its pages through the update."""
    settings, found = fitted(size, ranks, gigabytes)
    config = memory.qwen(size)
    total = sum(memory.plan(config, found, ranks, cuda=True).values())
    pages = memory.step_pages(config, settings, ranks, gigabytes * 1e9)
    assert total + pages <= memory.FULL * gigabytes * 1e9
    # A slot's rollout: 2,048 tokens.
    assert pages >= memory.page_bytes(config, 2048, width=2)


def test_on_a_cpu_micro_batches_do_not_follow_what_other_programs_leave():
    """The same bits on every run: 16,384 tokens, and activations computed twice if it is said."""
    found, pages = memory.fit(CONFIG, Settings(), torch.device("cpu"))
    assert (found.token_budget, found.gradient_checkpointing, pages) == (16_384, True, None)
    found, _ = memory.fit(CONFIG, Settings(token_budget=2048), torch.device("cpu"))
    assert found.token_budget == 2048


def test_pages_are_those_of_a_steps_samples():
    """0.5B: 12,288 bytes a token; 64 prompts of 1,024 tokens, each there once, 16 samples of 1,024
    and a page of 128 each. Half of a small card's rest at most."""

    def tokens(**changes):
        settings, _ = fitted("0.5B", **changes)
        return memory.step_pages(memory.qwen("0.5B"), settings, 1, 150e9) / 12_288

    assert tokens(slots=4096) == 64 * 1024 + 1024 * 1152
    assert tokens(slots=100) == 64 * 1024 + 100 * 1152
    assert tokens(slots=20) == 20 * 1024 + 20 * 1152  # at worst every row is of another prompt
    assert tokens(slots=4096, task="selfplay", samples=1) == 6 * 64 * (1024 + 1152)


@pytest.mark.parametrize("prompt, new", [(1024, 1024), (1000, 100), (129, 1)])
def test_pages_are_those_that_the_sampler_reserves(prompt, new):
    """Two prompts with three samples each, all at a time, in pages of 128 tokens."""
    config = memory.qwen("0.5B")
    lengths = {"max_prompt_tokens": prompt, "max_new_tokens": new, "token_budget": 4096}
    settings = Settings(prompts=2, samples=3, **lengths)
    planned = memory.step_pages(config, settings, 1, 150e9)

    small = replace(config, num_hidden_layers=1, vocab_size=300)
    sampler = Sampler(model_file.random_model(small))
    sampler.cpu, sampler.page_size = False, memory.page_tokens(config)  # as on a GPU
    requests = [Request([0] * prompt, n=3, max_new_tokens=new, id=i) for i in range(2)]
    size = sampler._size(sampler._groups(requests), samples=6, room=10_000)
    assert size.runs == 6
    assert planned == size.pages * memory.page_bytes(config, 128, width=2)


def test_what_a_gpu_run_announces_counts_the_pages_of_its_sampler(monkeypatch):
    """The 0.5B's run on an H200 said at most 80.9 GB and took 85.9, 8.9 of them for pages."""
    lengths = {"max_prompt_tokens": 1024, "max_new_tokens": 400}
    asked = Settings(prompts=64, samples=16, gradient_checkpointing=False, **lengths)
    config, card = memory.qwen("0.5B"), torch.device("cuda")
    monkeypatch.setattr(memory, "room_of", lambda device: 150.1e9)
    settings, pages = memory.fit(config, asked, card)
    need = memory.check(config, settings, card, print, pages=pages)
    assert 85.9e9 < need.most < 1.1 * 85.9e9
    without = memory.check(config, settings, card, print)
    assert need.most - without.most == pytest.approx(pages, rel=0.01)


def gigabytes(size, ranks, **changes):
    """The plan of a run on GPUs."""
    settings = Settings(**{"token_budget": 16384, "max_new_tokens": 1024} | changes)
    parts = memory.plan(memory.qwen(size), settings, ranks, cuda=True)
    return sum(parts.values()) / 1e9


def test_what_fits_an_80_gb_card():
    assert gigabytes("3B", ranks=1) < 80
    assert gigabytes("7B", ranks=1) > 80
    assert gigabytes("7B", ranks=8) < 80
    assert gigabytes("7B", ranks=1, lora_rank=32) < 80


def test_a_plan_that_does_not_fit_is_refused_with_what_to_change(capsys):
    with pytest.raises(SystemExit, match="too little memory.*--lora_rank 32 saves"):
        memory.check(memory.qwen("32B"), Settings(), torch.device("cpu"), print)
    assert "memory per rank" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="too little memory.*smaller model"):
        memory.check_sampling(memory.qwen("32B"), 1000, 1, torch.device("cpu"), print)


def test_advice_names_what_saves_and_how_much():
    """7B on one GPU: half of masters, gradients and moments is 61 GB."""
    text = memory.advice(memory.qwen("7B"), Settings(), ranks=1, cuda=True)
    first, *others = text.split("; ")
    assert first.startswith("--lora_rank 32 saves ")
    assert others[0].startswith("use more than 1 ranks")
    assert "gradient_checkpointing" not in text  # it is on


def test_a_micro_batch_is_no_longer_than_a_step_and_no_shorter_than_a_sequence():
    shape = dict(prompts=4, samples=8, max_prompt_tokens=100, max_new_tokens=50)

    def tokens(ranks=1, **changes):
        return memory.micro_batch_tokens(Settings(**shape | changes), ranks)

    assert tokens() == 4 * (100 + 8 * 50)
    assert tokens(share_prompts=False) == 4 * 8 * 150
    assert tokens(ranks=3) == 2 * (100 + 8 * 50)  # 4 prompts on 3 ranks: two at most
    assert tokens(token_budget=1000) == 1000
    assert tokens(token_budget=60) == 150  # goes alone


def test_on_a_cpu_only_the_larger_of_sampling_and_updating_is_held():
    parts = dict(masters=4, gradients=4, optimizer=8, activations=3, loss=1)
    assert memory.peak(parts) == 20
    assert memory.peak(parts | dict(packed=4, prefill=1, pages=1)) == 20
    assert memory.peak(parts | dict(packed=4, prefill=6, pages=1)) == 4 + 8 + 11


def test_a_cpu_s_plan_has_the_pages_that_the_sampler_will_take():
    """Half of what sampling leaves free, no more than the rows need, one sample's at least."""
    parts = dict(masters=4, gradients=4, optimizer=8, packed=4, prefill=1, pages=1)
    assert memory.pages_of_rows(parts, rows=3, room=29) == 3
    assert memory.pages_of_rows(parts, rows=10, room=29) == (29 - 17) / 2
    assert memory.pages_of_rows(parts, rows=10, room=18) == 1
    assert memory.pages_of_rows(parts, rows=10, room=None) == 10


def test_an_evaluation_says_what_all_its_samples_take():
    """Two layers of the 0.5B, 10,000 tokens a sample: 2 x 256 values x 4 bytes = 20.5 MB."""
    config = replace(memory.qwen("0.5B"), num_hidden_layers=2, vocab_size=1000)
    one = memory.check_sampling(config, 10_000, 1, torch.device("cpu"), print)
    many = memory.check_sampling(config, 10_000, 50, torch.device("cpu"), print)
    assert many.most - one.most == pytest.approx(49 * 20.48e6, rel=0.03)


def test_an_evaluation_on_a_gpu_does_so_too(monkeypatch):
    """Half the numbers in 16 bits: 1,024 samples take 10.5 GB, of 8 GB no more than half is taken."""
    config = replace(memory.qwen("0.5B"), num_hidden_layers=2, vocab_size=1000)
    card = torch.device("cuda")
    monkeypatch.setattr(memory, "room_of", lambda device: 80e9)
    one = memory.check_sampling(config, 10_000, 1, card, print)
    many = memory.check_sampling(config, 10_000, 1024, card, print)
    assert many.most - one.most == pytest.approx(1023 * 10.24e6, rel=0.01)
    monkeypatch.setattr(memory, "room_of", lambda device: 8e9)
    assert 4e9 < memory.check_sampling(config, 10_000, 1024, card, print).most < 4.1e9


def files(root, **contents):
    """Files of a kernel: path with __ for / -> content."""
    for name, content in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MEMINFO = "MemTotal:       16000 kB\nMemAvailable:    8000 kB\nHugePages_Total:   0\n"
# A limit of 5,000,000 bytes, 2,000,000 in use, of which 500,000 are read files.
LIMIT = "5000000\n"
LEFT = 5_000_000 - 2_000_000 + 500_000


def test_memory_at_hand_is_the_least_of_what_is_available_and_every_limit(tmp_path):
    assert machine.at_hand(tmp_path) is None  # macOS
    files(tmp_path, proc__meminfo=MEMINFO)
    assert machine.at_hand(tmp_path) == 8000 * 1024

    # Version 2: the limit is that of the group above.
    files(tmp_path, proc__self__cgroup="0::/a.slice/job\n")
    group = "sys__fs__cgroup__a.slice"
    files(tmp_path, **{f"{group}__memory.max": LIMIT, f"{group}__memory.current": "2000000"})
    files(tmp_path, **{f"{group}__memory.stat": "anon 9\ninactive_file 500000\n"})
    files(tmp_path, **{f"{group}__job__memory.max": "max", f"{group}__job__memory.current": "1"})
    assert machine.at_hand(tmp_path) == LEFT

    # In use beyond the limit, as the kernel allows for a moment: nothing is left.
    files(tmp_path, **{f"{group}__memory.current": "9000000"})
    assert machine.at_hand(tmp_path) == 0


def test_memory_at_hand_in_a_container_of_control_groups_of_version_1(tmp_path):
    """The path is the host's; inside, its group is mounted as the top."""
    files(tmp_path, proc__meminfo=MEMINFO)
    files(tmp_path, proc__self__cgroup="9:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/\n")
    group = "sys__fs__cgroup__memory"
    files(tmp_path, **{f"{group}__memory.limit_in_bytes": LIMIT})
    files(tmp_path, **{f"{group}__memory.usage_in_bytes": "2000000"})
    files(tmp_path, **{f"{group}__memory.stat": "total_inactive_file 500000\n"})
    assert machine.at_hand(tmp_path) == LEFT


def never(*arguments):
    raise AssertionError("loaded or trained, although memory was too little")


@needs_prolog
def test_too_little_memory_ends_training_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "at_hand", too_little)
    monkeypatch.setattr("sft.train_supervised", never)
    with pytest.raises(SystemExit, match="^too little memory: this needs up to .* are at hand; "):
        train.main([*SMALL, "--name", "small"])


@needs_prolog
def test_too_little_memory_ends_an_evaluation_before_anything_is_loaded(tmp_path, monkeypatch):
    language = load_language("prolog")
    problems = load_problems("sums", "train", count=50)

    def prompt(problem):
        return program_messages(problem, language, 0, system=False)

    sft.make_tiny(problems, language, prompt, tmp_path / "tiny", seed=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "at_hand", too_little)
    monkeypatch.setattr(evaluation, "load_model", never)
    with pytest.raises(SystemExit, match="^too little memory: .*smaller model"):
        evaluation.main(["--model", str(tmp_path / "tiny"), "--bench", "sums", "--problems", "2"])


def too_little(root="/"):
    """A megabyte."""
    return 1 << 20
