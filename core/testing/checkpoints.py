"""Tiny random checkpoints of every model family, written and judged by `transformers`.

The weights are large, and norms and biases are random too, so that a forgotten term changes the
logits and the best token is rarely a near tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE: Final = 160
MAX_POSITION: Final = 128
ORIGINAL_MAX_POSITION: Final = 32
"""Of the variants whose rotary frequencies change with length."""
SLIDING_WINDOW: Final = 8

_WEIGHT_STD: Final = 0.2
_SCALED_EMBEDDING_STD: Final = 0.05  # where it is multiplied, or the next token repeats the last
_NORM_STD: Final = 0.3
_BIAS_STD: Final = 0.5


@dataclass(frozen=True, slots=True)
class Variant:
    """The `transformers` config of one tiny model.

    :param settings: what differs from the common small sizes; `rope` goes to `rope_parameters`.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] | None = None

    def make_config(self) -> PreTrainedConfig:
        """Build the config."""
        from transformers import AutoConfig  # noqa: PLC0415  slow to import

        settings = {**_SMALL, **self.settings}
        if self.rope is not None:  # a fresh copy: transformers writes into it
            settings["rope_parameters"] = _copy(self.rope)
        if self.model_type == "gemma3":
            settings = {"text_config": settings, "vision_config": _SMALL_VISION, **_MULTIMODAL}
        config: PreTrainedConfig = AutoConfig.for_model(self.model_type, **settings)
        return config


_SMALL: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL_VISION: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MULTIMODAL: Final[dict[str, Any]] = {
    "mm_tokens_per_image": 4,
    "image_token_index": VOCAB_SIZE - 1,
    "boi_token_index": VOCAB_SIZE - 2,
    "eoi_token_index": VOCAB_SIZE - 3,
    "tie_word_embeddings": True,
}
_GEMMA: Final[dict[str, Any]] = {
    "hidden_size": 48,  # whose root, the embedding scale, no dtype holds exactly
    "head_dim": 16,
    "sliding_window": SLIDING_WINDOW,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
}
_GEMMA3: Final[dict[str, Any]] = {
    **_GEMMA,
    "num_hidden_layers": 4,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
    "final_logit_softcapping": 2.0,
}
_GEMMA3_ROPE: Final[dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}


def _longrope(half_rotary_dim: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.05 * index for index in range(half_rotary_dim)],
        "long_factor": [1.5 + 0.5 * index for index in range(half_rotary_dim)],
    }


