"""Loading: names, shards, every way in which a checkpoint can be wrong, and dummy weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import CheckpointError
from core.interfaces import TensorSpec
from core.model.families import load_hf_config, read_model
from core.model.linear import PlainScheme
from core.model.weights import INDEX_FILE, SINGLE_FILE, load_dummy, load_weights
from core.testing.checkpoints import FAMILIES, make_checkpoint, reference_logits

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A llama checkpoint in one file, to be damaged."""
    shutil.copytree(checkpoint("llama3"), tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A llama checkpoint in several files, to be damaged."""
    return make_checkpoint("llama3", tmp_path, num_shards=3)


def edit(folder, change, file=SINGLE_FILE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_index(folder, change):
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


# --- what works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_the_decoder_wants_the_names_that_transformers_writes(variant, checkpoint, build):
    spec = read_model(load_hf_config(checkpoint(variant)))
    decoder = build(spec)
    wanted = {weight.name for weight in decoder.plain_weights()}
    for linear, _, scheme in decoder.linears():
        for shard, (prefix, _) in enumerate(linear.whole.shards):
            wanted |= {f"{prefix}.{name}" for name in scheme.tensors(linear.whole, shard)}
    stored = set()
    for name in load_file(checkpoint(variant) / SINGLE_FILE):
        if not name.startswith(spec.ignored_prefixes):
            stored.add(name.replace("language_model.model.", "model."))
    assert wanted == stored


def test_several_files_hold_the_same_model(checkpoint, sharded, load, run):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = [3, 1, 4, 1, 5]
    expected = run(load(checkpoint("llama3")), tokens)
    torch.testing.assert_close(run(load(sharded), tokens), expected, rtol=0, atol=0)


def test_every_weight_is_overwritten(checkpoint, build):
    decoder = build(read_model(load_hf_config(checkpoint("gemma3"))))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
    load_weights(decoder, checkpoint("gemma3"), device=CPU)
    assert all(p.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("scheme", ["language_model.model.", "model.language_model."])
def test_both_naming_schemes_of_multimodal_checkpoints(scheme, checkpoint, load, run, tmp_path):
    path = checkpoint("gemma3-multimodal")
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SINGLE_FILE)
    assert any(name.startswith("vision_tower.") for name in tensors)
    renamed = {
        name.replace("language_model.model.", scheme).replace(
            "vision_tower.", "vision_tower." if scheme.startswith("l") else "model.vision_tower."
        ): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / SINGLE_FILE)
    tokens = [3, 1, 4, 1, 5]
    expected = reference_logits(path, tokens)
    torch.testing.assert_close(run(load(tmp_path), tokens), expected, rtol=1e-4, atol=1e-4)


def test_old_exports_may_store_the_rotary_frequencies(folder, load):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    load(folder)


@pytest.mark.parametrize("kept", ["both", "lm_head.weight"])
def test_a_tied_head_may_be_stored_too_or_instead(kept, checkpoint, load, run, tmp_path):
    shutil.copytree(checkpoint("llama3.2"), tmp_path, dirs_exist_ok=True)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept != "both":
            del tensors["model.embed_tokens.weight"]

    edit(tmp_path, add_head)
    tokens = [3, 1, 4]
    expected = run(load(checkpoint("llama3.2")), tokens)
    torch.testing.assert_close(run(load(tmp_path), tokens), expected, rtol=0, atol=0)


def test_half_precision_files_fill_a_float32_model(folder, load):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit(folder, halve)
    decoder = load(folder)
    stored = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"]
    torch.testing.assert_close(decoder.embedding.weight, nn.Parameter(stored.float()))


def test_links_may_lead_out_of_the_folder(sharded, load, tmp_path_factory):
    """As in the download cache, whose folders hold nothing else."""
    links = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (links / file.name).symlink_to(file)
    load(links)


# --- what does not ---------------------------------------------------------------------------------


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(Q_PROJ, "model.norm.weight"), rf"lacks 2 tensors: {Q_PROJ}, model\.norm\.weight"),
        (drop("lm_head.weight"), r"lacks 1 tensors: lm_head\.weight"),
        (put("model.extra", torch.ones(2)), r"holds 1 tensors .* model\.extra \(model\.safetensors"),
        (
            put(Q_PROJ, torch.ones(64, 63)),
            rf"model\.safetensors: {Q_PROJ} has shape \[64, 63\], .* \[64, 64\]",
        ),
        (
            put(Q_PROJ, torch.ones(64, 64, dtype=torch.int32)),
            rf"{Q_PROJ} has dtype I32, but float64 or .* is needed",
        ),
        (
            put(Q_PROJ, torch.ones(64, 64).to(torch.float8_e4m3fn)),
            rf"{Q_PROJ} has dtype F8_E4M3",
        ),
    ],
)
def test_wrong_tensors(change, message, folder, load):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_ten_missing_tensors_are_listed_and_the_rest_counted(folder, load):
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers." in n])
    with pytest.raises(CheckpointError, match="lacks 18 tensors") as info:
        load(folder)
    assert str(info.value).count("model.layers.") == 10
    assert str(info.value).endswith("and 8 more")


def test_a_tied_head_that_differs(checkpoint, load, tmp_path):
    shutil.copytree(checkpoint("llama3.2"), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, put("lm_head.weight", torch.ones(160, 64)))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_files(keep, folder, load):
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load(folder)


def test_a_missing_shard(sharded, load):
    gone = min(sharded.glob("model-*.safetensors"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"names 1 files that are missing: {gone.name}"):
        load(sharded)


def test_a_tensor_in_two_shards(sharded, load):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    edit(sharded, put(name, tensor), second.name)
    with pytest.raises(CheckpointError, match=f"{second.name} holds {name}, which .*{first.name}"):
        load(sharded)


def test_a_tensor_that_the_index_promises_elsewhere(sharded, load):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    edit_index(sharded, lambda weight_map: weight_map.update({name: second.name}))
    with pytest.raises(CheckpointError, match=f"{second.name} lacks 1 tensors .*{name}"):
        load(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
    ],
)
def test_a_shard_outside_the_folder(shard, sharded, load):
    edit_index(sharded, lambda weight_map: weight_map.update({Q_PROJ: shard}))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        load(sharded)


def test_a_shard_that_is_no_safetensors_file(sharded, load):
    edit_index(sharded, lambda weight_map: weight_map.update({Q_PROJ: "model.bin"}))
    with pytest.raises(CheckpointError, match=r"'model\.bin' is no \.safetensors file"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index(text, sharded, load):
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE} is malformed"):
        load(sharded)


def test_an_empty_index(sharded, load):
    (sharded / INDEX_FILE).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="names no tensors"):
        load(sharded)


def test_pickled_weights_are_refused(folder, load):
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load(folder)


def test_a_folder_without_weights(folder, load):
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*config\.json"):
        load(folder)


def test_a_file_instead_of_a_folder(checkpoint, build, folder):
    decoder = build(read_model(load_hf_config(folder)))
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_weights(decoder, folder / SINGLE_FILE, device=CPU)


def test_a_path_that_does_not_exist(build, folder):
    decoder = build(read_model(load_hf_config(folder)))
    with pytest.raises(CheckpointError, match="is no folder and cannot be downloaded"):
        load_weights(decoder, folder / "absent", device=CPU)


# --- dummy weights ---------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """8-bit weights with a scale for each output, as a quantizer might store them."""

    def __init__(self, spec):
        super().__init__()
        self.register_buffer(
            "packed", torch.zeros(spec.out_features, spec.in_features, dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.zeros(spec.out_features, 1))
        self.register_buffer("fp8", torch.zeros(4, dtype=torch.float8_e4m3fn))
        self.num_finalized = 0

    def forward(self, x):
        return x @ ((self.packed.float() - 128) / 74 * self.weight_scale).T


class PackedScheme(PlainScheme):
    """Fulfils `QuantScheme` with the module above."""

    def make_linear(self, spec, /):
        return PackedLinear(spec)

    def tensors(self, spec, shard, /):
        return {"packed": TensorSpec((spec.shards[shard][1], spec.in_features), torch.uint8)}

    def load(self, module, spec, shard, tensors, /):
        first = sum(size for _, size in spec.shards[:shard])
        module.packed[first : first + spec.shards[shard][1]] = tensors["packed"]

    def finalize(self, module, spec, /):
        module.num_finalized += 1


@pytest.mark.parametrize("variant", ["llama-bias", "gemma3", "phi4"])
def test_dummy_weights_keep_activations_sane(variant, checkpoint, build, run):
    decoder = build(read_model(load_hf_config(checkpoint(variant))))
    load_dummy(decoder, 0)
    logits = run(decoder, list(range(40)))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert len(set(logits.argmax(-1).tolist())) > 5


def test_dummy_weights_depend_on_the_seed_alone(checkpoint, build):
    spec = read_model(load_hf_config(checkpoint("llama3")))
    first, again, other = build(spec), build(spec), build(spec)
    for decoder, seed in ((first, 1), (again, 1), (other, 2)):
        load_dummy(decoder, seed)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_dummy_weights_fill_the_buffers_of_any_scheme(checkpoint, build, run):
    spec = read_model(load_hf_config(checkpoint("llama3")))
    decoder = build(spec, scheme=PackedScheme())
    load_dummy(decoder, 0)
    for _, module, _ in decoder.linears():
        assert module.packed.min() == 0
        assert module.packed.max() == 255
        assert (module.weight_scale > 0).all()
        assert module.fp8.float().isfinite().all()
        assert module.fp8.float().any()
        assert module.num_finalized == 1
    assert run(decoder, list(range(20))).isfinite().all()


def test_the_tensors_of_a_scheme_are_read_with_its_dtypes(folder, build):
    decoder = build(read_model(load_hf_config(folder)), scheme=PackedScheme())
    with pytest.raises(CheckpointError, match=r"lacks 15 tensors: .*q_proj\.packed"):
        load_weights(decoder, folder, device=CPU)

    def pack(tensors):
        for name, tensor in list(tensors.items()):
            if tensor.ndim == 2 and "embed" not in name:
                packed = tensor.mul(20).clamp(-128, 127).add(128).to(torch.uint8)
                tensors[name.replace("weight", "packed")] = packed
                del tensors[name]

    edit(folder, pack)
    load_weights(decoder, folder, device=CPU)
    stored = load_file(folder / SINGLE_FILE)
    qkv = [
        stored[Q_PROJ.replace("q_proj", p).replace("weight", "packed")] for p in ("q_proj", "k_proj")
    ]
    torch.testing.assert_close(decoder.layers[0].qkv_proj.packed[:96], torch.cat(qkv))
    assert all(module.num_finalized == 1 for _, module, _ in decoder.linears())

    edit(folder, put(Q_PROJ.replace("weight", "packed"), torch.ones(64, 64)))
    with pytest.raises(CheckpointError, match="has dtype F32, but uint8 is needed"):
        load_weights(decoder, folder, device=CPU)
