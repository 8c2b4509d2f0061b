"""The kit for quantizers catches the mistakes that are made in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings

from core.errors import CheckpointError
from core.interfaces import Axis, TensorSpec
from core.model.linear import PlainScheme, make_weight
from core.quant.linear import DequantizedLinear
from core.registry import QuantizerEntry
from core.sharding import Span, local_groups
from core.testing.linear_cases import LinearCase, Part, cut_steps
from core.testing.quantizer import QuantizerConformance

GROUP, PER_WORD = 12, 4
SKIPPED = "model.layers.1.mlp.down_proj"


def pack(codes):
    """Put four codes of 4 bits into an int32, first lowest."""
    shifts = torch.arange(PER_WORD) * 4
    return (codes.int().unflatten(-1, (-1, PER_WORD)) << shifts).sum(-1).int()


class ToyLinear(DequantizedLinear):
    """(code - zero) · scale, as plainly as can be; `bug` names one mistake to make."""

    def __init__(self, spec, bug):
        super().__init__(spec)
        self.bug, self.spec, out = bug, spec, spec.out_features
        spans = (
            (Span(0, spec.in_features),) if bug == "counts groups from the part" else spec.input_spans
        )
        self.groups = torch.tensor(local_groups(spans, GROUP))
        num_groups = local_groups(spec.input_spans, GROUP)[-1] + 1
        self.codes = make_weight((out, spec.in_features // PER_WORD), torch.int32, spec.device)
        self.zeros = make_weight((out, num_groups), torch.uint8, spec.device)
        self.scales = make_weight((out, num_groups), torch.float32, spec.device)
        if bug == "keeps a float copy":
            self.extra = make_weight((out, spec.in_features), spec.dtype, spec.device)

    def dequantize(self):
        shifts = torch.arange(PER_WORD) * 4
        if self.bug == "swaps nibbles":
            shifts = shifts[[1, 0, 3, 2]]
        codes = (self.codes[:, :, None] >> shifts & 15).flatten(1)
        if self.bug != "forgets zero points":
            codes = codes - self.zeros.int()[:, self.groups]
        scales = self.scales
        if self.bug == "rounds scales":
            scales = scales.to(torch.float8_e5m2).float()
        if self.bug == "one scale for all inputs":
            scales = scales[:, :1].expand_as(scales)
        return (codes * scales[:, self.groups]).to(self.dtype)

    def forward(self, x):
        if self.bug == "cannot do without rows":
            x = x / x.abs().max()
        if self.bug == "rounds by the largest of the step":
            scale = x.abs().max().nan_to_num(1) / 127 if x.numel() else 1
            x = (x / scale).round() * scale
        if self.bug == "changes its input":
            x += 1
        out = super().forward(x)
        if self.bug == "adds the bias to the first row":
            out[1:] -= 0 if self.bias is None else self.bias
        return out.double() if self.bug == "returns its own dtype" else out


class ToyScheme:
    def __init__(self, bug=""):
        self.bug = bug

    def make_linear(self, spec):
        if self.is_skipped(spec):
            return PlainScheme().make_linear(spec)
        return ToyLinear(spec, self.bug)

    def is_skipped(self, spec):
        return spec.name == SKIPPED and self.bug != "quantizes what is to be skipped"

    def tensors(self, spec, shard):
        plain = dict(PlainScheme().tensors(spec, shard))
        if self.is_skipped(spec):
            return plain
        del plain["weight"]
        size, groups = spec.shards[shard][1], spec.in_features // GROUP
        if spec.in_features % GROUP and self.bug != "accepts any size":
            where = "a layer" if self.bug == "does not say where" else spec.name
            raise CheckpointError(f"{where} has {spec.in_features} inputs, no multiple of {GROUP}")
        inputs, outputs = Axis("in", GROUP, shared=True), Axis("out")
        if self.bug == "takes groups for uncut":
            inputs = None
        if self.bug == "takes groups for whole inputs":
            inputs = Axis("in")
        if self.bug == "swaps the axes of scales":
            inputs, outputs = outputs, inputs
        group = TensorSpec((size, groups), torch.float32, (outputs, inputs))
        if self.bug == "forgets a dimension":
            group = replace(group, shape=(size,), axes=(outputs,))
        dtype = None if self.bug == "takes any floats for scales" else torch.float32
        codes = TensorSpec((size, spec.in_features // PER_WORD), torch.int32)
        tensors = {
            "codes": replace(codes, axes=(Axis("out"), Axis("in", PER_WORD))),
            "zeros": replace(group, dtype=torch.uint8),
            "scales": replace(group, dtype=dtype),
        }
        if self.bug == "does without zero points":
            tensors["zeros"] = replace(tensors["zeros"], optional=True)
        if self.bug == "misspells a name":
            tensors["scale"] = tensors.pop("scales")
        return tensors | plain

    def load(self, module, spec, shard, tensors):
        if self.is_skipped(spec):
            PlainScheme().load(module, spec, shard, tensors)
            return
        rows = spec.rows(shard)
        if self.bug == "loads all shards to the first rows":
            rows = slice(0, rows.stop - rows.start)
        if self.bug == "stacks shards as they come":
            start = getattr(module, "filled", 0)
            rows = slice(start, start + rows.stop - rows.start)
            module.filled = rows.stop
        if self.bug == "forgets the last row":
            rows = slice(rows.start, rows.stop - 1)
            tensors = {name: tensor[:-1] for name, tensor in tensors.items()}
        for name in ("codes", "zeros", "scales"):
            module.get_parameter(name)[rows].copy_(tensors[name])
        if module.bias is not None and self.bug != "forgets the bias":
            module.bias[rows].copy_(tensors["bias"])

    def finalize(self, module, spec):
        is_dummy = isinstance(module, ToyLinear) and bool((module.zeros > 15).any())
        if self.bug == "trusts zero points" and is_dummy:
            module.scales.fill_(torch.nan)
        if self.bug == "clears dummies" and is_dummy:
            module.scales.zero_()


class ToyKit(QuantizerConformance):
    in_step, out_step = GROUP, 3
    max_weight_error = 0.2
    skipped_layer = SKIPPED
    refused_sizes = ((GROUP + PER_WORD, 3),)
    bug = ""

    def make_scheme(self):
        return ToyScheme(self.bug)

    def quantize(self, spec, shard, weight, bias):
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
        codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        tensors = {"codes": pack(codes.flatten(1)), "zeros": zeros.byte(), "scales": scales}
        return tensors if bias is None else {**tensors, "bias": bias}


class TestToy(ToyKit):
    """A right quantizer that works in another way than the built-in ones passes as well."""

    dtypes = ("float32", "bfloat16", "float64", "float16")
    settings = settings(QuantizerConformance.settings, max_examples=10)

    def dequantize(self, spec, shard, tensors):
        codes = tensors["codes"][:, :, None] >> torch.arange(PER_WORD) * 4 & 15
        zeros, scales = (
            tensors[name].double().repeat_interleave(GROUP, 1) for name in ("zeros", "scales")
        )
        return (codes.flatten(1) - zeros) * scales


class Buggy(ToyKit):
    __test__ = False
    dtypes = ("float32",)
    settings = settings(
        QuantizerConformance.settings,
        max_examples=20,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
    )

    def __init__(self, bug=""):
        self.bug = bug

    def dequantize(self, spec, shard, tensors):
        return TestToy.dequantize(self, spec, shard, tensors)


TENSORS = "test_tensors_describe_what_is_stored"
AXES = "test_every_stored_dimension_can_be_cut"
ORDER = "test_shards_load_in_any_order"
NEAR = "test_weight_is_near_the_one_that_was_quantized"
EXACT = "test_weight_is_what_the_format_says"
PRODUCT = "test_output_is_the_product"
ROWS = "test_rows_do_not_depend_on_each_other"
PARTS = "test_parts_are_parts_of_the_whole"
DUMMY = "test_dummy_weights_are_usable"
REFUSED = "test_wrong_tensors_are_refused"
SKIPS = "test_skipped_layers_are_plain"
SIZES = "test_impossible_sizes_are_refused"

CAUGHT = [
    ("swaps nibbles", NEAR, "output feature"),
    ("swaps nibbles", EXACT, "weight of model.layers.0"),
    ("forgets zero points", NEAR, "output feature"),
    ("rounds scales", EXACT, "elements are wrong"),
    ("one scale for all inputs", NEAR, "output feature"),
    ("loads all shards to the first rows", ORDER, "not write all|gives another layer"),
    ("loads all shards to the first rows", NEAR, "output feature"),
    ("stacks shards as they come", ORDER, "gives another layer"),
    ("forgets the last row", ORDER, "not write all"),
    ("forgets the bias", PRODUCT, "output of the layer"),
    ("adds the bias to the first row", PRODUCT, "output of the layer"),
    ("adds the bias to the first row", ROWS, "row . alone"),
    ("returns its own dtype", PRODUCT, "output is torch.float64"),
    ("changes its input", PRODUCT, "changes its input"),
    ("rounds by the largest of the step", ROWS, "row . alone|rows beside"),
    ("counts groups from the part", PARTS, "weight of the part with inputs"),
    ("swaps the axes of scales", AXES, "indices, but Axis"),
    ("takes groups for whole inputs", AXES, "dimension 1 of zeros has"),
    ("takes groups for uncut", AXES, "has no axis"),
    ("forgets a dimension", TENSORS, "zeros has shape"),
    ("misspells a name", TENSORS, "holds scales, which tensors does not name"),
    ("trusts zero points", DUMMY, "not finite"),
    ("clears dummies", DUMMY, "same output everywhere"),
    ("does without zero points", REFUSED, "KeyError"),
    ("quantizes what is to be skipped", SKIPS, "is skipped, but"),
    ("accepts any size", SIZES, "is accepted"),
    ("does not say where", SIZES, "does not name model.layers.0.mlp.down_proj"),
]


@pytest.mark.parametrize(("bug", "law", "message"), CAUGHT)
def test_planted_bug_is_caught(bug, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(Buggy(bug), law)()


@pytest.mark.parametrize("law", sorted({law for _, law, _ in CAUGHT}))
def test_without_a_bug_the_same_examples_pass(law):
    getattr(Buggy(), law)()


def test_a_layer_that_cannot_do_without_rows_is_caught():
    with pytest.raises(RuntimeError):
        getattr(Buggy("cannot do without rows"), PRODUCT)()


def test_a_dtype_that_tensors_leaves_open_is_a_floating_one():
    getattr(Buggy("takes any floats for scales"), REFUSED)()


@pytest.mark.parametrize("bits", [None, 4.0])
def test_weight_bits_that_leave_something_out_are_caught(bits):
    kit = Buggy()
    kit.entry = QuantizerEntry(name="toy", factory=lambda plan: ToyScheme(), weight_bits=lambda _: bits)
    with pytest.raises(AssertionError, match="but weight_bits says"):
        kit.test_weight_bits_are_those_of_a_layer()
    # codes fill half of their words here, and a group has 40 bits of scale and zero point
    kit.entry = replace(kit.entry, weight_bits=lambda _: 8 + 40 / GROUP)
    kit.test_weight_bits_are_those_of_a_layer()
    kit.bug = "keeps a float copy"
    with pytest.raises(AssertionError, match="but weight_bits says"):
        kit.test_weight_bits_are_those_of_a_layer()


def test_methods_that_do_not_fit_the_protocol_are_caught():
    class NoShard(ToyScheme):
        def tensors(self, spec):
            return {}

    kit = Buggy()
    kit.make_scheme = NoShard
    with pytest.raises(AssertionError, match="tensors"):
        kit.test_fulfils_the_protocol()


# --- what the kit needs of its subclass --------------------------------------------------------------


def test_what_is_missing_is_named():
    kit = QuantizerConformance()
    with pytest.raises(NotImplementedError, match="entry"):
        kit.make_scheme()
    with pytest.raises(NotImplementedError, match="quantize"):
        kit.quantize(None, 0, None, None)


def test_laws_without_their_means_are_skipped():
    class Bare(ToyKit):
        skipped_layer, refused_sizes = None, ()

    for law in (EXACT, SKIPS, SIZES, "test_weight_bits_are_those_of_a_layer"):
        with pytest.raises(pytest.skip.Exception):
            getattr(Bare(), law)()


def test_only_dtypes_that_the_descriptor_serves_are_tried():
    def unsupported(wanted):
        return [] if wanted.dtype == "float64" else [f"no {wanted.dtype}"]

    kit, seen = Buggy(), []
    kit.entry = QuantizerEntry(name="toy", factory=ToyScheme, unsupported=unsupported)
    kit.dtypes = ("float32", "float64")
    kit.check(seen.append)
    assert {case.dtype for case in seen} == {"float64"}
    kit.dtypes = ("float32",)
    with pytest.raises(pytest.skip.Exception, match="no float32"):
        kit.check(seen.append)


def test_factory_gets_what_it_asks_of_a_plan():
    kit = Buggy()
    kit.quantization_config, kit.plugin_settings = {"quant_method": "toy"}, {"quant.toy": 3}
    kit.entry = QuantizerEntry(name="toy", factory=lambda plan: plan)
    plan = QuantizerConformance.make_scheme(kit)
    assert plan.quantization == {"quant_method": "toy"}
    assert plan.settings == {"quant.toy": 3}
    assert plan.model.hidden_size


# --- layers and parts --------------------------------------------------------------------------------


def test_rows_of_a_part_are_those_of_its_shards():
    part = Part(Span(0, 12), ((Span(0, 1), Span(4, 6)), (Span(2, 3),)), has_bias=True)
    case = LinearCase("float32", 24, (6, 3), True, 1, 0, (0, 1), part)
    assert case.part_rows() == [0, 4, 5, 8]
    local = case.local_spec()
    assert (local.in_features, local.out_features) == (12, 4)
    assert local.cut.outputs == part.outputs
    assert str(part) == "the part with inputs 0..11 and outputs 0..0+4..5, 2..2"


def test_cuts_fall_where_tensors_can_be_cut():
    spec = LinearCase("float32", 24, (6,), True, 1, 0).spec()
    assert cut_steps(ToyScheme(), spec) == (PER_WORD, 1)
    starts = set()
    kit = Buggy()
    kit.check(lambda case: starts.add(case.part.inputs.start), cut=True)
    assert {start % GROUP for start in starts} == {0, 4, 8}