FAMILIES: Final[dict[str, Variant]] = {
    "llama2": Variant("llama", {"num_key_value_heads": 4}),
    "llama3": Variant("llama", rope={"rope_type": "default", "rope_theta": 500_000.0}),
    "llama3.1": Variant(
        "llama",
        rope={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_MAX_POSITION,
        },
    ),
    "llama3.2": Variant("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": Variant("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-many-heads": Variant("llama", {"num_attention_heads": 10, "hidden_size": 80}),
    "llama-linear": Variant(
        "llama", rope={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    ),
    "llama-dynamic": Variant(
        "llama",
        {"max_position_embeddings": ORIGINAL_MAX_POSITION},
        rope={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "llama-yarn": Variant(
        "llama",
        rope={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_MAX_POSITION,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
        },
    ),
    "mistral": Variant("mistral", {"sliding_window": SLIDING_WINDOW}),
    "mistral-nemo": Variant("mistral", {"head_dim": 24, "sliding_window": None}),
    "qwen2": Variant("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": Variant(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1},
    ),
    "qwen2.5": Variant(
        "qwen2",
        rope={
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_MAX_POSITION,
        },
    ),
    "qwen3": Variant("qwen3", {"head_dim": 24}),
    "phi3": Variant(
        "phi3", {"original_max_position_embeddings": ORIGINAL_MAX_POSITION}, rope=_longrope(8)
    ),
    "phi3-sliding": Variant("phi3", {"sliding_window": SLIDING_WINDOW}),
    "phi4": Variant(
        "phi3",
        {"original_max_position_embeddings": ORIGINAL_MAX_POSITION, "tie_word_embeddings": True},
        rope={**_longrope(6), "partial_rotary_factor": 0.75},
    ),
    "gemma2": Variant(
        "gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}
    ),
    "gemma3": Variant("gemma3_text", _GEMMA3, _GEMMA3_ROPE),
    "gemma3-multimodal": Variant("gemma3", _GEMMA3, _GEMMA3_ROPE),
}
"""By name: one variant for every behaviour that some family has.

`phi3` and `phi4` (longrope) and `llama-dynamic` rotate short and long sequences differently; see
`reference_logits` for what that means to a server.
"""


def make_checkpoint(
    variant: str, path: Path, *, seed: int = 0, num_shards: int = 1, vocab_size: int = VOCAB_SIZE
) -> Path:
    """Write a random checkpoint of a variant in float32, as `save_pretrained` writes it.

    :param variant: a key of `FAMILIES`.
    :param path: the folder, made if needed.
    :param num_shards: above 1, about so many files and an index.
    :param vocab_size: at least `VOCAB_SIZE`; a tokenizer beside the checkpoint wants as many.
    :return: `path`.
    """
    config = FAMILIES[variant].make_config()
    config.get_text_config().vocab_size = vocab_size
    model = _make_model(config)
    randomize(model, seed)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=-(-num_bytes // num_shards))
    return path


def _make_model(config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  slow to import

    with torch.random.fork_rng(devices=[]):
        factory: Any = AutoModelForCausalLM  # its methods carry no types
        model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights of a model anew, so large and so different that every term shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    is_gemma = model.config.model_type.startswith("gemma")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            is_scaled = is_gemma and "embed_tokens" in name
            parameter.copy_(noise * (_SCALED_EMBEDDING_STD if is_scaled else _WEIGHT_STD))
        elif name.endswith("bias"):
            parameter.copy_(noise * _BIAS_STD)
        else:
            parameter.add_(noise * _NORM_STD)


# --- the reference ---------------------------------------------------------------------------------


def reference_logits(
    path: Path,
    token_ids: Sequence[int],
    *,
    max_model_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Compute the logits of one sequence with `transformers`, without a cache.

    :param max_model_len: rotate as a server does whose sequences have at most so many tokens.
        `transformers` chooses the frequencies of longrope and dynamic scaling anew from the length
        of each forward; a server must not, because it keeps rotated keys.  `None` leaves it so.
    :param dtype: of the weights.
    :return: [T, V] float32.
    """
    return _forward(_load_reference(path, max_model_len, dtype), token_ids)


def reference_generate(
    path: Path, token_ids: Sequence[int], num_tokens: int, *, max_model_len: int | None = None
) -> list[int]:
    """Draw greedily with `transformers` in float32; every token recomputes the whole sequence.

    :param num_tokens: how many; an end-of-sequence token does not stop it.
    :param max_model_len: as in `reference_logits`.
    :return: the new tokens.
    """
    model = _load_reference(path, max_model_len, torch.float32)
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(int(_forward(model, tokens)[-1].argmax()))
    return tokens[len(token_ids) :]


@torch.inference_mode()
def reference_generate_batch(
    path: Path, prompts: Sequence[Sequence[int]], num_tokens: int, *, max_model_len: int
) -> list[list[int]]:
    """Draw greedily for several prompts at once, padded on the right, recomputing everything.

    :param max_model_len: as in `reference_logits`; needed, because padding lengthens the forward.
    :return: the new tokens of each prompt.
    """
    model = _load_reference(path, max_model_len, torch.float32)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()) + num_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    for step in range(num_tokens):
        ends = lengths + step
        # What is behind a row's end is in the future of all that is read, so it need not be masked.
        logits = model(input_ids=tokens[:, : int(ends.max())], use_cache=False).logits
        tokens[rows, ends] = logits[rows, ends - 1].argmax(-1)
    return [row[n : n + num_tokens].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]


def _load_reference(path: Path, max_model_len: int | None, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  slow to import

    config = AutoConfig.from_pretrained(path)
    if max_model_len is not None:
        _fix_rope(config.get_text_config(), max_model_len)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation="eager"
    )
    return model


def _fix_rope(config: PreTrainedConfig, max_model_len: int) -> None:
    """Replace frequencies that depend on length by those for `max_model_len`."""
    for rope in _rope_dicts(config):
        if rope["rope_type"] == "longrope":
            is_long = max_model_len > rope["original_max_position_embeddings"]
            kept = rope["long_factor" if is_long else "short_factor"]
            rope["short_factor"] = rope["long_factor"] = kept
        elif rope["rope_type"] == "dynamic":
            head_dim = getattr(config, "head_dim", None)
            dim = head_dim or config.hidden_size // config.num_attention_heads
            limit = config.max_position_embeddings
            stretch = rope["factor"] * max(max_model_len, limit) / limit - (rope["factor"] - 1)
            rope["rope_theta"] *= stretch ** (dim / (dim - 2))
            rope["rope_type"] = "default"


def _rope_dicts(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from parameters.values()


@torch.inference_mode()
def _forward(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    output = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value
