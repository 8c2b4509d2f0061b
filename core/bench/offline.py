"""What the measurements that run an engine in their own process have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from core.bench.workloads import VOCAB_SIZE
from core.errors import ConfigError
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.bench.workloads import BenchRequest
    from core.config import EngineConfig
    from core.llm import LLM

MANY_ROWS: Final = 1024
MANY_TOKENS: Final = 8192
"""What a GPU has by default: a batch that needs more than a CPU's default gets these or more."""
PERCENTILES: Final = (10, 25, 50, 75, 90, 99)


def adapt_config(config: EngineConfig, **wanted: Any) -> EngineConfig:
    """Change settings for a measurement, except those that somebody has set.

    :param wanted: values of settings.
    """
    return config.with_defaults(wanted, "for the benchmark")


def adapt_to_batch(config: EngineConfig, batch_size: int) -> EngineConfig:
    """Let a batch run as one, and have every prompt computed: no row or prefix is shared.

    :raises ConfigError: a setting that somebody made does not allow such a batch.
    """
    config = adapt_config(config, enable_prefix_caching=False)
    # What is enough stays unset: what a device has by default is what is to be measured.
    if batch_size > config.max_num_batched_tokens:
        config = adapt_config(config, max_num_batched_tokens=max(MANY_TOKENS, batch_size))
    if batch_size > config.max_num_seqs:
        rows = max(batch_size, min(MANY_ROWS, config.max_num_batched_tokens))
        config = adapt_config(config, max_num_seqs=rows)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if (limit := getattr(config, name)) < batch_size:
            raise ConfigError(
                f"a batch of {batch_size} cannot run as one: {name} = {limit} "
                f"({config.origin_of(name)}); raise it, or lower --batch-size"
            )
    return config


def vocab_size_of(llm: LLM) -> int:
    """Return the bound of the token ids to draw for a model."""
    return min(VOCAB_SIZE, llm.assembly.plan.model.vocab_size)


def generate(llm: LLM, requests: Sequence[BenchRequest]) -> tuple[int, int]:
    """Run requests to their full lengths, greedily.

    :return: tokens of all prompts, and tokens that were generated.
    """
    params = [
        SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
        for request in requests
    ]
    results = llm.generate([request.prompt for request in requests], params, use_tqdm=False)
    return (
        sum(len(result.prompt_token_ids) for result in results),
        sum(len(output.token_ids) for result in results for output in result.outputs),
    )
