from __future__ import annotations

import importlib.util
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from kernel_compiler import (
    compiling_for,
    disassemble,
    matrices_in_flight,
    most_shared_bytes,
    names_of,
)
from triton_interpreter import run_interpreted

from core.interfaces import AttentionSpec, KVCacheSpec
from core.registry import Requirements
from core.testing.attention import AttentionConformance, make_batch
from plugins.attention import triton as plugin
from plugins.attention.triton import backend
from plugins.attention.triton.tuning import RESERVED_BYTES, Card, choose_tuning, tune_ring

(ENTRY,) = plugin.core_register_attention()
INTERPRETED = Path(__file__).with_name("attention_triton_interpreted.py")


@pytest.mark.parametrize("part", ["narrow", "Conformance and not narrow", "not Conformance"])
def test_in_the_interpreter(part):
    """A process of its own: whether Triton interprets is decided when it is imported."""
    part = part.replace("Conformance", "TestTritonAttention")
    run_interpreted(INTERPRETED, "-k", part)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnTheDevice(AttentionConformance):
    entry = ENTRY
    device = "cuda"
    dtypes = ("bfloat16",)
    head_dims = (64, 80, 128)
    block_sizes = (64, 16)
    settings = settings(AttentionConformance.settings, max_examples=6)

    def cases(self, **fixed):
        """Few shapes, as each is compiled for seconds; others are for the interpreter."""
        few = {
            "num_kv_heads": st.just(2),
            "group": st.sampled_from([1, 4, 7]),
            "softcap": st.sampled_from([None, 20.0]),
        }
        return super().cases(**(few | fixed))


# --- what can be served ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, []),
        ({"head_dims": frozenset({64, 80, 128, 256}), "block_size": 16, "has_window": True}, []),
        ({"num_heads": 64, "num_kv_heads": 4, "has_softcap": True}, []),
        ({"kv_cache_dtype": "bfloat16"}, []),
        ({"kv_cache_dtype": "fp8"}, []),
        (
            {"device": "cpu", "dtype": "float64"},
            ["device 'cpu' is not 'cuda'", "dtype 'float64' is none"],
        ),
        ({"kv_cache_dtype": "float16"}, ["kv_cache_dtype 'float16' is none of auto, bfloat16, fp8"]),
        (
            {"head_dims": frozenset({32, 72, 512, 128})},
            ["head_dim 32 ", "head_dim 72 ", "head_dim 512 "],
        ),
        ({"num_heads": 71, "num_kv_heads": 1}, ["71 query heads for each key-value head"]),
        ({"block_size": 8}, ["block_size 8 is none of 16, 32, 64, 128"]),
    ],
)
def test_names_everything_that_it_cannot_serve(wanted, named):
    reasons = ENTRY.unsupported(Requirements(**({"device": "cuda", "dtype": "bfloat16"} | wanted)))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)


