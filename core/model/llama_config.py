"""Llama's config as `transformers` reads it, without the seconds that importing its own class takes.

What is stored in config.json, in whatever spelling, is read by the base class; here are the defaults only.
"""

# Types are checked as they stand here, so annotations must not be left for later.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict  # a field of another type is refused
class LlamaConfig(PreTrainedConfig):
    """Fields of a config.json with `model_type` llama, and what holds where it is silent."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **others: Any) -> None:
        """Derive what is left open."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**others)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Refuse heads that do not divide the hidden size.

        :raises ValueError: with both numbers.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
