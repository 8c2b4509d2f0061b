"""What a decoder is made of, as frozen plain data: the result of reading a `config.json`.

Free of torch, so that a plan can be made, shown and compared without a device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from core.sharding import Share, Span

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
NormStyle = Literal["plain", "one_plus"]
"""`plain` multiplies by w after casting back to the dtype, `one_plus` by 1 + w before."""
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One set of rotary frequencies.  Fields that a kind does not use keep their defaults."""

    kind: RopeKind
    theta: float
    rotary_dim: int
    """Leading dimensions of a head that are rotated; the rest passes through."""
    factor: float = 1.0
    original_max_position: int = 0
    """Positions before stretching, in tokens."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None
    """Query at position p sees keys at p - window < j <= p; `None` sees all j <= p."""
    rope: str
    """Key into `ModelSpec.ropes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that the decoder needs to know about a model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence that the rotary frequencies are made for, in tokens."""
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeSpec]
    attention_scale: float
    activation: Activation = "silu"
    norm_eps: float = 1e-6
    norm_style: NormStyle = "plain"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalized per head, before they are rotated."""
    post_norms: bool = False
    """Attention and MLP are normalized once more before they join the residual."""
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    """The embedding serves as output projection too."""
    fused_qkv: bool = False
    """The checkpoint holds one `qkv_proj` instead of three projections."""
    fused_gate_up: bool = False
    """The checkpoint holds one `gate_up_proj` instead of two projections."""
    renames: tuple[tuple[str, str], ...] = ()
    """(prefix in the checkpoint, prefix in the decoder); the first that fits applies."""
    ignored_prefixes: tuple[str, ...] = ()
    """Tensors of the checkpoint that belong to parts which the decoder does not run."""

    @property
    def q_size(self) -> int:
        """Output features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_dim

    def whole_share(self) -> Share:
        """Describe a rank that holds everything."""
        return Share(
            layers=Span(0, self.num_layers),
            heads=Span(0, self.num_heads),
            kv_heads=Span(0, self.num_kv_heads),
            inner=Span(0, self.intermediate_size),
            vocab=Span(0, self.vocab_size),
        )

    def num_linear_parameters(self) -> int:
        """Count the elements of the matrices that a quantizer stores: all but embedding and head."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def num_parameters(self) -> int:
        """Count the elements of all weights; tied ones once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv_size = self.q_size + 2 * self.kv_size
        attention = hidden * (qkv_size + self.q_size)
        attention += self.qkv_bias * qkv_size + self.out_bias * hidden
        mlp = 3 * hidden * inner + self.mlp_bias * (2 * inner + hidden)
        norms = (4 if self.post_norms else 2) * hidden + self.qk_norm * 2 * self.head_dim
        embeddings = (1 if self.tied else 2) * self.vocab_size * hidden
        return self.num_layers * (attention + mlp + norms) + embeddings + hidden

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain: dict[str, Any] = _to_plain(asdict(self))
        return plain


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    return value
