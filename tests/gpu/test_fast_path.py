"""The fast path on a GPU: Triton kernels, fused slots, CUDA graphs.  Skipped without one.

Everything is compared with `transformers` on the same weights, or with the same engine without graphs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from core import LLM, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.executor import TorchExecutor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB: Final = 512
SETTINGS: Final[dict[str, Any]] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "num_kv_blocks": 400,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 512,
    "enable_prefix_caching": False,
}


def write_model(folder: Path, **changes: Any) -> Path:
    """Save a model whose logits are far apart, so that rounding seldom decides."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  slow to import

    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "initializer_range": 0.06,
            **changes,
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fast"))


def make_prompts(count: int, longest: int = 200) -> list[list[int]]:
    chance = random.Random(count)
    return [
        [chance.randrange(3, VOCAB) for _ in range(chance.randint(1, longest))] for _ in range(count)
    ]


def executor_of(llm: LLM) -> TorchExecutor:
    return llm.engine.executor  # type: ignore[return-value]


def reference_logprobs(path: Path, tokens: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """[L, V] float64 on the CPU: what `transformers` says of each next token."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  slow to import

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens], device="cuda")).logits[0]
    return logits.double().log_softmax(-1).cpu()


def test_the_plan_names_kernels_and_every_slot_is_fused(path: Path) -> None:
    with LLM(str(path), **SETTINGS) as llm:
        choices = llm.assembly.plan.choices
        assert (choices["attention"].name, choices["quant"].name) == ("triton", "dense")
        forms = executor_of(llm)._decoder.forms
        assert [form.slot for form in forms if not form.is_fused] == []
        assert executor_of(llm)._graphs is not None


@pytest.mark.parametrize("chunk", [512, 48])
def test_prompts_have_the_log_probabilities_of_transformers(path: Path, chunk: int) -> None:
    prompts = make_prompts(5)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    settings = {**SETTINGS, "max_num_seqs": 16, "max_num_batched_tokens": chunk}
    with LLM(str(path), **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        exact = reference_logprobs(path, prompt, torch.float32)
        rounded = reference_logprobs(path, prompt, torch.bfloat16)
        ours = [
            step[token].logprob
            for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]  # type: ignore[index]
        wanted = exact[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        theirs = rounded[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        if len(prompt) > 1:
            error = (torch.tensor(ours, dtype=torch.float64) - wanted).pow(2).mean().sqrt()
            assert error <= 1.5 * (theirs - wanted).pow(2).mean().sqrt() + 1e-3


def test_decoding_has_the_log_probabilities_of_transformers(path: Path) -> None:
    prompts = make_prompts(7)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(path), **SETTINGS) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        exact = reference_logprobs(path, [*prompt, *tokens], torch.float32)[len(prompt) - 1 : -1]
        rounded = reference_logprobs(path, [*prompt, *tokens], torch.bfloat16)[len(prompt) - 1 : -1]
        index = torch.tensor(tokens)[:, None]
        ours = torch.tensor(
            [
                step[token].logprob
                for step, token in zip(output.outputs[0].logprobs or [], tokens, strict=True)
            ],
            dtype=torch.float64,
        )
        wanted = exact.gather(1, index)[:, 0]
        error = (ours - wanted).pow(2).mean().sqrt()
        assert error <= 1.5 * (rounded.gather(1, index)[:, 0] - wanted).pow(2).mean().sqrt() + 1e-3
        # What was drawn is the likeliest token, up to rounding.
        assert (exact.max(dim=1).values - wanted).max() < 0.15


@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_graphs_change_no_token(path: Path, count: int) -> None:
    prompts = make_prompts(count)
    params = [
        SamplingParams(
            max_tokens=10 + 7 * (i % 8),
            temperature=(0.0, 0.8, 1.0, 0.9)[i % 4],
            top_p=0.9 if i % 4 == 2 else 1.0,
            top_k=20 if i % 4 == 3 else 0,
            presence_penalty=0.3 if i % 8 == 5 else 0.0,
            seed=i,
            ignore_eos=True,
        )
        for i in range(count)
    ]
    drawn = []
    for eager in (True, False):
        with LLM(str(path), enforce_eager=eager, **SETTINGS) as llm:
            assert (executor_of(llm)._graphs is None) == eager
            outputs = llm.generate(prompts, params, use_tqdm=False)
            drawn.append([output.outputs[0].token_ids for output in outputs])
    assert drawn[0] == drawn[1]


def test_all_sizes_are_captured_in_the_end_and_nothing_is_compiled_after_that(path: Path) -> None:
    import triton  # noqa: PLC0415  only where there is a GPU

    with LLM(str(path), **SETTINGS) as llm:
        graphs = executor_of(llm)._graphs
        assert graphs is not None
        assert graphs.num_captured == graphs.num_shapes
        compiled: list[Any] = []
        hook = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["key"])
        try:
            for count in (50, 1, 2, 5, 17, 33, 64):
                params = SamplingParams(max_tokens=6, temperature=0.7, ignore_eos=True)
                llm.generate(make_prompts(count), params, use_tqdm=False)
        finally:
            triton.knobs.runtime.jit_post_compile_hook = hook
        assert compiled == []


START = """
import json, sys
import triton
from core import LLM

compiled = []
triton.knobs.compilation.listener = lambda **told: compiled.append(told["metadata"]["hash"])
with LLM(sys.argv[1], **json.loads(sys.argv[2])):
    print(json.dumps(compiled))
"""


def test_a_start_without_compiled_kernels_compiles_each_once(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(path), json.dumps(SETTINGS)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    compiled = json.loads(shown.stdout.splitlines()[-1])
    assert len(compiled) > 10
    assert len(set(compiled)) == len(compiled)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_memory_share_is_used_up_to_one_percent(tmp_path: Path, share: float) -> None:
    model = write_model(tmp_path, max_position_embeddings=131072)
    settings = {**SETTINGS, "max_num_seqs": 1024, "max_num_batched_tokens": 4096}
    settings |= {"max_model_len": 131072, "num_kv_blocks": None, "gpu_memory_utilization": share}
    with LLM(str(model), **settings) as llm:
        llm.generate(make_prompts(300), SamplingParams(max_tokens=8, temperature=0.7), use_tqdm=False)
        free, total = torch.cuda.mem_get_info()
        used = (total - free) / total
    assert used == pytest.approx(share, abs=0.01)
