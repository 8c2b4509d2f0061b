"""What an engine is made of, as frozen data: the result of `core.assemble.resolve`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.memory_estimate import estimate_memory
from core.offload import NUM_BUFFERS, choose_layers
from core.request import RequestLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core.config import EngineConfig
    from core.model.spec import ModelSpec
    from core.pluginhost import Selected
    from core.registry import Registered
    from core.sharding import Share, Span


@dataclass(frozen=True, slots=True)
class Choice:
    """A part that was chosen, and why."""

    kind: str
    registered: Registered
    why: str

    @property
    def name(self) -> str:
        """The descriptor's name."""
        return self.registered.descriptor.name


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that was decided, as frozen data.  Every rank rebuilds its parts from it."""

    config: EngineConfig
    model: ModelSpec
    model_path: str
    device: str
    dtype: str
    max_model_len: int
    block_size: int
    weight_bytes: int
    """Bytes of the weights on all ranks together."""
    layer_bytes: int
    """Bytes of the matrices of one decoder layer, on all ranks that share it."""
    kv_bytes_per_token: int
    choices: Mapping[str, Choice]
    """By kind."""
    plugins: tuple[Selected, ...]
    settings: Mapping[str, Any]
    """Bound settings of each plugin that has any, by plugin name."""
    kv_cache_dtype: str
    """Of stored keys and values, as torch names it."""
    shares: tuple[Share, ...]
    """What each rank holds.  Ranks of one stage follow one another: rank = stage · tensor_parallel_size
    + rank within the stage."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """`quantization_config` of the checkpoint; empty if it is not quantized."""
    notes: tuple[str, ...] = ()
    """What was decided for the user, worth a line at start."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.shares)

    @property
    def sampling_rank(self) -> int:
        """The rank that draws tokens: the first one of the last stage."""
        return self.world_size - self.tensor_parallel_size

    def factory(self, kind: str) -> Callable[..., Any]:
        """Return the factory of the part chosen for a kind."""
        return self.choices[kind].registered.descriptor.factory

    def offloaded_layers(self, rank: int) -> tuple[int, ...]:
        """List the layers that a rank keeps in the host's memory."""
        wanted = self.config.cpu_offload_gb * 2**30
        return choose_layers(self.shares[rank].layers, self._layer_bytes_on(rank), wanted)

    def _layer_bytes_on(self, rank: int) -> float:
        """Bytes of one layer on a rank, which holds about as much of the attention as of the MLP."""
        return self.layer_bytes * self.shares[rank].inner.size / self.model.intermediate_size

    def cache_identity(self) -> bytes:
        """State what two KV blocks must have in common before their tokens are compared."""
        identity = [self.model.to_dict(), self.model_path, self.dtype, self.kv_cache_dtype]
        return json.dumps(identity, sort_keys=True).encode()

    def fit_model_len(self, num_blocks: int) -> int:
        """Longest sequence to serve with a device cache of `num_blocks`, the null block included.

        Shorter than the model's limit only if neither that length nor the cache's size was set.
        """
        if self.config.max_model_len is not None or self.config.num_kv_blocks is not None:
            return self.max_model_len
        return min(self.max_model_len, (num_blocks - 1) * self.block_size)

    def limits(self, num_blocks: int) -> RequestLimits:
        """Make the caps on requests, once the KV pool has `num_blocks` usable blocks."""
        return RequestLimits(
            vocab_size=self.model.vocab_size,
            max_model_len=self.fit_model_len(num_blocks + 1),
            max_kv_tokens=num_blocks * self.block_size,
            max_n=self.config.max_n,
            max_logprobs=self.config.max_logprobs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the same on every rank."""
        return {
            "config": self.config.to_dict(),
            "model": self.model.to_dict(),
            "model_path": self.model_path,
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "weight_bytes": self.weight_bytes,
            "layer_bytes": self.layer_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "choices": {
                kind: {
                    "name": choice.name,
                    "plugin": choice.registered.plugin,
                    "distribution": choice.registered.distribution,
                    "why": choice.why,
                }
                for kind, choice in self.choices.items()
            },
            "plugins": [{"name": plugin.name, "why": plugin.reason} for plugin in self.plugins],
            "kv_cache_dtype": self.kv_cache_dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "quantization": self.quantization,
            "shares": [dataclasses.asdict(share) for share in self.shares],
            "notes": list(self.notes),
        }

    def digest(self) -> str:
        """SHA-256 of the plan, which ranks compare before they start."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def render(self, device_bytes: int | None = None) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Sections of (what, value, why) for people.

        :param device_bytes: memory of the device, if there is one to ask.
        """
        model, config = self.model, self.config
        shape = (
            f"{model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_heads} heads over {model.num_kv_heads} KV heads of {model.head_dim}"
        )
        pool = "measured at start" if config.num_kv_blocks is None else f"{config.num_kv_blocks} blocks"
        return [
            (
                "model",
                [
                    ("checkpoint", self.model_path, config.origin_of("model")),
                    ("family", model.model_type, shape),
                    ("dtype", self.dtype, config.origin_of("dtype")),
                    ("device", self.device, config.origin_of("device")),
                    (
                        "context length",
                        f"{self.max_model_len} tokens",
                        config.origin_of("max_model_len"),
                    ),
                ],
            ),
            (
                "memory",
                [
                    ("weights", _format_bytes(self.weight_bytes), "over all ranks"),
                    *self._render_offload(),
                    *self._render_memory(),
                    ("KV cache", f"{_format_bytes(self.kv_bytes_per_token)} per token", pool),
                    *self._render_capacity(device_bytes),
                    ("block size", f"{self.block_size} tokens", config.origin_of("block_size")),
                ],
            ),
            ("ranks", list(self._render_ranks())),
            (
                "parts",
                [
                    (kind, f"{choice.name} ({choice.registered.plugin})", choice.why)
                    for kind, choice in self.choices.items()
                ],
            ),
            ("plugins", [(plugin.name, "active", plugin.reason) for plugin in self.plugins]),
            ("notes", [("", note, "") for note in self.notes]),
        ]

    def _render_memory(self) -> Iterator[tuple[str, str, str]]:
        estimate = estimate_memory(self)
        config = self.config
        tokens = f"about, for steps of {config.max_num_batched_tokens} tokens"
        yield "activations", _format_bytes(estimate.activations), tokens
        if estimate.graphs:
            yield "CUDA graphs", _format_bytes(estimate.graphs), "about; --enforce-eager saves it"
        rows = f"at most, for {config.max_num_seqs} sequences"
        yield "sampler", _format_bytes(estimate.sampler), rows
        if estimate.runtime:
            yield "runtime", _format_bytes(estimate.runtime), "about: CUDA itself and its libraries"

    def _render_capacity(self, device_bytes: int | None) -> Iterator[tuple[str, str, str]]:
        if device_bytes is None or self.config.num_kv_blocks or self.config.kv_cache_memory_bytes:
            return
        share = self.config.gpu_memory_utilization
        tokens = estimate_memory(self).kv_tokens(int(device_bytes * share))
        yield (
            "KV capacity",
            f"about {tokens} tokens",
            f"{share:.0%} of {_format_bytes(device_bytes)}, less all that",
        )

    def _render_offload(self) -> Iterator[tuple[str, str, str]]:
        offloaded = {rank: self.offloaded_layers(rank) for rank in range(self.world_size)}
        count = sum(map(len, offloaded.values()))
        if not count:
            return
        on_host, in_buffers = (
            sum(len(layers[:most]) * self._layer_bytes_on(rank) for rank, layers in offloaded.items())
            for most in (None, NUM_BUFFERS)
        )
        num_layers = sum(share.layers.size for share in self.shares)
        resident = self.weight_bytes - on_host
        yield (
            "resident",
            f"{_format_bytes(resident)}, and {_format_bytes(in_buffers)} for layers that visit",
            "on the device",
        )
        yield (
            "offloaded",
            f"{_format_bytes(on_host)}, {count} of {num_layers} layers",
            self.config.origin_of("cpu_offload_gb"),
        )

    def _render_ranks(self) -> Iterator[tuple[str, str, str]]:
        if self.world_size == 1:
            return
        tensor, pipeline = self.tensor_parallel_size, self.pipeline_parallel_size
        yield "mesh", f"{tensor} tensor x {pipeline} pipeline", f"{self.world_size} ranks"
        for rank, share in enumerate(self.shares):
            held = (
                f"layers {_format_span(share.layers)}, heads {_format_span(share.heads)}, "
                f"KV heads {_format_span(share.kv_heads)}"
            )
            yield f"rank {rank}", held, f"{share.inner.size} MLP features, {share.vocab.size} tokens"


def _format_span(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}" if span.size != 1 else str(span.start)


def _format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