def test_registering_imports_neither_torch_nor_triton():
    code = (
        "import sys; from plugins.attention import triton as plugin; "
        "plugin.core_register_attention(); sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours


# --- sizes -----------------------------------------------------------------------------------------

H200 = Card(num_sms=132, capability=(9, 0), shared_bytes=227 << 10)
A100 = Card(num_sms=108, capability=(8, 0), shared_bytes=163 << 10)
RTX_3090 = Card(num_sms=82, capability=(8, 6), shared_bytes=99 << 10)
ADA = Card(num_sms=128, capability=(8, 9), shared_bytes=99 << 10)
B200 = Card(num_sms=148, capability=(10, 0), shared_bytes=227 << 10)
RTX_5090 = Card(num_sms=170, capability=(12, 0), shared_bytes=99 << 10)


def test_says_how_to_install_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (reason,) = ENTRY.unsupported(Requirements(device="cuda", dtype="bfloat16"))
    assert reason == "triton is not installed; pip install cythera[cuda]"


@pytest.mark.parametrize("card", [H200, A100, ADA, RTX_5090], ids=["H200", "A100", "Ada", "5090"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("block_size", plugin.BLOCK_SIZES)
def test_tiles_fit_into_shared_memory(card, head_dim, itemsize, block_size):
    tuning = choose_tuning(card, head_dim, block_size, itemsize)
    for decode in (tuning.decode, *(few for _, few in tuning.decode_few)):
        per_sm = decode.num_ctas // card.num_sms
        stage = 2 * head_dim * itemsize * decode.block_n
        assert per_sm >= 1
        assert per_sm * (decode.num_stages - 1) * stage <= card.shared_bytes
    prefill = tuning.prefill
    tile = 2 * head_dim * itemsize * prefill.block_n
    queries = prefill.block_m * head_dim * max(itemsize, 2)
    assert queries + prefill.num_stages * tile <= card.shared_bytes
    assert not prefill.has_boxes or (card.has_boxes and prefill.block_n <= block_size)


def test_fewer_rows_have_tunings_of_their_own():
    tuning = choose_tuning(H200, 128, 64, 2)
    limits = [most for most, _ in tuning.decode_few]
    assert limits == sorted(set(limits))
    for most, few in tuning.decode_few:
        assert tuning.decode_for(most) is few
        assert tuning.decode_for(most + 1) is not few
    assert tuning.decode_for(10**6) is tuning.decode
    assert all(tuning.decode_for(n).num_ctas <= tuning.most_ctas for n in range(1, 300))


def test_cards_lack_what_is_newer_than_they():
    assert (H200.has_fp8, H200.has_pdl, H200.has_boxes) == (True, True, True)
    assert (ADA.has_fp8, ADA.has_pdl, ADA.has_boxes) == (True, False, False)
    assert not replace(A100, capability=(8, 6)).has_fp8


# --- kernels for cards that are not here -----------------------------------------------------------

FEW_DECODES = ([30], [1])
MORE_DECODES = ([30] * 20, [1] * 20)
PROMPT = ([0], [40])
MIXED = ([5, 0], [1, 40])


def compile_steps(
    card, *steps, dtype=torch.bfloat16, cache_dtype=None, block_size=64, heads=(8, 2), dim=128, **layer
):
    """Compile all kernels of some steps for a card."""
    num_heads, num_kv_heads = heads
    cache = KVCacheSpec(1, 10, block_size, num_kv_heads, dim, cache_dtype or dtype, torch.device("cpu"))
    cos = torch.zeros(64, dim // 2, dtype=dtype)
    spec = AttentionSpec(0, num_heads, num_kv_heads, dim, dim**-0.5, **layer)
    with pytest.MonkeyPatch.context() as patched, compiling_for(card.capability) as compiled:
        patched.setattr(backend, "describe_card", lambda _: card)
        attention = backend.TritonAttention()
        attention.allocate_cache(cache)
        if cache_dtype is not None:
            attention.set_kv_scales(torch.ones(1, num_kv_heads), torch.ones(1, num_kv_heads))
        for starts, counts in steps:
            tables = [[1, 2, 3]] * len(starts)
            batch = make_batch(starts, counts, tables, block_size, device="cpu")
            qkv = torch.zeros(batch.num_tokens, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
            attention.forward_rotary(qkv, cos, cos, spec, attention.prepare(batch))
    return compiled


PLAIN = {}
FP8 = {"cache_dtype": torch.float8_e4m3fn}
WIDE = {"dtype": torch.float16, "dim": 256, "block_size": 16, "window": 24, "softcap": 30.0}


@pytest.mark.parametrize(
    ("card", "options"),
    [
        (A100, PLAIN),
        (RTX_3090, FP8),
        (ADA, FP8),
        (ADA, WIDE),
        (B200, PLAIN),
        (RTX_5090, FP8),
        (RTX_5090, WIDE),
    ],
    ids=["A100", "3090, FP8", "Ada, FP8", "Ada, wide", "B200", "5090, FP8", "5090, wide"],
)
def test_kernels_for_other_cards_fit(card, options):
    compiled = compile_steps(card, FEW_DECODES, MORE_DECODES, MIXED, **options)
    assert names_of(compiled) == {"decode", "prefill", "write", "plan_decodes", "plan_prompts"}
    assert most_shared_bytes(compiled) <= card.shared_bytes


@pytest.fixture(scope="module", params=[4, 16])
def decode_for_hopper(request):
    """Compile it for as many query heads of a key-value head."""
    compiled = compile_steps(H200, MORE_DECODES, heads=(8 * request.param, 8))
    (kernel,) = (kernel for kernel in compiled if kernel.metadata.name == "decode_hopper")
    return kernel


def test_two_decodes_for_hopper_fit_on_a_multiprocessor(decode_for_hopper):
    per_sm = tune_ring(H200, 128).num_ctas // H200.num_sms
    taken = per_sm * (decode_for_hopper.metadata.shared + RESERVED_BYTES)
    assert taken <= H200.shared_bytes + RESERVED_BYTES


def test_decodes_for_hopper_give_no_stage_back_while_it_is_being_loaded(decode_for_hopper):
    """Nothing but the assembler's order of instructions sees to that; see `release`."""
    instructions = disassemble(decode_for_hopper)
    assert sum("LDSM" in instruction for instruction in instructions) >= 16
    counts = matrices_in_flight(instructions)
    assert len(counts) >= 2
    assert not any(counts)


def test_loads_in_flight_are_counted():
    program = ["LDSM.16.M88.4 R8, [R1+UR4]", "LDSM.16.MT88.4 R12, [R2]", "HMMA.16816 R4, R8, R20, R4"]
    arrive = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x8], RZ"
    product = "HMMA.16816.F32 R4, R12.reuse, R20, R4"
    assert matrices_in_flight([*program, arrive, product, arrive]) == [1, 0]


def test_prompts_for_hopper_fit_on_a_multiprocessor():
    compiled = compile_steps(H200, PROMPT, heads=(32, 8))
    assert "prefill_hopper" in names_of(compiled)
    assert most_shared_bytes(compiled) <= H200.shared_bytes


def test_old_pages_are_gone_before_new_ones_are_allocated(monkeypatch):
    monkeypatch.setattr(backend, "describe_card", lambda _: H200)
    spec = KVCacheSpec(1, 3, 64, 1, 64, torch.bfloat16, torch.device("cpu"))
    attention = backend.TritonAttention()
    attention.allocate_cache(spec)
    assert attention._hopper is not None
    old, empty, seen = weakref.ref(attention._layers[0].k), torch.empty, []

    def watch(*args, **options):
        seen.append(old() is None)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", watch)
    attention.allocate_cache(spec)
    assert seen[0]
