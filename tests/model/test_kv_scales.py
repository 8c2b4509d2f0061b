"""Scales of a quantized KV cache: every name that they go by, every way to be wrong, and finding them."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from core.errors import CheckpointError
from core.model import kv_scales
from core.model.families import load_hf_config, read_model
from core.model.kv_scales import (
    FP8_MAX,
    HEADROOM,
    MIN_SCALE,
    KVScales,
    calibrate,
    needs_scales,
    scale_tensors,
)
from core.model.weights import SINGLE_FILE, load_weights
from core.sharding import Span

CPU = torch.device("cpu")
ATTENTION = "model.layers.{}.self_attn."


@pytest.fixture
def write(checkpoint, tmp_path):
    """Write a checkpoint with additional tensors in each layer, by name within its attention."""

    def make(*tensors, variant="llama3", prefix=ATTENTION):
        shutil.copytree(checkpoint(variant), tmp_path, dirs_exist_ok=True)
        stored = load_file(tmp_path / SINGLE_FILE)
        num_layers = load_hf_config(tmp_path).num_hidden_layers if len(tensors) == 1 else len(tensors)
        for layer, of_layer in zip(range(num_layers), itertools.cycle(tensors), strict=False):
            for name, value in of_layer.items():
                stored[prefix.format(layer) + name] = torch.as_tensor(value) + 0
        save_file(stored, tmp_path / SINGLE_FILE)
        return tmp_path

    return make


@pytest.fixture
def read(build):
    """Read the scales of a checkpoint, of a part of it if there is a share."""

    def get(folder, **parts):
        decoder = build(read_model(load_hf_config(folder)))
        decoder.share = replace(decoder.share, **parts)
        scales = KVScales.ones(decoder.share, CPU)
        with capture_logs() as logs:
            load_weights(decoder, folder, device=CPU, kv_scales=scales)
        return scales, logs

    return get


# --- what is read ----------------------------------------------------------------------------------

SPELLINGS = [
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
]


@pytest.mark.parametrize("names", SPELLINGS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_spelling_of_a_scale(names, shape, dtype, write, read):
    k = torch.tensor([0.5, 0.25]).to(dtype)[: max(1, shape[0] if shape else 1)].reshape(shape)
    scales, logs = read(write({names[0]: k, names[1]: 2 * k}))
    expected = k.float().flatten().expand(2, 2)
    assert torch.equal(scales.keys, expected)
    assert torch.equal(scales.values, 2 * expected)
    assert not logs


def test_one_scale_for_keys_and_values(write, read):
    scales, logs = read(write({"kv_scale": 0.125}))
    assert torch.equal(scales.keys, torch.full((2, 2), 0.125))
    assert torch.equal(scales.values, scales.keys)
    assert not logs


def test_names_are_those_of_the_decoder_where_a_family_renames(write, read):
    prefix = "language_model.model.layers.{}.self_attn."
    tensors = {"k_proj.k_scale": 0.5, "v_proj.v_scale": 2.0}
    scales, _ = read(write(*[tensors] * 4, variant="gemma3-multimodal", prefix=prefix))
    assert torch.equal(scales.keys, torch.full((4, 2), 0.5))


@pytest.mark.parametrize("scale", [[0.5, 0.25], [0.5]])
def test_a_rank_takes_the_scales_of_its_layers_and_heads(scale, write, read):
    folder = write({"kv_scale": [1.0, 1.0]}, {"k_scale": scale, "v_scale": scale})
    scales, _ = read(folder, layers=Span(1, 2), kv_heads=Span(1, 2))
    assert scales.keys.tolist() == scales.values.tolist() == [scale[-1:]]


def test_whoever_wants_no_scales_passes_over_them(write, load):
    names = [name for pair in SPELLINGS for name in pair]
    names += ["kv_scale", "q_scale", "q_proj.q_scale", "attn.prob_scale", "k_zero_point"]
    folder = write(dict.fromkeys(names, -1))  # impossible, but nobody looks
    load(folder)


def test_other_tensors_are_still_too_many(write, load):
    with pytest.raises(CheckpointError, match=r"holds 2 tensors that .*k_proj\.scale"):
        load(write({"k_proj.scale": 1.0}))


# --- what is not -----------------------------------------------------------------------------------


def test_missing_scales_are_ones_with_one_warning(checkpoint, read):
    scales, logs = read(checkpoint("llama3"))
    assert torch.equal(scales.keys, torch.ones(2, 2))
    (entry,) = logs
    assert entry["log_level"] == "warning"
    assert (entry["num_layers"], entry["first_layer"]) == (2, 0)
    assert "core quantize --kv-cache-dtype fp8" in entry["event"]


@pytest.mark.parametrize("x", ["k", "v"])
def test_layers_that_lack_either_scale_are_counted(x, write, read):
    scales, logs = read(write({"kv_scale": 0.5}, {f"{x}_scale": 0.25}))
    found, missing = (scales.keys, scales.values)[:: 1 if x == "k" else -1]
    assert found[:, 0].tolist() == [0.5, 0.25]
    assert missing[:, 0].tolist() == [0.5, 1.0]
    assert [(entry["num_layers"], entry["first_layer"]) for entry in logs] == [(1, 1)]


def test_other_ranks_leave_the_warning_to_the_first(checkpoint, read):
    for parts in ({"layers": Span(1, 2)}, {"tensor_rank": 1}):
        _, logs = read(checkpoint("llama3"), **parts)
        assert not logs


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"k_scale holds \[0\.0\], but scales are positive and finite"),
        (-1.0, r"positive and finite"),
        ([1.0, float("nan")], r"positive and finite"),
        (float("inf"), r"positive and finite"),
        ([1.0, 1.0, 1.0], r"has shape \[3\] .* one for each of 2 heads"),
        (1, r"dtype I64, but .* a floating dtype"),
    ],
)
def test_impossible_scales(value, message, write, read):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read(write({"k_scale": value}))


def test_zero_points_must_be_zero(write, read):
    tensors = {"k_scale": 0.5, "v_scale": 0.5, "k_zero_point": torch.zeros(1, dtype=torch.int8)}
    _, logs = read(write(tensors))
    assert not logs
    folder = write({"v_proj.v_zero_point": torch.tensor([3], dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"v_zero_point is not zero.*--kv-cache-dtype auto"):
        read(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_only_one_byte_needs_scales(dtype):
    assert needs_scales(dtype)
    assert not needs_scales(torch.bfloat16)


# --- finding them ----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.1, 1.0, 300.0, 1e5]))
def test_the_largest_number_has_headroom_and_nothing_else_matters(seed, size):
    generator = torch.Generator().manual_seed(seed)
    keys, values = size * torch.randn(2, 9, 3, 4, generator=generator)
    k_scales, v_scales = calibrate(keys, values)
    for x, scales in ((keys, k_scales), (values, v_scales)):
        assert (scales.dtype, scales.shape) == (torch.float32, (3,))
        largest = (x / scales[:, None]).abs().amax(dim=(0, 2))
        torch.testing.assert_close(largest, torch.full((3,), FP8_MAX / HEADROOM))


def test_a_text_may_come_in_parts():
    keys, values = torch.randn(2, 20, 3, 4).bfloat16()
    whole = calibrate(keys, values)
    parts = [calibrate(keys[part], values[part]) for part in (slice(7), slice(7, 20))]
    for scales, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(scales, torch.maximum(first, second))


def test_heads_without_anything_have_a_scale_too():
    scales, _ = calibrate(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4))
    assert scales.tolist() == [MIN_SCALE] * 2


@pytest.mark.parametrize("variant", ["llama3", "phi3"])
def test_what_is_written_is_read(variant, checkpoint, read, tmp_path):
    shutil.copytree(checkpoint(variant), tmp_path, dirs_exist_ok=True)
    stored = load_file(tmp_path / SINGLE_FILE)
    for layer in range(2):
        k_scales, v_scales = torch.tensor([0.5, 0.25]) * (layer + 1), torch.tensor([0.125, 1.0])
        for prefix, tensors in scale_tensors(layer, k_scales, v_scales).items():
            stored |= {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file(stored, tmp_path / SINGLE_FILE)
    scales, logs = read(tmp_path)
    assert scales.keys.tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert scales.values.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not logs


def test_the_scheme_is_one_that_our_own_reader_knows():
    from core.quant.compressed_tensors import read_config  # noqa: PLC0415  only this test needs it

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = {
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "kv_cache_scheme": dict(kv_scales.COMPRESSED_TENSORS_SCHEME),
    }
    scheme = read_config(config).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
