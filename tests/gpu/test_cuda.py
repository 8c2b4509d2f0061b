"""What only a GPU can show: measured KV capacity, overlapped steps.  Skipped without one.

The tests of `tests/e2e` run on a GPU too: set CYTHERA_TEST_DEVICE=cuda.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from core import LLM, SamplingParams
from core.errors import CapacityError
from core.testing.checkpoints import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_memory_share_is_honoured(path: Path, share: float) -> None:
    with LLM(
        str(path),
        dtype="bfloat16",
        device="cuda",
        gpu_memory_utilization=share,
        max_num_seqs=1024,
        max_num_batched_tokens=4096,
        max_model_len=128,
        kv_cache_memory_bytes=None,
    ) as llm:
        block_bytes = llm.engine.executor._attention.cache_bytes_per_block(  # type: ignore[attr-defined]
            llm.engine.executor._cache_spec(1)  # type: ignore[attr-defined]
        )
        num_blocks = llm.engine.kv_cache.num_blocks
        prompts = [[i % 100 + 3] * 100 for i in range(1024)]
        llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8), use_tqdm=False)
        free, total = torch.cuda.mem_get_info()
        # This tiny model wants fewer blocks than fit, so only the upper bound can be checked here.
        assert num_blocks * block_bytes <= share * total
        assert total - free <= share * total * 1.01


def test_share_that_is_too_small_is_an_error_with_numbers_and_knobs(path: Path) -> None:
    with pytest.raises(CapacityError, match="--gpu-memory-utilization"):
        LLM(str(path), dtype="bfloat16", device="cuda", gpu_memory_utilization=0.001, max_model_len=128)


def test_overlapped_steps_draw_the_same_tokens(path: Path) -> None:
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True) for i in range(16)
    ]
    prompts = [[3 + i, 4, 5 + i] * (1 + i) for i in range(16)]
    outputs = []
    for depth in (1, 2, 3):
        with LLM(
            str(path),
            dtype="float32",
            device="cuda",
            max_in_flight=depth,
            max_model_len=128,
            num_kv_blocks=60,
        ) as llm:
            results = llm.generate(prompts, params, use_tqdm=False)
            outputs.append([r.outputs[0].token_ids for r in results])
    assert outputs[0] == outputs[1] == outputs[2]
