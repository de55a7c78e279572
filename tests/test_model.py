"""Parity with transformers' Qwen2 (DESIGN.md, invariant 2): random weights of every GQA ratio, the real pretrained checkpoint, files in and out."""

import json
import os
from pathlib import Path

import pytest
import torch

import model as model_file
from batches import Sequence, pack
from runtime import hugging_face
from sampler import Request, Sampler

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: it is the peer of these tests"
)


def qwen2(ratio, tied, seed=0, family="Qwen2", **shapes):
    """A random transformers Qwen2 with `ratio` query heads per KV head; biases and norms random too, or an error in them would not show."""
    config = getattr(transformers, f"{family}Config")(
        **shapes,
        vocab_size=517,
        hidden_size=2 * ratio * 16,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2 * ratio,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.dim() == 1 else 0.08)
    return peer


def logits(model, sequences):
    """Logits of packed sequences, one [T, V] per sequence."""
    lengths = torch.tensor([len(s) for s in sequences])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    with torch.no_grad():
        hidden = model(
            torch.cat(sequences), torch.cat([torch.arange(n) for n in lengths]), cu_seqlens
        )
        return (hidden @ model.head_weight.T).split(lengths.tolist())


def largest_gap(peer, ours, sequences):
    with torch.no_grad():
        theirs = [peer(s[None]).logits[0] for s in sequences]
    return max((a - b).abs().max().item() for a, b in zip(theirs, logits(ours, sequences)))


@pytest.mark.parametrize("ratio", [6, 7, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_and_files_go_both_ways(tmp_path, ratio, tied):
    peer = qwen2(ratio, tied)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="200KB" if ratio == 7 else "1GB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (ratio == 7)
    ours = hugging_face.load_model(tmp_path / "theirs")
    assert (ours.head is None) == tied
    sequences = [torch.randint(0, 517, (n,)) for n in (70, 1, 33)]
    assert largest_gap(peer, ours, sequences) < 1e-4
    hugging_face.save_model(ours.state_dict(), ours.config, tmp_path / "ours", dtype=torch.float32)
    back = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(peer.state_dict().values(), back.state_dict().values())
    )
    again = hugging_face.load_model(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_equals_transformers_in_logits_files_and_greedy_text(tmp_path, tied):
    """Per-head norms on q and k, no bias, a head dim that is not hidden / heads. Sampling is what is drawn from those logits, and the
    sampler's log-probs are the trainer's."""
    peer = qwen2(7, tied, family="Qwen3", head_dim=32, attention_bias=False)
    peer.save_pretrained(tmp_path / "theirs")
    ours = hugging_face.load_model(tmp_path / "theirs")
    assert (
        ours.layers[0].qkv.bias is None
        and ours.config.head_dim * ours.config.num_attention_heads != ours.config.hidden_size
    )
    assert largest_gap(peer, ours, [torch.randint(0, 517, (n,)) for n in (70, 1, 33)]) < 1e-4
    hugging_face.save_model(ours.state_dict(), ours.config, tmp_path / "ours", dtype=torch.float32)
    back = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(peer.state_dict().values(), back.state_dict().values())
    )

    prompts = [torch.randint(0, 517, (n,)).tolist() for n in (70, 5, 33)]
    greedy = [
        group[0].tokens
        for group in Sampler(ours).generate(
            [Request(p, max_new_tokens=24, temperature=0.0) for p in prompts]
        )
    ]
    for prompt, tokens in zip(prompts, greedy):
        whole = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        assert tokens == whole[0, len(prompt) :].tolist()
    for group in Sampler(ours).generate(
        [Request(p, n=3, max_new_tokens=24, seed=1, id=i) for i, p in enumerate(prompts)]
    ):
        for c in group:
            batch = pack([Sequence(prompts[c.request], c.tokens)])
            with torch.no_grad():
                logprobs, _ = ours(batch)
            torch.testing.assert_close(logprobs, torch.tensor(c.logprobs), atol=1e-5, rtol=0)


def test_both_spellings_of_the_rope_base(tmp_path):
    peer = qwen2(6, True)
    peer.save_pretrained(tmp_path)
    new = hugging_face.read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    old = {k: v for k, v in raw.items() if k != "rope_parameters"} | {"rope_theta": 1e6}
    assert new.rope_theta == model_file.Config.from_dict(old).rope_theta == 1e6
    assert model_file.Config.from_dict(old | {"rope_theta": 5e5}).rope_theta == 5e5
    written = new.to_dict()
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6


def test_damaged_checkpoints_are_named(tmp_path):
    def refused(match):
        with pytest.raises(model_file.CheckpointError, match=match):
            hugging_face.load_model(tmp_path)

    refused("no checkpoint")
    peer = qwen2(6, True)
    peer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("damaged")
    weights.unlink()
    refused("missing")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused("no tensor model.layers.3")
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused("shape")
    (tmp_path / "config.json").write_text("{")
    refused("not valid JSON")
    with pytest.raises(model_file.CheckpointError, match="hub id"):
        hugging_face.load_model(str(tmp_path / "nowhere"))


def real_checkpoint():
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("RARECODE_MODEL", root.parent / "models" / "smollm2-135m"))
    if not (folder / "model.safetensors").exists():
        pytest.skip(
            f"no pretrained checkpoint at {folder}: write one with smollm2_to_qwen2.py and set RARECODE_MODEL to its folder"
        )
    return folder


def test_real_checkpoint_same_logits_and_same_greedy_text():
    folder = real_checkpoint()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = hugging_face.load_model(folder)
    questions = [
        "What is 6 times 7?",
        "Name three primary colours, and say which two of them make green.",
        "Write one sentence about rain.",
    ]
    prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions]
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    assert largest_gap(peer, ours, [torch.tensor(x) for x in ids]) < 1e-4
    requests = [
        Request(x, max_new_tokens=16, temperature=0.0, stop_ids=(tokenizer.eos_token_id,))
        for x in ids
    ]
    sampled = [group[0].tokens for group in Sampler(ours).generate(requests)]
    for prompt, tokens in zip(ids, sampled):
        with torch.no_grad():
            whole = peer.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert tokens == whole[0, len(prompt) :].tolist()
    assert "6 times 7" in tokenizer.decode(sampled[0])
