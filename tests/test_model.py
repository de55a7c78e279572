"""Parity with transformers' Qwen2 and Qwen3 (DESIGN.md, invariant 2).

Random weights of every ratio of heads, files in and out; a real model: test_real_model.py.
"""

import json

import pytest
import torch

import model as model_file
import sft
from runtime import hugging_face
from runtime.tokenizer import ChatTokenizer
from sampler import Request, Sampler
from sandbox.languages import load_language
from tasks.problems import load_problems, program_messages

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: it is the peer of these tests"
)


def make_peer(ratio, tied, family="Qwen2", **shapes):
    """A random transformers model with `ratio` query heads per KV head.

    Biases and norms are random too, or an error in them would not show.
    """
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
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.2 if parameter.dim() == 1 else 0.08)
    return peer


def random_prompts(lengths=(70, 1, 33)):
    return [torch.randint(0, 517, (length,)).tolist() for length in lengths]


def largest_gap(peer, ours, prompts):
    """Of all logits; ours are of the prompts packed into one forward."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden = ours.hidden(tokens, positions, model_file.make_segments(lengths))
        logits = (hidden @ ours.head_weight.T).split(lengths)
        theirs = [peer(torch.tensor([prompt])).logits[0] for prompt in prompts]
    gaps = [(a - b).abs().max().item() for a, b in zip(theirs, logits)]
    return max(gaps)


def greedy(ours, prompts, **limits):
    """The sampler's greedy tokens of each prompt."""
    requests = [Request(prompt, temperature=0.0, **limits) for prompt in prompts]
    return [group[0].tokens for group in Sampler(ours).generate(requests)]


def same_parameters(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def through_files(peer, folder, **options):
    """The peer's checkpoint loaded by us, and ours loaded by the peer's family and by us again."""
    peer.save_pretrained(folder / "theirs", **options)
    ours = hugging_face.load_model(folder / "theirs")
    state = ours.state_dict()
    hugging_face.save_model(state, ours.config, folder / "ours", dtype=torch.float32)
    back = type(peer).from_pretrained(folder / "ours", dtype=torch.float32)
    again = hugging_face.load_model(folder / "ours")
    return ours, back, again


@pytest.mark.parametrize("ratio", [6, 7, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_and_files_go_both_ways(tmp_path, ratio, tied):
    """One of the checkpoints is cut into shards."""
    peer = make_peer(ratio, tied)
    shard = "200KB" if ratio == 7 else "1GB"
    ours, back, again = through_files(peer, tmp_path, max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (ratio == 7)
    assert (ours.head is None) == tied
    assert largest_gap(peer, ours, random_prompts()) < 1e-4
    assert same_parameters(peer, back)
    assert same_parameters(ours, again)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_equals_transformers_in_logits_files_and_greedy_text(tmp_path, tied):
    """Per-head norms on q and k, no bias, a head dim that is not hidden / heads."""
    peer = make_peer(7, tied, family="Qwen3", head_dim=32, attention_bias=False)
    ours, back, again = through_files(peer, tmp_path)
    config = ours.config
    assert ours.layers[0].qkv.bias is None
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert largest_gap(peer, ours, random_prompts()) < 1e-4
    assert same_parameters(peer, back)
    assert same_parameters(ours, again)

    prompts = random_prompts((70, 5, 33))
    for prompt, tokens in zip(prompts, greedy(ours, prompts, max_new_tokens=24)):
        whole = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        assert tokens == whole[0, len(prompt) :].tolist()


def test_both_spellings_of_the_rope_base(tmp_path):
    make_peer(6, True).save_pretrained(tmp_path)
    new = hugging_face.read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    old = {name: value for name, value in raw.items() if name != "rope_parameters"}
    for base in (1e6, 5e5):
        assert model_file.Config.from_dict(old | {"rope_theta": base}).rope_theta == base
    assert new.rope_theta == 1e6
    written = new.to_dict()
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6


def test_damaged_checkpoints_are_named(tmp_path):
    def refused(match):
        with pytest.raises(model_file.CheckpointError, match=match):
            hugging_face.load_model(tmp_path)

    refused("not a checkpoint")
    make_peer(6, True).save_pretrained(tmp_path)

    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("damaged")
    weights.unlink()
    refused("missing")
    weights.write_bytes(whole)

    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused("no tensor model.layers.3")
    path.write_text(json.dumps(config | {"intermediate_size": 128}))
    refused("shape")
    path.write_text("{")
    refused("not valid JSON")

    with pytest.raises(model_file.CheckpointError, match="hub id"):
        hugging_face.load_model(str(tmp_path / "nowhere"))


def swap_rows(weights, one, other):
    """A model that says `one` where it said `other`."""
    rows = weights["embed.weight"].detach().clone()
    rows[[one, other]] = rows[[other, one]]
    return weights | {"embed.weight": rows}


@pytest.mark.parametrize("mark", [0, 2])
def test_transformers_stops_where_our_sampler_stops(tmp_path, mark):
    """At <|im_end|> (2) and at <|endoftext|> (0), after a tokenizer's own end marks are saved.

    The built-in tiny model, untrained: the end mark takes the place of the token that it says 7th.
    """
    language = load_language("prolog")
    problems = load_problems("sums", "train", count=50)

    def prompt(problem):
        return program_messages(problem, language, 0, system=False)

    sft.make_tiny(problems, language, prompt, tmp_path / "tiny", seed=0)
    ours = hugging_face.load_model(tmp_path / "tiny")
    ids = [300, 301, 302]
    (said,) = greedy(ours, [ids], max_new_tokens=20)
    place = next(i for i in range(7, 20) if said[i] not in [*said[:i], *ids])

    weights = swap_rows(dict(ours.named_parameters()), mark, said[place])
    hugging_face.save_model(
        weights, ours.config, tmp_path / "ends", torch.float32, tokenizer_from=tmp_path / "tiny"
    )
    stop_ids = ChatTokenizer(tmp_path / "ends").stop_ids
    ends = hugging_face.load_model(tmp_path / "ends")
    (sampled,) = greedy(ends, [ids], max_new_tokens=20, stop_ids=stop_ids)
    assert sampled == [*said[:place], mark]

    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ends")
    whole = peer.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert whole[0, len(ids) :].tolist() == sampled
