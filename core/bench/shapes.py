"""Folders that hold the config of a well-known model and no weights: `python -m core bench model`.

With `--load-format dummy` an engine fills such a model with random weights, so that its speed can be
measured without a download.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one model of the Llama family."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float


SHAPES: Final = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 500000.0),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, 10000.0),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000, 10000.0),
    "34b": Shape(8192, 22016, 48, 64, 8, 32000, 1000000.0),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, 500000.0),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256, 500000.0),
}
"""8b, 70b and 405b are those of Llama 3.1, 7b and 13b of Llama 2, 34b of Code Llama."""

QUANTIZATION: Final[dict[str, dict[str, Any] | None]] = {
    "bf16": None,
    "fp16": None,
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
    },
}
HALF: Final = frozenset({"fp16", "awq", "gptq"})
"""Weights whose activations are float16, as those who publish such checkpoints have them."""


def make_config(size: str, quant: str, max_len: int) -> dict[str, Any]:
    """Make the `config.json` of a model.

    :param max_len: longest sequence in tokens.
    """
    shape = SHAPES[size]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "vocab_size": shape.vocab_size,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": max_len,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16" if quant in HALF else "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if QUANTIZATION[quant] is not None:
        config["quantization_config"] = QUANTIZATION[quant]
    return config


def write_model(folder: Path, size: str, quant: str = "bf16", *, max_len: int = 8192) -> Path:
    """Write the folder of a model that has a config alone.

    :param folder: made if it does not exist.
    :return: the file that was written.
    :raises ConfigError: size or quantization are unknown, or the folder holds another model.
    """
    for name, value, known in (("size", size, SHAPES), ("quant", quant, QUANTIZATION)):
        if value not in known:
            raise ConfigError(f"--{name} {value} is unknown; there are {', '.join(known)}")
    file = folder / "config.json"
    text = json.dumps(make_config(size, quant, max_len), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{folder} holds another model already; name a new folder")
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    return file
