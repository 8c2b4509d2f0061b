"""Tokens per second against `transformers`' own continuous batching and its padded `generate`.

One random Llama-shaped model, one set of requests of mixed lengths, one machine, one run, greedy,
float32.  The three must draw the same tokens; otherwise the comparison is void and says so.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from core.llm import LLM
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL_RATIO: Final = 1.5


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of mixed lengths, the same in every run."""

    num_requests: int = 32
    min_input: int = 16
    max_input: int = 256
    min_output: int = 16
    max_output: int = 128
    vocab_size: int = 4096
    seed: int = 7

    def requests(self) -> list[tuple[list[int], int]]:
        """Return (prompt token ids, tokens to generate) of each request."""
        rng = random.Random(self.seed)
        return [
            (
                [
                    rng.randrange(5, self.vocab_size)
                    for _ in range(rng.randint(self.min_input, self.max_input))
                ],
                rng.randint(self.min_output, self.max_output),
            )
            for _ in range(self.num_requests)
        ]


@dataclass(slots=True)
class Run:
    """One engine's result."""

    name: str
    seconds: float
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that were asked for and generated."""
        return sum(map(len, self.outputs))

    @property
    def tokens_per_second(self) -> float:
        """Useful output tokens per second."""
        return self.num_tokens / self.seconds


def make_model(path: Path, workload: Workload, *, hidden_size: int = 512, num_layers: int = 8) -> Any:
    """Save a random Llama and return it as `transformers` loads it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  slow to import

    torch.manual_seed(workload.seed)
    config = LlamaConfig(
        vocab_size=workload.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=2048,
        # Wide enough that the likeliest token is clear: equal tokens are checked.
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


def run_cythera(path: Path, _model: Any, requests: list[tuple[list[int], int]]) -> Run:
    """Generate with this engine."""
    with LLM(str(path), dtype="float32", device="cpu", max_model_len=1024) as llm:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
        prompts = [prompt for prompt, _ in requests]
        llm.generate([prompts[0][:4]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        start = time.perf_counter()
        results = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
    return Run("cythera", seconds, [result.outputs[0].token_ids for result in results])


def run_continuous(_path: Path, model: Any, requests: list[tuple[list[int], int]]) -> Run:
    """Generate with `transformers`' continuous batching."""
    from transformers import (  # noqa: PLC0415  slow to import
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    # Without a GPU it cannot size its cache; these hold all requests at once.
    block_size = 32
    num_blocks = sum(-(-(len(prompt) + n) // block_size) + 1 for prompt, n in requests)
    sizes = ContinuousBatchingConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_tokens=2048,
        max_requests_per_batch=len(requests),
    )
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=sizes)
    manager.start()
    try:
        start = time.perf_counter()
        ids = [manager.add_request(list(p), max_new_tokens=n) for p, n in requests]
        results: dict[str, list[int]] = {}
        while len(results) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended early")
        seconds = time.perf_counter() - start
    finally:
        manager.stop(block=True, timeout=5)
    return Run("transformers continuous batching", seconds, [results[i] for i in ids])


def run_padded(_path: Path, model: Any, requests: list[tuple[list[int], int]]) -> Run:
    """Generate with `transformers`' `generate` on one left-padded batch."""
    model.set_attn_implementation("sdpa")
    width = max(len(prompt) for prompt, _ in requests)
    longest = max(n for _, n in requests)
    input_ids = torch.zeros(len(requests), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, _) in enumerate(requests):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - start
    new = output[:, width:].tolist()
    return Run(
        "transformers padded generate",
        seconds,
        [row[:n] for row, (_, n) in zip(new, requests, strict=True)],
    )


def compare(workload: Workload, *, hidden_size: int = 512, num_layers: int = 8) -> list[Run]:
    """Run all three, this engine first and once more at the end; its better run counts.

    :raises RuntimeError: they drew different tokens.
    """
    requests = workload.requests()
    engines: list[Callable[[Path, Any, list[tuple[list[int], int]]], Run]] = [
        run_cythera,
        run_continuous,
        run_padded,
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = make_model(path, workload, hidden_size=hidden_size, num_layers=num_layers)
        runs = [
            min((engine(path, model, requests) for _ in range(2)), key=lambda run: run.seconds)
            for engine in engines
        ]
    for run in runs[1:]:
        differing = sum(a != b for a, b in zip(runs[0].outputs, run.outputs, strict=True))
        if differing:
            raise RuntimeError(
                f"{run.name} drew other tokens for {differing} of {len(requests)} requests"
            )
    return runs


def report(runs: list[Run]) -> str:
    """Format a table with ratios to the best of `transformers`."""
    best = max(run.tokens_per_second for run in runs[1:])
    lines = [f"{'engine':<34} {'s':>8} {'tokens/s':>9} {'ratio':>6}"]
    lines += [
        f"{r.name:<34} {r.seconds:>8.2f} {r.tokens_per_second:>9.1f} {r.tokens_per_second / best:>6.2f}"
        for r in runs
    ]
    lines.append(
        f"goal: at least {GOAL_RATIO} times the better of the other two; same tokens in all three"
    )
    return "\n".join(lines)
