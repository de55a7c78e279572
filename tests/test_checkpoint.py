"""Checkpoints: what is damaged is seen, what is written is whole, what is restored is equal."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import model as model_file
from batches import make_optimizer
from runs import ENVIRONMENT, ROOT
from runtime import checkpoint, memory
from settings import Settings


def small_model():
    shapes = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return model_file.random_model(model_file.Config.from_dict({"model_type": "qwen2", **shapes}))


def save_two(folder):
    """Checkpoints of steps 1 and 2; returns their model and optimizer."""
    model = small_model()
    optimizer = make_optimizer(model)
    for step in (1, 2):
        checkpoint.save(folder, step, model, optimizer, {"updates": step}, None, keep=5)
    return model, optimizer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, harm):
    save_two(tmp_path)
    path = tmp_path / "step_2" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(data[:-9])
    elif harm == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    assert checkpoint.newest(tmp_path).name == "step_1"
    assert "step_2" in capsys.readouterr().err
    assert (tmp_path / "step_2").exists()


def test_write_failure_keeps_the_earlier_checkpoint_and_leaves_no_litter(tmp_path):
    """A real failing write (a file-size limit stands for a full disk), in a process of its own."""
    save_two(tmp_path)
    program = f"""
import resource, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from test_checkpoint import small_model, make_optimizer, checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = small_model()
optimizer = make_optimizer(model)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save({str(tmp_path)!r}, 3, model, optimizer, {{"updates": 3}}, None, keep=1)
except OSError as problem:
    print("OSError", problem)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.stdout.startswith("OSError"), done.stderr[-1500:]
    assert names(tmp_path) == ["step_1", "step_2"]
    assert checkpoint.newest(tmp_path).name == "step_2"


def test_a_run_whose_checkpoints_have_no_room_is_refused_before_its_first_step(
    tmp_path, monkeypatch
):
    """The 0.5B's take 12 bytes a parameter, 5.9 GB; while one is written there is one more."""
    config = memory.qwen("0.5B")
    size = 12 * memory.parameters(config)[0]

    def fits(free, **changes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        settings = Settings(**{"steps": 1500, "keep": 2, "eval_every": 0} | changes)
        try:
            checkpoint.require_room(tmp_path / "checkpoints", config, settings)
        except SystemExit as problem:
            assert "lower --keep" in str(problem)
            return False
        return True

    assert fits(3 * size) and not fits(3 * size - 1)
    assert fits(2 * size, keep=1) and not fits(2 * size, keep=1, eval_every=100)
    assert fits(size, steps=100) and not fits(size - 1, steps=100)
    assert fits(1.2 * size, lora_rank=32)
    for step in (100, 200):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    assert fits(size) and not fits(size - 1)
    assert fits(0, steps=200)


def test_restore_gives_back_weights_and_moments(tmp_path):
    model = small_model()
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    checkpoint.save(tmp_path, 7, model, optimizer, {"updates": 1}, None, keep=1)

    again = small_model()
    other = make_optimizer(again)
    assert checkpoint.restore(tmp_path / "step_7", again, other)["step"] == 7
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    model, optimizer = save_two(tmp_path)
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, step, model, optimizer, {"updates": step}, None, keep=1, best=2)
    assert names(tmp_path) == ["step_2", "step_5"]
