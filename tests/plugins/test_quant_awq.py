"""AWQ checkpoints: layout, config, layers and their parts, and whole models in the engine."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from core import LLM, SamplingParams
from core.errors import CheckpointError, PlanError
from core.interfaces import LinearSpec
from core.model.linear import PlainLinear
from core.model.weights import SINGLE_FILE
from core.registry import Requirements
from core.sharding import Cut, Span, covering
from core.testing.checkpoints import make_checkpoint, reference_logits
from core.testing.lone_linear import TINY_MODEL, LoneLinear
from plugins.quant import awq as plugin
from plugins.quant.awq.config import read_config
from plugins.quant.awq.layout import pack, unpack
from plugins.quant.awq.scheme import AwqLinear, AwqScheme

CPU = torch.device("cpu")
(ENTRY,) = plugin.core_register_quantizers()
CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
QKV = {"q_proj": 32, "k_proj": 8, "v_proj": 16}


def make_scheme(model=TINY_MODEL, **changes):
    return AwqScheme(read_config(CONFIG | changes), model)


def make_spec(name="self_attn.qkv_proj", shards=QKV, in_features=64, **changes):
    parent = f"model.layers.0.{name}".rpartition(".")[0]
    values = {
        "name": f"model.layers.0.{name}",
        "in_features": in_features,
        "shards": tuple((f"{parent}.{shard}", size) for shard, size in shards.items()),
        "bias": False,
        "dtype": torch.float32,
        "device": CPU,
        "role": "qkv",
    }
    return LinearSpec(**(values | changes))


def random_shard(in_features, out_features, *, group_size=32, seed=0, dtype=torch.float16):
    """Stored tensors over all codes, and the weight they stand for: [out, in] float64."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = in_features // group_size
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 16, (num_groups, out_features), generator=generator)
    scales = (torch.rand(num_groups, out_features, generator=generator) * 0.02 + 1e-3).to(dtype)
    stored = {"qweight": loop_pack(codes), "qzeros": loop_pack(zeros), "scales": scales}
    weight = (codes - zeros.repeat_interleave(group_size, 0)).double()
    return stored, (weight * scales.double().repeat_interleave(group_size, 0)).T


def loop_pack(codes):
    """Pack [K, N] one code at a time, in Python's integers."""
    nibble_of = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    rows = []
    for row in codes.tolist():
        words = [0] * (len(row) // 8)
        for index, code in enumerate(row):
            words[index // 8] += code * 16 ** nibble_of[index % 8]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def fill(scheme, spec, shards):
    """Load a whole layer from a file, as the engine does."""
    layer = LoneLinear(scheme, spec)
    layer.load(
        {
            f"{prefix}.{suffix}": tensor
            for (prefix, _), tensors in zip(spec.shards, shards, strict=True)
            for suffix, tensor in tensors.items()
        }
    )
    return layer.linear


# --- layout ----------------------------------------------------------------------------------------


def test_a_word_by_hand():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 0, 0, 0, 0, 0, 0, 8]])
    words = torch.tensor([[0x75316420], [0x8000000F - 2**32]], dtype=torch.int32)
    assert torch.equal(pack(codes), words)
    assert torch.equal(unpack(words), codes.int())


codes_of_words = st.lists(st.lists(st.integers(0, 15), min_size=8, max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(words=codes_of_words)
def test_packing_is_undone_and_equals_the_loop(words):
    codes = torch.tensor([list(itertools.chain(*words))])
    assert torch.equal(pack(codes), loop_pack(codes))
    assert torch.equal(unpack(pack(codes)), codes.int())


def test_every_code_at_every_place():
    codes = torch.arange(16).repeat(8).view(8, 16).T.contiguous()
    assert torch.equal(unpack(pack(codes)), codes.int())


def test_other_tools_read_the_same_codes():
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    codes = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(1))
    converter = converters.AutoAWQConverter
    raw, _ = converter.unpack_awq(pack(codes), None, 4)
    ordered, _ = converter.reverse_awq_order(raw, None, 4)
    assert torch.equal(ordered & 15, codes.to(torch.int8))


def test_parts_of_words_are_refused():
    with pytest.raises(ValueError, match="12 codes"):
        pack(torch.zeros(1, 12))


# --- config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "group_size"),
    [
        ({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}, 64),
        ({"bits": 4, "group_size": -1, "format": "gemm", "backend": "autoawq"}, -1),
        ({"bits": 4, "group_size": 16, "checkpoint_format": "gemm", "dynamic": {}}, 16),
        ({"quant_method": "awq"}, 128),
    ],
)
def test_spellings(config, group_size):
    assert read_config(config).group_size == group_size
    assert ENTRY.unsupported(requirements(config)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 8}, ["bits 8"]),
        ({"bits": "4"}, ["bits '4'"]),
        ({"group_size": 100}, ["group_size 100"]),
        ({"version": "gemv"}, ["version 'gemv' is not supported, only 'gemm'"]),
        ({"version": "gemv_fast", "bits": 3}, ["bits 3", "version 'gemv_fast'"]),
        ({"backend": "llm-awq"}, ["backend 'llm-awq'"]),
        ({"dynamic": {"-:.*down.*": {}}}, ["dynamic"]),
        ({"modules_to_not_convert": "visual"}, ["modules_to_not_convert is 'visual'"]),
    ],
)
def test_every_objection_is_named(change, named):
    reasons = ENTRY.unsupported(requirements(CONFIG | change))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)
    with pytest.raises(CheckpointError, match=named[-1].split()[0]):
        read_config(CONFIG | change)


