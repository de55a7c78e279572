"""Is a model folder what it says it is? Each fault is one sentence that names its cause.

And what is saved: finite, whole prompts, the end marks that were trained.
"""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_file
from batches import make_optimizer, take_step
from runs import ENVIRONMENT, command, needs_prolog
from runtime import checkpoint, hugging_face
from runtime.tokenizer import ChatTokenizer, train_bpe
from test_update import gradient, sequences

LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
SHAPES = dict(
    model_type="qwen2",
    vocab_size=277,  # what the BPE below comes to
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def made_model(tied=True):
    config = model_file.Config.from_dict(SHAPES | {"tie_word_embeddings": tied})
    return model_file.random_model(config, std=0.1)


@pytest.fixture
def folder(tmp_path):
    """A sound model folder with a tokenizer of its size."""
    folder = tmp_path / "model"
    train_bpe(["some words to learn from"], 300, folder)
    model = made_model()
    hugging_face.save_model(dict(model.named_parameters()), model.config, folder)
    return folder


def refused(folder, *words):
    """Loading ends in one sentence that has these words."""
    with pytest.raises(model_file.CheckpointError) as raised:
        hugging_face.load_model(folder)
    sentence = str(raised.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def change(folder, edit):
    """Edit the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- quantised weights ----


def fp8(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{DOWN}.weight_scale_inv"] = torch.ones(1, 1)


def fp8_read_as_bf16(tensors):
    """Shapes and types are a plain model's: only the scale shows it."""
    tensors[f"{DOWN}.weight_scale_inv"] = torch.ones(1, 1)


def fp8_without_scale(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.float8_e5m2)


def int8(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.int8)
    tensors[f"{DOWN}.SCB"] = torch.ones(32)


def four_bits(tensors):
    tensors[f"{DOWN}.weight"] = torch.zeros(32 * 48 // 2, 1, dtype=torch.uint8)
    tensors[f"{DOWN}.weight.absmax"] = torch.ones(24)
    tensors[f"{DOWN}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)


def packed_bytes(tensors):
    """A format that nobody has heard of, with bytes under a weight's own name."""
    tensors[f"{DOWN}.weight"] = torch.zeros(32, 48, dtype=torch.uint8)


def gptq(tensors):
    del tensors[f"{DOWN}.weight"]
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"{DOWN}.{name}"] = torch.zeros(4, 4, dtype=torch.int32)


def compressed(tensors):
    del tensors[f"{DOWN}.weight"]
    tensors[f"{DOWN}.weight_packed"] = torch.zeros(4, 4, dtype=torch.int32)


def not_merged(tensors):
    tensors[f"{DOWN}.base_layer.weight"] = tensors.pop(f"{DOWN}.weight")
    tensors[f"{DOWN}.lora_A.default.weight"] = torch.zeros(4, 48)


@pytest.mark.parametrize(
    "edit,words",
    [
        (fp8, ["quantised", "FP8", "weight_scale_inv"]),
        (fp8_read_as_bf16, ["quantised", "FP8", "weight_scale_inv"]),
        (fp8_without_scale, ["quantised", "F8_E5M2"]),
        (int8, ["quantised", "bitsandbytes int8", "SCB"]),
        (four_bits, ["quantised", "bitsandbytes 4-bit"]),
        (packed_bytes, ["quantised", "U8"]),
        (gptq, ["quantised", "GPTQ", "qweight"]),
        (compressed, ["quantised", "compressed-tensors"]),
        (not_merged, ["LoRA adapter", "not merged"]),
    ],
)
def test_weights_that_are_not_plain_are_named(folder, edit, words):
    change(folder, edit)
    refused(folder, *words)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_a_config_that_says_quantised_is_believed(folder, method):
    change_json(folder / "config.json", quantization_config={"quant_method": method})
    refused(folder, "quantised", method)


# ---- another model than config.json says ----


def another_layer(tensors):
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(32, 48)


def another_bias(tensors):
    tensors[f"{LAYER}.self_attn.o_proj.bias"] = torch.zeros(32)


def wrapped(tensors):
    """As torch.compile names what it wraps."""
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def swapped_parts(tensors):
    """q has 32 rows, k 16: together they are as many the other way round."""
    names = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qk"]
    q, k = (tensors[name] for name in names)
    tensors[names[0]], tensors[names[1]] = k, q


def narrow_part(tensors):
    name = f"{LAYER}.self_attn.v_proj.weight"
    tensors[name] = tensors[name][:, :16].contiguous()


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    "edit,words",
    [
        (another_layer, ["does not describe", "model.layers.2"]),
        (another_bias, ["does not describe", "o_proj.bias"]),
        (wrapped, ["no tensor model.embed_tokens.weight", "_orig_mod"]),
        (swapped_parts, ["q_proj.weight has shape [16, 32]", "[32, 32]"]),
        (narrow_part, ["v_proj.weight has shape [16, 16]", "[16, 32]"]),
        (other_head, ["lm_head.weight is not the embedding", "tie_word_embeddings"]),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, edit, words):
    change(folder, edit)
    refused(folder, *words)


def test_harmless_leftovers_are_passed_over(folder):
    """Old transformers saved the rotation frequencies; other tools the tied matrix twice."""
    before = hugging_face.load_model(folder).state_dict()

    def leave(tensors):
        tensors[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(folder, leave)
    after = hugging_face.load_model(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "values,word",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_a_config_of_another_decoder_is_refused(folder, values, word):
    change_json(folder / "config.json", **values)
    refused(folder, word)


# ---- the files ----


def cut_into_shards(folder):
    """Two shards and their index; returns the index's path."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        names = sorted(tensors)[number - 1 :: 2]
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_load_and_an_index_that_disagrees_with_them_is_refused(folder):
    whole = hugging_face.load_model(folder).state_dict()
    weights = (folder / "model.safetensors").read_bytes()
    index = cut_into_shards(folder)
    shards = hugging_face.load_model(folder).state_dict()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)

    good = json.loads(index.read_text())["weight_map"]
    other = {file: name for name, file in good.items()}  # a tensor of each file

    def refused_with(weight_map, *words):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, *words)

    first, second = sorted(other)
    refused_with(good | {other[first]: second}, "disagree", other[first])
    refused_with({name: good[name] for name in good if name != other[first]}, "disagree")
    refused_with(good | {"lm_head.weight": first}, "disagree", "lm_head.weight is not in")
    refused_with(dict.fromkeys(good, "model-00003-of-00002.safetensors"), "00003", "missing")
    refused_with({}, "no weight_map")
    index.write_text("{")
    refused(folder, "not valid JSON")

    # transformers would read the one file, vLLM both.
    index.write_text(json.dumps({"weight_map": good}))
    (folder / "model.safetensors").write_bytes(weights)
    refused(folder, "two sets of weights")

    index.unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "missing", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.gguf", "consolidated.pth"])
def test_weights_in_another_format_are_named(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, file, "only safetensors", "save_pretrained")


def test_a_pointer_of_git_lfs_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
    (folder / "model.safetensors").write_text(pointer)
    refused(folder, "git lfs pull")


def test_an_adapter_is_not_a_model(folder, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-Coder-0.5B"}
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(json.dumps(adapter))
    refused(alone, "LoRA adapter alone", "Qwen/Qwen2.5-Coder-0.5B", "merge_and_unload")

    shutil.copytree(alone, folder / "adapter")
    refused(folder / "adapter", "LoRA adapter alone", f"give {folder}")
    hugging_face.load_model(folder)

    # Beside a model nobody can tell whether it is merged, but for older checkpoints of ours.
    shutil.copy(alone / "adapter_config.json", folder)
    refused(folder, "a model and a LoRA adapter")
    (folder / "state.json").write_text("{}")
    hugging_face.load_model(folder)


# ---- values ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{LAYER}.self_attn.v_proj.bias"])
def test_values_that_are_not_finite_are_counted(folder, value, name):
    def harm(tensors):
        tensors[name].view(-1)[-1] = value

    change(folder, harm)
    refused(folder, name, "NaN or infinity in 1 of")


def test_a_value_that_the_smaller_type_cannot_hold_is_refused(folder):
    """1e39 is finite in fp64 and infinite in fp32."""

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
        tensors["model.norm.weight"][3] = 1e39

    change(folder, widen)
    refused(folder, "model.norm.weight", "NaN or infinity in 1 of 32")


@needs_prolog
@pytest.mark.parametrize(
    "script",
    ["eval.py --bench sums", pytest.param("sft.py --task sums --out out", marks=pytest.mark.slow)],
)
def test_the_commands_end_with_the_sentence(folder, tmp_path, script):
    def diverge(tensors):
        tensors["model.norm.weight"].fill_(float("nan"))

    change(folder, diverge)
    script, *arguments = script.split()
    done = subprocess.run(
        command("--model", str(folder), *arguments, script=script),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"{script}: {folder}: model.norm.weight holds NaN or infinity")
    assert all(line.startswith("memory per rank") for line in before)  # eval.py's plan
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model = made_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["layers.1.gate_up.weight"][60, 3] = float("nan")  # 48 rows of gate, then up
    with pytest.raises(model_file.CheckpointError, match=r"layers.1.mlp.up_proj.*NaN.*1 of 1536"):
        hugging_face.save_model(weights, model.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["weights", "moments"])
def test_a_checkpoint_that_is_not_finite_leaves_the_one_before(tmp_path, place):
    model = made_model()
    optimizer = make_optimizer(model)
    gradient(sequences(), 10_000, model=model)
    take_step(model, optimizer, 0.01, 0.0)
    checkpoint.save(tmp_path, 1, model, optimizer, {"updates": 1}, None, keep=1)

    if place == "weights":
        harmed = model.norm.data
    else:
        harmed = optimizer.state[model.norm]["exp_avg"]
    harmed[0] = float("inf")
    with pytest.raises(model_file.CheckpointError, match="norm.*holds NaN or infinity in 1 of 32"):
        checkpoint.save(tmp_path, 2, model, optimizer, {"updates": 2}, None, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


# ---- the tokenizer beside the model ----


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder):
    """The tokenizer's last id must have a row: 277 ids, 0 to 276."""
    assert ChatTokenizer(folder).vocab_size == 277
    add_token(folder, 277)
    with pytest.raises(ValueError, match=r"ids up to 277 \(\[PAD\]\).*embedding has 277 rows"):
        ChatTokenizer(folder)

    # Rows that no token has are usual: Qwen2.5 has 271.
    change_json(folder / "config.json", vocab_size=512)
    assert ChatTokenizer(folder).vocab_size == 278


def add_token(folder, id):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": id, "content": "[PAD]"})
    path.write_text(json.dumps(raw))


def test_an_added_token_that_gets_another_id_is_refused(folder):
    """The library gives it the next free id, 277."""
    change_json(folder / "config.json", vocab_size=512)
    add_token(folder, 300)
    with pytest.raises(ValueError, match=r"\[PAD\] is id 300, but it becomes \[277\]"):
        ChatTokenizer(folder)


def test_tokens_that_only_tokenizer_config_knows_are_refused(folder):
    """transformers would add them, and <tool> would be one id there and five here."""
    known = {"2": {"content": "<|im_end|>"}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=known)
    ChatTokenizer(folder)
    more = known | {"276": {"content": "<tool>"}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=more)
    with pytest.raises(ValueError, match="tokenizer_config.json says that <tool> is id 276"):
        ChatTokenizer(folder)


# ---- what is saved ----


def saved_ends(folder):
    """(eos_token_id of config.json, of generation_config.json)."""
    files = ("config.json", "generation_config.json")
    return tuple(json.loads((folder / file).read_text())["eos_token_id"] for file in files)


def test_the_end_marks_that_were_trained_are_saved(folder, tmp_path):
    """Ids of the BPE: 0 is <|endoftext|>, 2 <|im_end|>, which the template writes after a turn."""
    assert saved_ends(folder) == (2, [2, 0])

    # A base model names <|endoftext|> alone, and how it likes to be sampled.
    change_json(folder / "config.json", eos_token_id=0)
    base = {"eos_token_id": 0, "temperature": 0.7, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(base))
    model = hugging_face.load_model(folder)
    weights = dict(model.named_parameters())
    hugging_face.save_model(weights, model.config, tmp_path / "out", tokenizer_from=folder)
    assert saved_ends(tmp_path / "out") == (2, [2, 0])
    assert ChatTokenizer(tmp_path / "out").stop_ids == ChatTokenizer(folder).stop_ids
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 0], "temperature": 0.7}


def test_a_saved_tokenizer_keeps_prompts_whole(folder, tmp_path):
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    from tokenizers import Tokenizer

    harmed = Tokenizer.from_file(str(path))
    harmed.enable_truncation(4)
    harmed.save(str(path))
    model = hugging_face.load_model(folder)
    weights = dict(model.named_parameters())
    hugging_face.save_model(weights, model.config, tmp_path / "out", tokenizer_from=folder)
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == json.loads(whole)
