"""`python -m core bench throughput`: how much an engine does in a second when it has all requests at once."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.bench.offline import adapt_config, generate, vocab_size_of
from core.bench.workloads import BenchRequest
from core.errors import ConfigError
from core.llm import LLM

if TYPE_CHECKING:
    from core.bench.workloads import Dataset
    from core.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one run did."""

    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file of results."""
        num_tokens = self.num_prompt_tokens + self.num_output_tokens
        return {
            "elapsed_time": self.seconds,
            "num_requests": self.num_requests,
            "total_num_tokens": num_tokens,
            "requests_per_second": self.num_requests / self.seconds,
            "tokens_per_second": num_tokens / self.seconds,
            "output_tokens_per_second": self.num_output_tokens / self.seconds,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
        }


def measure(config: EngineConfig, dataset: Dataset, *, num_warmups: int = 8) -> Throughput:
    """Run a data set once.

    :param num_warmups: of its requests run before, for some tokens, so that nothing is measured that
        happens once.
    :raises CytheraError: the engine cannot be made, or a request does not fit it.
    """
    if num_warmups < 0:
        raise ConfigError(f"--num-warmups {num_warmups} must be at least 0")
    # With it the requests of the warm-up would be found again, and other runs would not compare.
    config = adapt_config(config, enable_prefix_caching=False)
    with LLM.from_config(config) as llm:
        dataset = dataclasses.replace(dataset, vocab_size=vocab_size_of(llm))
        tokenizer = llm.get_tokenizer()
        count = None if tokenizer is None else lambda text: len(tokenizer.encode(text))
        requests = dataset.requests(count)
        if num_warmups:
            generate(
                llm, [BenchRequest(r.prompt, min(8, r.output_len)) for r in requests[:num_warmups]]
            )
        begin = time.perf_counter()
        num_prompt_tokens, num_output_tokens = generate(llm, requests)
        seconds = time.perf_counter() - begin
    return Throughput(seconds, len(requests), num_prompt_tokens, num_output_tokens)


def report(result: Throughput) -> str:
    """Format the figures."""
    figures = result.to_dict()
    return (
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {result.num_prompt_tokens}\n"
        f"Total num output tokens:  {result.num_output_tokens}"
    )