@pytest.mark.parametrize(
    ("group_size", "bits", "step"), [(32, 4.625, 32), (128, 4.15625, 128), (-1, 4, 8)]
)
def test_sizes_for_the_plan(group_size, bits, step):
    asked = requirements(CONFIG | {"group_size": group_size})
    assert ENTRY.weight_bits(asked) == bits
    assert ENTRY.cut_step(asked) == step


def requirements(config):
    return Requirements(device="cpu", dtype="float32", quantization="awq", quantization_config=config)


def test_registering_does_not_import_torch():
    code = (
        "import sys; from core.registry import Requirements; from plugins.quant import awq; "
        "(entry,) = awq.core_register_quantizers(); "
        "entry.unsupported(Requirements(device='cpu', dtype='float32')); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours


# --- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_is_exact_but_for_one_rounding(group_size, dtype):
    spec = make_spec(in_features=192, dtype=dtype)
    size = 192 if group_size == -1 else group_size
    shards = [random_shard(192, n, group_size=size, seed=n) for n in QKV.values()]
    layer = fill(make_scheme(group_size=group_size), spec, [stored for stored, _ in shards])
    expected = torch.cat([weight for _, weight in shards])
    assert torch.equal(layer.dequantize(), expected.to(dtype))
    assert layer.scales.dtype == torch.float16


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes_keep_their_value(scale_dtype):
    shards = [random_shard(64, n, seed=n, dtype=scale_dtype) for n in QKV.values()]
    for stored, _ in shards:
        stored["scales"][0, 0] = 2.0**-30  # nothing to float16
    layer = fill(make_scheme(), make_spec(), [stored for stored, _ in shards])
    assert torch.equal(layer.scales, torch.cat([s["scales"].float() for s, _ in shards], 1))


def test_the_output_is_that_of_the_weight():
    stored, weight = random_shard(96, 40)
    spec = make_spec("mlp.down_proj", {"down_proj": 40}, 96, bias=True, role="down")
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1))
    layer = fill(make_scheme(), spec, [{**stored, "bias": bias}])
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ weight.T + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_stored", [True, False])
def test_symmetric_files_have_a_zero_point_of_8(is_stored):
    stored, _ = random_shard(64, 16)
    codes = unpack(stored["qweight"])
    if is_stored:
        stored["qzeros"] = loop_pack(torch.full((2, 16), 8))
    else:
        del stored["qzeros"]
    spec = make_spec("mlp.down_proj", {"down_proj": 16}, role="down")
    layer = fill(make_scheme(zero_point=False), spec, [stored])
    expected = (codes - 8) * stored["scales"].float().repeat_interleave(32, 0)
    assert torch.equal(layer.dequantize(), expected.T)


