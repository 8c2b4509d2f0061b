"""The kit for attention backends catches the mistakes that are made in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, settings

from core.interfaces import AttentionSpec
from core.registry import AttentionEntry
from core.testing.attention import AttentionConformance, dense_attention, make_batch


class NaiveAttention:
    """Row by row and as plainly as can be; `bug` names one mistake to make."""

    def __init__(self, bug=""):
        self.bug = bug

    def allocate_cache(self, spec):
        if self.bug == "keeps the old cache" and hasattr(self, "cache"):
            return
        dtype = torch.bfloat16 if self.bug == "rounds what it stores" else spec.dtype
        self.block_size = spec.block_size
        self.cache = torch.zeros(
            (spec.num_layers, 2, spec.num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim),
            dtype=dtype,
            device=spec.device,
        )
        self.scales = torch.ones(2, spec.num_layers, spec.num_kv_heads)

    def set_kv_scales(self, k_scales, v_scales):
        if self.bug == "forgets the scales of values":
            v_scales = torch.ones_like(v_scales)
        if self.bug == "uses one scale for all heads":
            k_scales = k_scales.amax(-1, keepdim=True).expand_as(k_scales)
        self.scales = torch.stack((k_scales, v_scales))
        if self.bug == "uses the first layer's scales":
            self.scales = self.scales[:, :1].expand_as(self.scales)

    def cache_bytes_per_block(self, spec):
        layers = 1 if self.bug == "counts one layer" else spec.num_layers
        size = spec.num_kv_heads * spec.block_size * spec.head_dim * spec.dtype.itemsize
        return layers * 2 * size * (spec.num_blocks if self.bug == "counts all blocks" else 1)

    def prepare(self, batch):
        self.first_window = ()
        return batch

    def forward(self, q, k, v, spec, batch):
        cache = self.cache[0 if self.bug == "one cache for all layers" else spec.layer]
        scales = self.scales[:, spec.layer]
        self.write(cache, *self.narrow(k, v, scales, cache.dtype), batch)
        if not self.first_window:
            self.first_window = (spec.window,)
        out = torch.empty_like(q)
        done = 0
        for row, count in enumerate(batch.counts):
            part = slice(done, done + count)
            if self.bug != "skips the last row" or row < len(batch.counts) - 1 or row == 0:
                self.own = k[part], v[part]
                out[part] = self.attend(q[part], cache, spec, batch, row)
            done += count
        return out.double() if self.bug == "returns its own dtype" else out

    def narrow(self, k, v, scales, dtype):
        limit = torch.finfo(dtype).max
        for x, scale in zip((k, v), scales, strict=True):
            wide = x.double() / scale[:, None]
            if self.bug == "rounds towards zero" and dtype.itemsize == 1:
                wide = wide * (1 - 2.0**-5)
            is_too_large = wide.abs() > limit
            wide = wide.clamp(-limit, limit)
            if self.bug == "overflows instead of saturating":
                wide = wide.masked_fill(is_too_large, torch.nan)
            yield wide.to(dtype)

    def write(self, cache, k, v, batch):
        slots = batch.slots
        if self.bug == "writes one slot further":
            slots = (slots + 1) % cache.shape[1]
        if self.bug == "writes a block too much":
            cache[:, (slots + self.block_size) % cache.shape[1]] = 0
        if self.bug == "writes only the first token":
            slots, k, v = (x[batch.query_starts[:-1].long()] for x in (slots, k, v))
        cache[0, slots] = k.to(cache.dtype)
        cache[1, slots] = v.to(cache.dtype)

    def attend(self, q, cache, spec, batch, row):
        end = batch.starts[row] + batch.counts[row]
        num_blocks = -(-end // self.block_size)
        reads = end
        if self.bug == "reads a padded block":
            reads = (num_blocks + 1) * self.block_size
        if self.bug == "weighs unwritten values with zero":
            reads = num_blocks * self.block_size
        positions = torch.arange(reads)
        table = batch.block_tables[0 if self.bug == "reads the first row's blocks" else row].long()
        slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
        k, v = cache[:, slots].double() * self.scales[:, spec.layer].double()[:, None, :, None]
        if self.bug == "sees its own step unrounded":
            before = slice(batch.starts[row])
            k, v = (torch.cat((x[before], y)) for x, y in zip((k, v), self.own, strict=True))
        heads = torch.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
        if self.bug == "maps heads in turn":
            heads = torch.arange(spec.num_heads) % spec.num_kv_heads
        scores = torch.einsum("qhd,khd->hqk", q.double(), k[:, heads])
        scores = self.shape(scores, spec, q)
        scores = scores.masked_fill(self.hidden(positions, spec, batch, row), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:, heads]).to(q.dtype)

    def shape(self, scores, spec, q):
        if self.bug != "forgets the scale":
            scores = scores * (
                q.shape[-1] ** -0.5 if self.bug == "uses the usual scale" else spec.scale
            )
        if spec.softcap is not None and self.bug != "forgets the softcap":
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        return scores

    def hidden(self, positions, spec, batch, row):
        start = 0 if self.bug == "masks a chunk as if it were first" else batch.starts[row]
        queries = torch.arange(start, start + batch.counts[row])[:, None]
        window = spec.window
        if self.bug == "uses the first layer's window":
            (window,) = self.first_window
        slack = {"sees the next token": 1, "reads a padded block": positions.numel()}.get(self.bug, 0)
        hidden = positions > queries + slack
        if window is not None:
            window += {"window too wide": 1, "window too narrow": -1}.get(self.bug, 0)
            hidden = hidden | (positions <= queries - max(window, 1))
        return hidden


QUICK = settings(
    AttentionConformance.settings,
    max_examples=15,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
)


class TestNaiveAttention(AttentionConformance):
    """A right backend that works in another way passes as well."""

    dtypes = ("float32", "float64", "bfloat16")
    settings = settings(AttentionConformance.settings, max_examples=5)

    def make_backend(self):
        return NaiveAttention()


class Buggy(AttentionConformance):
    __test__ = False
    dtypes = ("float32",)
    settings = QUICK

    def __init__(self, bug):
        self.bug = bug

    def make_backend(self):
        return NaiveAttention(self.bug)


MIXED = "test_mixed_steps_match_dense_attention"
DECODES = "test_decodes_match_dense_attention"
SPLITS = "test_any_split_into_steps_agrees"
OTHERS = "test_leaves_blocks_of_others_alone"
ALONE = "test_rows_do_not_depend_on_each_other"
EXACT = "test_keeps_exactly_what_was_written"
BYTES = "test_bytes_per_block_count_all_layers"
ANEW = "test_cache_can_be_allocated_anew"
PREFIX = "test_prefix_of_another_row_is_as_good_as_its_own"
NARROW = "test_narrow_cache_matches_dense_attention"
NARROW_SPLITS = "test_narrow_cache_agrees_on_any_split"
NARROW_PREFIX = "test_narrow_cache_lends_prefixes"
SATURATES = "test_quantized_cache_saturates"

CAUGHT = [
    ("sees the next token", MIXED),
    ("sees the next token", SPLITS),
    ("window too wide", MIXED),
    ("window too wide", DECODES),
    ("window too narrow", MIXED),
    ("uses the first layer's window", MIXED),
    ("forgets the softcap", MIXED),
    ("forgets the scale", MIXED),
    ("uses the usual scale", MIXED),
    ("maps heads in turn", MIXED),
    ("maps heads in turn", EXACT),
    ("writes one slot further", MIXED),
    ("writes a block too much", OTHERS),
    ("writes only the first token", MIXED),
    ("one cache for all layers", MIXED),
    ("rounds what it stores", EXACT),
    ("reads a padded block", DECODES),
    ("reads the first row's blocks", MIXED),
    ("reads the first row's blocks", ALONE),
    ("weighs unwritten values with zero", DECODES),
    ("weighs unwritten values with zero", MIXED),
    ("masks a chunk as if it were first", SPLITS),
    ("masks a chunk as if it were first", PREFIX),
    ("skips the last row", MIXED),
    ("returns its own dtype", MIXED),
    ("forgets the scales of values", NARROW),
    ("uses one scale for all heads", NARROW),
    ("uses the first layer's scales", NARROW),
    ("rounds towards zero", NARROW),
    ("sees its own step unrounded", NARROW),
    ("sees its own step unrounded", NARROW_SPLITS),
    ("sees its own step unrounded", NARROW_PREFIX),
    ("overflows instead of saturating", SATURATES),
    ("counts one layer", BYTES),
    ("counts all blocks", BYTES),
]


@pytest.mark.parametrize(("bug", "law"), CAUGHT)
def test_planted_bug_is_caught(bug, law):
    with pytest.raises(AssertionError):
        getattr(Buggy(bug), law)()


@pytest.mark.parametrize("law", sorted({law for _, law in CAUGHT} | {ANEW}))
def test_without_a_bug_the_same_examples_pass(law):
    getattr(Buggy(""), law)()


def test_cache_that_is_allocated_only_once_is_caught():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        getattr(Buggy("keeps the old cache"), ANEW)()


def test_methods_that_do_not_fit_the_protocol_are_caught():
    class NoMeta(NaiveAttention):
        def forward(self, q, k, v, spec):
            return q

    kit = Buggy("")
    kit.make_backend = NoMeta
    with pytest.raises(AssertionError, match="forward"):
        kit.test_fulfils_the_protocol()


def test_fp8_without_a_way_to_set_scales_is_caught():
    class NoScales(NaiveAttention):
        set_kv_scales = None

    kit = Buggy("")
    kit.make_backend = NoScales
    kit.kv_cache_dtypes = ("fp8",)
    with pytest.raises(
        AssertionError, match="does not refuse fp8, but method 'set_kv_scales' is missing"
    ):
        kit.test_narrow_cache_matches_dense_attention()


# --- capabilities ----------------------------------------------------------------------------------


def kit_of(unsupported, **fields):
    class Limited(Buggy):
        entry = AttentionEntry(
            name="x", factory=lambda plan: NaiveAttention(), unsupported=unsupported, **fields
        )

    return Limited("")


def refuses_much(wanted):
    reasons = []
    if wanted.dtype == "float64":
        reasons.append("no float64")
    if wanted.has_window:
        reasons.append("no windows")
    if wanted.has_softcap:
        reasons.append("no softcap")
    if wanted.head_dims - {64}:
        reasons.append("head dimensions other than 64")
    if wanted.num_heads > 4 * wanted.num_kv_heads:
        reasons.append("groups of more than 4 heads")
    return reasons


def test_only_what_the_descriptor_serves_is_tried():
    seen = []
    kit = kit_of(refuses_much, block_sizes=(32, 64), default_block_size=32)
    kit.dtypes = ("float32", "float64")
    kit.check(seen.append)
    assert seen
    assert {case.dtype for case in seen} == {"float32"}
    assert {case.block_size for case in seen} == {32, 64}
    assert {case.head_dim for case in seen} == {64}
    assert {case.window for case in seen} == {case.softcap for case in seen} == {None}
    assert max(case.group for case in seen) <= 4


def test_a_device_that_is_not_served_is_skipped():
    kit = kit_of(lambda wanted: ["needs a vector unit"])
    with pytest.raises(pytest.skip.Exception, match="needs a vector unit"):
        kit.test_mixed_steps_match_dense_attention()


@pytest.mark.parametrize("law", [NARROW, NARROW_SPLITS, NARROW_PREFIX, SATURATES])
def test_narrow_caches_that_are_not_served_are_skipped(law):
    kit = kit_of(lambda wanted: ["only auto"] if wanted.kv_cache_dtype != "auto" else [])
    with pytest.raises(pytest.skip.Exception, match="only auto"):
        getattr(kit, law)()


def test_default_block_size_must_be_among_the_supported():
    with pytest.raises(AssertionError):
        kit_of(lambda wanted: [], block_sizes=(32,)).test_default_block_size_is_supported()


def test_kit_without_a_backend_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="entry"):
        AttentionConformance().make_backend()


def test_factory_gets_the_plan():
    plans = []
    kit = kit_of(lambda wanted: [])
    kit.entry = AttentionEntry(name="x", factory=plans.append)
    kit.plan = object()
    AttentionConformance.make_backend(kit)
    assert plans == [kit.plan]


# --- the oracle and the batches --------------------------------------------------------------------


def test_oracle_agrees_with_torch():
    q, k, v = torch.randn(5, 6, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=mask,
        scale=0.7,
        enable_gqa=True,
    )
    actual = dense_attention(q, k, v, AttentionSpec(0, 6, 2, 8, 0.7), 7)
    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_oracle_with_a_window_of_one_returns_the_values():
    q, k, v = torch.randn(4, 2, 8), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    actual = dense_attention(q, k, v, AttentionSpec(0, 2, 1, 8, 1.0, window=1), 5)
    torch.testing.assert_close(actual, v[5:].double().expand(4, 2, 8))


def test_oracle_with_a_tiny_softcap_averages():
    q, k, v = torch.randn(1, 1, 8), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    actual = dense_attention(q, k, v, AttentionSpec(0, 1, 1, 8, 1.0, softcap=1e-12), 8)
    torch.testing.assert_close(actual, v.double().mean(0, keepdim=True))


def test_batch_places_tokens_in_their_blocks():
    batch = make_batch([5, 0], [1, 3], [[4, 2], [7]], 4, num_padding=1)
    assert batch.slots.tolist() == [2 * 4 + 1, 28, 29, 30]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.block_tables.tolist() == [[4, 2, 0], [7, 0, 0]]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.seq_lens.tolist() == [6, 3]
    assert (batch.num_tokens, batch.num_rows, batch.num_decodes) == (4, 2, 1)


@pytest.mark.parametrize(
    ("starts", "counts", "tables", "message"),
    [([0, 5], [2, 1], [[1], [2, 3]], "come first"), ([4], [1], [[1]], "do not hold 5 positions")],
)
def test_impossible_batches_are_refused(starts, counts, tables, message):
    with pytest.raises(ValueError, match=message):
        make_batch(starts, counts, tables, 4)
