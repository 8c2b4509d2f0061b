"""Engines whose keys and values are stored in FP8, against a model that rounds them and keeps all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import LLM, SamplingParams
from core.assemble import Parts, resolve
from core.config import load_config
from core.errors import PlanError
from core.executor import TorchExecutor
from core.model.decoder import make_decoder
from core.model.families import load_hf_config, read_model
from core.model.kv_scales import calibrate, scale_tensors
from core.model.linear import PlainScheme
from core.model.weights import SINGLE_FILE, load_weights
from core.quant.dense import DenseAttention
from core.testing.attention import round_to
from core.testing.checkpoints import make_checkpoint
from core.testing.simulated_ranks import Recorder, replay

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = ["llama3", "gemma2", "gemma3", "phi3", "qwen3"]
"""Grouped queries; softcap and windows; norms of keys; fused projections."""
PROMPTS = [[7, 3, 9, 11, 5], list(range(4, 44)), [100]]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=1)
PER_HEAD = torch.tensor([[0.037, 0.052], [0.044, 0.029], [0.05, 0.06], [0.03, 0.041]])
"""[layers, G]: too small for the largest keys and values, so that some saturate."""


class RoundingAttention(DenseAttention):
    """Attends over keys and values as the cache is to hold them; `seen` gets those of each layer."""

    def __init__(self, k_scales=None, v_scales=None):
        self.scales = k_scales, v_scales
        self.seen = {}

    def forward(self, q, k, v, spec, meta):
        self.seen[spec.layer] = k, v
        if self.scales[0] is not None:
            scales = (scales[spec.layer][:, None].double() for scales in self.scales)
            k, v = (
                (round_to(x / scale, torch.float8_e4m3fn) * scale).to(x.dtype)
                for x, scale in zip((k, v), scales, strict=True)
            )
        return super().forward(q, k, v, spec, meta)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give the folder of a family's checkpoint, with a scale for each head where `PER_HEAD` has it."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = make_checkpoint(variant, tmp_path_factory.mktemp(variant))
            add_scales(made[variant], PER_HEAD, 2 * PER_HEAD)
        return made[variant]

    return get


def add_scales(path: Path, k_scales, v_scales):
    stored = load_file(path / SINGLE_FILE)
    for layer in range(load_hf_config(path).num_hidden_layers):
        for x, scales in (("k", k_scales), ("v", v_scales)):
            stored[f"model.layers.{layer}.self_attn.{x}_scale"] = scales[layer].clone()
    save_file(stored, path / SINGLE_FILE)


def settings_of(path, **changes):
    return {
        "model": str(path),
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_dtype": "fp8",
        "num_kv_blocks": 40,
        "max_num_seqs": 4,
        "max_model_len": 64,
        **changes,
    }


def generate(path, **changes):
    with LLM(**settings_of(path, **changes)) as llm:
        return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def tokens_of(results):
    return [result.outputs[0].token_ids for result in results]


def logprobs_of(results):
    return [
        entry[token].logprob
        for result in results
        for token, entry in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    ]


def make_reference(path, attention):
    decoder = make_decoder(
        read_model(load_hf_config(path)),
        scheme=PlainScheme(),
        attention=attention,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_len=64,
    )
    load_weights(decoder, path, device=torch.device("cpu"))
    return decoder


@torch.inference_mode()
def compute(decoder, tokens):
    """Compute the log-probabilities after each token of one sequence: [T, V]."""
    positions = torch.arange(len(tokens))
    return decoder.logits(decoder(torch.tensor(tokens), positions, len(tokens))).log_softmax(-1)


@pytest.mark.parametrize("variant", FAMILIES)
def test_engine_computes_what_a_model_does_that_rounds(variant, folder):
    results = generate(folder(variant))
    decoder = make_reference(folder(variant), RoundingAttention(PER_HEAD, 2 * PER_HEAD))
    expected, drawn = [], []
    for result in results:
        prompt, output = result.prompt_token_ids, result.outputs[0].token_ids
        logprobs = compute(decoder, [*prompt, *output])
        expected += [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
        drawn.append(logprobs[len(prompt) - 1 : -1].argmax(-1).tolist())
    assert logprobs_of(results) == pytest.approx(expected, abs=2e-3)
    assert tokens_of(results) == drawn


@pytest.mark.parametrize("variant", FAMILIES)
def test_how_a_prompt_is_cut_does_not_show(variant, folder):
    whole = generate(folder(variant))
    changes = {"max_num_batched_tokens": 9, "block_size": 4}
    chunked = generate(folder(variant), **changes)
    assert tokens_of(chunked) == tokens_of(whole)
    assert logprobs_of(chunked) == pytest.approx(logprobs_of(whole), abs=2e-3)


def test_prefixes_and_preempted_requests_come_back_as_they_were(folder):
    alone = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = [[*range(4, 36), token] for token in (50, 60, 70)]
    with LLM(**settings_of(folder("llama3"), block_size=4, enable_prefix_caching=False)) as llm:
        expected = [tokens_of(llm.generate([prompt], alone, use_tqdm=False)) for prompt in prompts]
    settings = settings_of(folder("llama3"), block_size=4, num_kv_blocks=20)  # one and a half requests
    with LLM(**settings) as llm:
        for _ in range(2):
            results = llm.generate(prompts, alone, use_tqdm=False)
            assert [[tokens] for tokens in tokens_of(results)] == expected
        assert llm.engine.kv_cache.stats().num_hits > 0
        assert llm.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_caches_of_other_widths(dtype, stored, folder):
    expected = generate(folder("llama3"), kv_cache_dtype="auto", dtype=dtype)
    actual = generate(folder("llama3"), kv_cache_dtype=stored, dtype=dtype)
    assert logprobs_of(actual) == pytest.approx(logprobs_of(expected), abs=0.3)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_ranks_have_the_scales_of_their_heads_and_layers(mesh, folder):
    settings = settings_of(folder("llama3"))
    with LLM(**settings) as llm:
        recorder = llm.engine.executor = Recorder(llm.engine.executor)
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    results = replay({**settings, **sizes}, recorder.steps, num_blocks=41)
    assert [r.tokens for r in results] == [expected.tokens for _, expected in recorder.steps]


def test_calibrated_scales_are_much_better_than_none(tmp_path):
    """Keys of these checkpoints fit without; make them a thousand times larger, and queries smaller."""
    path = make_checkpoint("llama3", tmp_path)
    stored = load_file(path / SINGLE_FILE)
    for name, tensor in stored.items():
        if "k_proj" in name or "v_proj" in name:
            tensor.mul_(1000.0)
        if "q_proj" in name or "o_proj" in name:
            tensor.div_(1000.0)
    save_file(stored, path / SINGLE_FILE)
    exact = logprobs_of(generate(path, kv_cache_dtype="auto"))
    without = logprobs_of(generate(path))

    attention = RoundingAttention()
    compute(make_reference(path, attention), list(range(4, 44)))
    for layer, (k, v) in attention.seen.items():
        for prefix, tensors in scale_tensors(layer, *calibrate(k, v)).items():
            stored |= {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file(stored, path / SINGLE_FILE)
    calibrated = logprobs_of(generate(path))

    def error(logprobs):
        return sum(abs(a - b) for a, b in zip(logprobs, exact, strict=True)) / len(exact)

    assert error(calibrated) < 0.2 * error(without)


def test_half_the_memory_of_bfloat16(folder):
    sizes = {}
    for name in ("bfloat16", "fp8"):
        settings = settings_of(folder("llama3"), dtype="bfloat16", kv_cache_dtype=name)
        plan = resolve(load_config(settings)).plan
        with LLM(**settings) as llm:
            executor = llm.engine.executor
            sizes[name] = executor._attention.cache_bytes_per_block(executor._cache_spec(1))
        assert sizes[name] == plan.kv_bytes_per_token * plan.block_size
    assert sizes["fp8"] * 2 == sizes["bfloat16"]


def test_backends_that_cannot_are_refused(folder):
    plan = resolve(load_config(settings_of(folder("llama3")))).plan
    parts = Parts(attention=DenseAttention(), scheme=PlainScheme(), sampler=None)
    with pytest.raises(PlanError, match=r"attention torch: --kv-cache-dtype float8_e4m3fn needs"):
        TorchExecutor(plan, parts)
    with pytest.raises(PlanError, match=r"kv_cache_dtype 'fp8_e5m2' is none of auto, float32, .*fp8"):
        resolve(load_config(settings_of(folder("llama3"), kv_cache_dtype="fp8_e5m2")))