def test_zero_points_that_the_config_denies_are_refused():
    stored, _ = random_shard(64, 16)
    spec = make_spec("mlp.down_proj", {"down_proj": 16}, role="down")
    with pytest.raises(CheckpointError, match=r"down_proj\.qzeros .* zero_point false"):
        fill(make_scheme(zero_point=False), spec, [stored])
    del stored["qzeros"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: .*down_proj\.qzeros"):
        fill(make_scheme(), spec, [stored])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(value):
    stored, _ = random_shard(64, 16)
    stored["scales"][1, 3] = value
    spec = make_spec("mlp.down_proj", {"down_proj": 16}, role="down")
    with pytest.raises(CheckpointError, match=r"down_proj\.scales holds a number that is not finite"):
        fill(make_scheme(), spec, [stored])


@pytest.mark.parametrize(
    ("shards", "in_features", "message"),
    [
        ({"q_proj": 16, "k_proj": 12}, 64, r"k_proj has 12 output features, but AWQ packs 8"),
        ({"q_proj": 16}, 80, r"qkv_proj has 80 input features, which group_size 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shards, in_features, message):
    spec = make_spec(shards=shards, in_features=in_features)
    with pytest.raises(CheckpointError, match=message):
        make_scheme().make_linear(spec)
    with pytest.raises(CheckpointError, match=message):
        make_scheme().tensors(spec, len(shards) - 1)


def test_a_rank_with_half_a_word_is_told_what_to_change():
    spec = make_spec("mlp.down_proj", {"down_proj": 4})
    cut = Cut(Span(0, 64), ((Span(0, 4),),))
    with pytest.raises(CheckpointError, match=r"a rank's part of .* --tensor-parallel-size"):
        make_scheme().make_linear(replace(spec, cut=cut))


# --- which layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skipped", "name", "is_skipped"),
    [
        (None, "mlp.down_proj", False),
        (["mlp"], "mlp.down_proj", True),
        (["mlp"], "self_attn.o_proj", False),
        (["layers.0"], "self_attn.o_proj", True),
        (["model.layers.0.self_attn.o_proj"], "self_attn.o_proj", True),
        (["lm_head", "visual"], "mlp.down_proj", False),
    ],
)
def test_skipped_layers_are_plain(skipped, name, is_skipped):
    spec = make_spec(name, {name.rpartition(".")[2]: 16})
    scheme = make_scheme(modules_to_not_convert=skipped)
    assert isinstance(scheme.make_linear(spec), PlainLinear if is_skipped else AwqLinear)
    assert set(scheme.tensors(spec, 0)) == (
        {"weight"} if is_skipped else {"qweight", "qzeros", "scales"}
    )


def test_the_parts_of_a_layer_must_be_skipped_together():
    with pytest.raises(CheckpointError, match="must agree on whether they are skipped"):
        make_scheme(modules_to_not_convert=["k_proj"]).make_linear(make_spec())


def test_names_that_the_family_spells_otherwise():
    model = replace(TINY_MODEL, renames=(("language_model.model.", "model."),))
    name = "language_model.model.layers.0.mlp"
    scheme = make_scheme(model, modules_to_not_convert=[name])
    spec = make_spec("mlp.down_proj", {"down_proj": 16})
    assert isinstance(scheme.make_linear(spec), PlainLinear)


@pytest.mark.parametrize("is_quantized", [True, False])
def test_the_head_is_plain_unless_the_config_says_otherwise(is_quantized):
    changes = {"lm_head": True} if is_quantized else {}
    spec = make_spec(role="lm_head", name="lm_head", shards={"lm_head": 64})
    kind = AwqLinear if is_quantized else PlainLinear
    assert isinstance(make_scheme(**changes).make_linear(spec), kind)


# --- parts of layers -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), group_size=st.sampled_from([16, 32, -1]))
def test_a_part_is_a_part_of_the_weight(data, group_size):
    """Inputs are cut anywhere, also inside a group; outputs at words, and in several spans."""
    scheme = make_scheme(group_size=group_size)
    whole = make_spec("mlp.up_proj", {"up_proj": 64}, 96)
    size = 96 if group_size == -1 else group_size
    stored, weight = random_shard(96, 64, group_size=size, seed=3)
    bounds = sorted(data.draw(st.sets(st.integers(0, 96), min_size=2, max_size=2)))
    words = sorted(data.draw(st.sets(st.integers(0, 8), min_size=4, max_size=4)))
    inputs, outputs = Span(*bounds), (Span(*words[:2]).scaled(8), Span(*words[2:]).scaled(8))
    num_outputs = sum(span.size for span in outputs)
    part = replace(
        whole,
        in_features=inputs.size,
        shards=((whole.shards[0][0], num_outputs),),
        cut=Cut(inputs, (outputs,)),
    )
    module = scheme.make_linear(part)
    scheme.load(module, part, 0, cut_tensors(scheme.tensors(whole, 0), stored, inputs, outputs))
    expected = torch.cat([weight[slice(*span)] for span in outputs])[:, slice(*inputs)]
    assert torch.equal(module.dequantize(), expected.float())


def cut_tensors(specs, stored, inputs, outputs):
    spans = {"in": (inputs,), "out": outputs}
    parts = {}
    for suffix, spec in specs.items():
        parts[suffix] = stored[suffix]
        for dim, axis in enumerate(spec.axes):
            indices = [i for span in covering(spans[axis.along], axis.step) for i in range(*span)]
            parts[suffix] = parts[suffix].index_select(dim, torch.tensor(indices))
    return parts


# --- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint("llama3", tmp_path_factory.mktemp("plain"))


def quantize_by_rounding(source, folder, *, skipped=(), config=CONFIG):
    """Write an AWQ checkpoint, and beside it a plain one of the weights that it stands for."""
    quantized, dequantized = folder / "awq", folder / "plain"
    for path in (quantized, dequantized):
        shutil.copytree(source, path)
    tensors, weights = load_file(source / SINGLE_FILE), load_file(source / SINGLE_FILE)
    for name in list(tensors):
        prefix = name.removesuffix(".weight")
        if "_proj" not in name or any(part in name for part in skipped):
            continue
        groups = tensors.pop(name).T.unflatten(0, (-1, 32))
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
        tensors[f"{prefix}.qweight"] = loop_pack(codes.flatten(0, 1).long())
        tensors[f"{prefix}.qzeros"] = loop_pack(zeros.long())
        tensors[f"{prefix}.scales"] = scales
        weights[name] = (
            ((codes - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1).T.contiguous()
        )
    save_file(tensors, quantized / SINGLE_FILE)
    save_file(weights, dequantized / SINGLE_FILE)
    settings = json.loads((quantized / "config.json").read_text())
    settings["quantization_config"] = config | {"modules_to_not_convert": list(skipped) or None}
    (quantized / "config.json").write_text(json.dumps(settings))
    return quantized, dequantized


def open_engine(path, **changes):
    usual = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "num_kv_blocks": 16}
    return LLM(str(path), plugins=["quant.awq"], **(usual | changes))


@pytest.mark.parametrize("skipped", [(), ("layers.1", "down_proj")])
def test_a_model_computes_what_its_dequantized_weights_do(plain, tmp_path, skipped):
    quantized, dequantized = quantize_by_rounding(plain, tmp_path, skipped=skipped)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    expected = reference_logits(dequantized, prompt).log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    with open_engine(quantized) as llm:
        (output,) = llm.generate([prompt], params)
    for position, token in enumerate(prompt[1:]):
        found = output.prompt_logprobs[position + 1][token].logprob
        assert found == pytest.approx(expected[position, token].item(), abs=2e-5)


def test_the_plan_says_what_is_wrong_before_weights_are_read(plain, tmp_path):
    quantized, _ = quantize_by_rounding(plain, tmp_path, config=CONFIG | {"version": "gemv", "bits": 3})
    with pytest.raises(PlanError) as caught:
        open_engine(quantized)
    assert [o.split()[:2] for o in caught.value.objections] == [
        ["quant.awq:", "bits"],
        ["quant.awq:", "version"],
    ]


def test_files_of_another_group_size_are_refused(plain, tmp_path):
    quantized, _ = quantize_by_rounding(plain, tmp_path, config=CONFIG | {"group_size": 16})
    with pytest.raises(
        CheckpointError, match=r"qzeros has shape \[2, 8\], but the config asks for \[4, 8\]"
    ):
        open_engine(quantized)


@pytest.mark.parametrize("group_size", [32, -1])
def test_dummy_weights_are_sane(plain, tmp_path, group_size):
    config = CONFIG | {"group_size": group_size}
    quantized, _ = quantize_by_rounding(plain, tmp_path, config=config)
    with open_engine(quantized, load_format="dummy") as llm:
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
        (output,) = llm.generate([[1, 2, 3]], params)
    logprobs = [
        entry[token].logprob
        for entry, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    ]
    assert all(-20 < value <= 0 for value in logprobs)


def test_layers_are_modules_without_gradients():
    layer = make_scheme().make_linear(make_spec(bias=True))
    assert isinstance(layer, nn.Module)
    assert {name for name, _ in layer.named_buffers()} == {"qweight", "qzeros", "scales"}
    assert not any(p.requires_grad for p in layer.parameters())
