"""Model families: readers of a `transformers` config, by `model_type`.

A reader turns a config into a `ModelSpec` or refuses it, naming the key, its value and what is
supported.  Another family is another `ModelEntry`; most can call `read_decoder` with their flags.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from core.errors import CheckpointError
from core.model.spec import Activation, LayerSpec, ModelSpec, RopeKind, RopeSpec
from core.registry import ModelEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_REFUSED_IF_SET: Final = {
    "num_experts": "dense layers only",
    "num_local_experts": "dense layers only",
    "n_routed_experts": "dense layers only",
    "use_bidirectional_attention": "causal attention only",
}
_SINGLE_ROPE: Final = "default"
_DEFAULT_THETA: Final = 10_000.0


# --- reading config.json ---------------------------------------------------------------------------


def load_hf_config(path: str | PathLike[str], revision: str | None = None) -> Any:
    """Read the config of a checkpoint, in the current or in the older spelling; run none of its code.

    :param path: a folder, or the name of a repository.
    :param revision: branch, tag or commit of the repository.
    :return: a `transformers` config; a generic one if `transformers` does not know the model type,
        so that the reader of a plugin can still interpret it.
    :raises CheckpointError: it is missing or malformed.
    """
    # Slow to import, and not needed to register the families.
    from transformers import PreTrainedConfig  # noqa: PLC0415

    name = str(path)
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise CheckpointError(
            f"{name} does not exist; give a checkpoint's folder, or its id on the hub"
        )
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        model_type = raw.get("model_type")
        if isinstance(model_type, str):
            return _make_config(model_type, raw, name, revision)
    except Exception as error:
        raise CheckpointError(f"cannot read the config.json of {name}: {error}") from error
    raise CheckpointError(f"the config.json of {name} has model_type {model_type!r}; a name is needed")


def _make_config(model_type: str, raw: dict[str, Any], name: str, revision: str | None) -> Any:
    if model_type == "llama":
        from core.model.llama_config import LlamaConfig  # noqa: PLC0415  see load_hf_config

        return LlamaConfig.from_dict(raw, name_or_path=name)
    from transformers import CONFIG_MAPPING, AutoConfig  # noqa: PLC0415  even slower

    if model_type in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return _make_generic_config(model_type, raw)


def _make_generic_config(model_type: str, raw: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig  # noqa: PLC0415  see load_hf_config

    values = {key: value for key, value in raw.items() if key != "model_type"}
    if "rope_parameters" not in values:
        scaling = values.pop("rope_scaling", None) or {}
        values["rope_parameters"] = {
            "rope_type": scaling.get("type", "default"),
            "rope_theta": values.pop("rope_theta", _DEFAULT_THETA),
            **scaling,
        }
    config: Any = PreTrainedConfig.from_dict(values)
    config.model_type = model_type
    return config


def read_model(config: Any, entries: Sequence[ModelEntry] = ()) -> ModelSpec:
    """Read a config with the first of `entries`, else of the built-in families, that knows its type.

    :raises CheckpointError: no family reads it, or the one that does cannot serve it.
    """
    for entry in (*entries, *BUILTIN_MODELS):
        if config.model_type in entry.model_types:
            spec: ModelSpec = entry.factory(config)
            return spec
    known = sorted({name for entry in (*entries, *BUILTIN_MODELS) for name in entry.model_types})
    raise CheckpointError(
        f"model_type {config.model_type!r} is not supported; known are {', '.join(known)}; "
        f"a plugin can add it with core_register_models"
    )


# --- what all families share -----------------------------------------------------------------------


def read_decoder(
    config: Any,
    *,
    can_rotate_partially: bool = False,
    activation_key: str = "hidden_act",
    **family: Any,
) -> ModelSpec:
    """Read what the configs of all families spell alike.

    :param can_rotate_partially: whether `partial_rotary_factor` means something to the family.
    :param activation_key: where the config names the activation.
    :param family: fields of `ModelSpec` that the family fixes.
    :raises CheckpointError: naming the key, its value and what is supported.
    """
    _refuse_features(config)
    num_heads = _positive_int(config, "num_attention_heads")
    num_kv_heads = _positive_int(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = _head_dim(config)
    ropes = _read_ropes(config, can_rotate_partially)
    fields = {
        "model_type": config.model_type,
        "vocab_size": _positive_int(config, "vocab_size"),
        "hidden_size": _positive_int(config, "hidden_size"),
        "intermediate_size": _positive_int(config, "intermediate_size"),
        "num_layers": _positive_int(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position": _max_position(config, ropes),
        "layers": (LayerSpec(None, next(iter(ropes))),) * config.num_hidden_layers,
        "ropes": ropes,
        "attention_scale": head_dim**-0.5,
        "activation": _activation(config, activation_key),
        "norm_eps": _norm_eps(config),
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
    }
    return ModelSpec(**{**fields, **family})


def _refuse_features(config: Any) -> None:
    for key, supported in _REFUSED_IF_SET.items():
        value = getattr(config, key, None)
        if value:
            raise CheckpointError(
                f"{key} {value!r} of {config.model_type} is not supported: {supported}"
            )


def _positive_int(config: Any, key: str) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key} {value!r} of {config.model_type} is not a positive integer")
    return value


def _head_dim(config: Any) -> int:
    if getattr(config, "head_dim", None) is not None:
        return _positive_int(config, "head_dim")
    return _positive_int(config, "hidden_size") // _positive_int(config, "num_attention_heads")


def _norm_eps(config: Any) -> float:
    value = getattr(config, "rms_norm_eps", None)
    if not isinstance(value, (int, float)) or value < 0:
        raise CheckpointError(
            f"rms_norm_eps {value!r} of {config.model_type} is not a number from 0 on"
        )
    return float(value)


def _activation(config: Any, key: str) -> Activation:
    value = getattr(config, key, None)
    if value not in _ACTIVATIONS:
        raise CheckpointError(
            f"{key} {value!r} of {config.model_type} is not supported; known are {_listed(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def _same_window(config: Any) -> tuple[LayerSpec, ...]:
    """Layers that all have the config's sliding window, if it has one."""
    window = _window(config)
    return (LayerSpec(window, _SINGLE_ROPE),) * _positive_int(config, "num_hidden_layers")


def _typed_layers(config: Any, *, has_typed_ropes: bool = False) -> tuple[LayerSpec, ...]:
    """Layers that `layer_types` tells apart."""
    windows = {"full_attention": None, "sliding_attention": _window(config)}
    if len(config.layer_types) != config.num_hidden_layers:
        raise CheckpointError(
            f"layer_types of {config.model_type} names {len(config.layer_types)} layers, but "
            f"num_hidden_layers is {config.num_hidden_layers}"
        )
    unknown = set(config.layer_types) - set(windows)
    if unknown:
        raise CheckpointError(
            f"layer_types {_listed(unknown)} of {config.model_type} is not supported; known are "
            f"{_listed(windows)}"
        )
    return tuple(
        LayerSpec(windows[kind], kind if has_typed_ropes else _SINGLE_ROPE)
        for kind in config.layer_types
    )


def _window(config: Any) -> int | None:
    if getattr(config, "sliding_window", None) is None:
        return None
    return _positive_int(config, "sliding_window")


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))


# --- rotary embedding ------------------------------------------------------------------------------


def _read_ropes(config: Any, can_rotate_partially: bool) -> dict[str, RopeSpec]:
    """Read one rope for all layers, or one for each of the layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or ()
    if set(parameters).isdisjoint(layer_types):
        return {_SINGLE_ROPE: _read_rope(config, parameters, can_rotate_partially)}
    return {
        kind: _read_rope(config, parameters.get(kind) or {}, can_rotate_partially)
        for kind in sorted(set(layer_types))
    }


def _read_rope(config: Any, parameters: Mapping[str, Any], can_rotate_partially: bool) -> RopeSpec:
    kind: Any = parameters.get("rope_type")
    if kind not in get_args(RopeKind):
        raise CheckpointError(
            f"rope_type {kind!r} of {config.model_type} is not supported; known are "
            f"{_listed(get_args(RopeKind))}"
        )
    share = parameters.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not can_rotate_partially:
        raise CheckpointError(
            f"partial_rotary_factor {share!r} of {config.model_type} is not supported: only 1.0"
        )
    rope = RopeSpec(
        kind=kind,
        theta=_positive_number(config, parameters, "rope_theta"),
        rotary_dim=int(_head_dim(config) * share),
    )
    if rope.rotary_dim % 2 or not rope.rotary_dim:
        raise CheckpointError(
            f"head_dim {_head_dim(config)} with partial_rotary_factor {share} rotates "
            f"{rope.rotary_dim} dimensions; an even number above 0 is needed"
        )
    return _with_scaling(rope, config, parameters)


def _with_scaling(rope: RopeSpec, config: Any, parameters: Mapping[str, Any]) -> RopeSpec:
    if rope.kind == "default":
        return rope
    if rope.kind == "longrope":
        return _with_longrope(rope, config, parameters)
    if rope.kind == "yarn":
        return _with_yarn(rope, config, parameters)
    rope = replace(rope, factor=_positive_number(config, parameters, "factor"))
    if rope.kind == "dynamic":
        return replace(rope, original_max_position=_positive_int(config, "max_position_embeddings"))
    if rope.kind == "llama3":
        return replace(
            rope,
            original_max_position=_original_max_position(config, parameters),
            low_freq_factor=_positive_number(config, parameters, "low_freq_factor"),
            high_freq_factor=_positive_number(config, parameters, "high_freq_factor"),
        )
    return rope


def _with_yarn(rope: RopeSpec, config: Any, parameters: Mapping[str, Any]) -> RopeSpec:
    """Fill in YaRN's numbers; see arXiv:2309.00071."""
    original = _original_max_position(config, parameters)
    factor = _factor_or_ratio(config, parameters, original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = _yarn_mscale(factor)
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return replace(
        rope,
        factor=factor,
        original_max_position=original,
        attention_factor=float(attention_factor),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _with_longrope(rope: RopeSpec, config: Any, parameters: Mapping[str, Any]) -> RopeSpec:
    """Fill in the numbers of LongRoPE; see arXiv:2402.13753."""
    original = _original_max_position(config, parameters)
    factor = _factor_or_ratio(config, parameters, original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        stretch = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    return replace(
        rope,
        factor=factor,
        original_max_position=original,
        attention_factor=float(attention_factor),
        short_factor=_factors(rope, parameters, "short_factor"),
        long_factor=_factors(rope, parameters, "long_factor"),
    )


def _factors(rope: RopeSpec, parameters: Mapping[str, Any], key: str) -> tuple[float, ...]:
    factors = tuple(map(float, parameters.get(key) or ()))
    if len(factors) != rope.rotary_dim // 2:
        raise CheckpointError(
            f"{key} has {len(factors)} numbers; half of the {rope.rotary_dim} rotated dimensions is needed"
        )
    return factors


def _original_max_position(config: Any, parameters: Mapping[str, Any]) -> int:
    return int(_positive_number(config, parameters, "original_max_position_embeddings"))


def _factor_or_ratio(config: Any, parameters: Mapping[str, Any], original: int) -> float:
    if parameters.get("factor") is None:
        return float(_positive_int(config, "max_position_embeddings") / original)
    return _positive_number(config, parameters, "factor")


def _positive_number(config: Any, parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"{key} {value!r} in the rope of {config.model_type} is not above 0")
    return float(value)


def _max_position(config: Any, ropes: Mapping[str, RopeSpec]) -> int:
    """Find the longest sequence.

    By convention a config counts the positions before linear, dynamic and YaRN scaling, except
    where each layer type has a rope of its own.
    """
    limit = _positive_int(config, "max_position_embeddings")
    rope = ropes.get(_SINGLE_ROPE)
    if rope is None:
        return limit
    if rope.kind in ("linear", "dynamic"):
        return int(limit * rope.factor)
    if rope.kind == "yarn":
        return max(limit, int(rope.original_max_position * rope.factor))
    return limit


# --- the families ----------------------------------------------------------------------------------


def read_llama(config: Any) -> ModelSpec:
    """Read Llama 2 and 3, and what is built like them."""
    bias = bool(config.attention_bias)
    return read_decoder(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.mlp_bias))


def read_mistral(config: Any) -> ModelSpec:
    """Read Mistral: a sliding window in every layer, or in none."""
    return read_decoder(config, layers=_same_window(config))


def read_qwen2(config: Any) -> ModelSpec:
    """Read Qwen2 and Qwen2.5: a bias on queries, keys and values."""
    return read_decoder(config, layers=_typed_layers(config), qkv_bias=True)


def read_qwen3(config: Any) -> ModelSpec:
    """Read Qwen3: normalized queries and keys."""
    bias = bool(config.attention_bias)
    layers = _typed_layers(config)
    return read_decoder(config, layers=layers, qkv_bias=bias, out_bias=bias, qk_norm=True)


def read_phi3(config: Any) -> ModelSpec:
    """Read Phi-3 and Phi-4: projections stored fused, part of each head rotated."""
    return read_decoder(
        config,
        can_rotate_partially=True,
        layers=_same_window(config),
        fused_qkv=True,
        fused_gate_up=True,
    )


def read_gemma2(config: Any) -> ModelSpec:
    """Read Gemma 2: two norms around each half of a layer, soft caps, every other layer slides."""
    return read_decoder(
        config,
        layers=_typed_layers(config),
        attention_softcap=config.attn_logit_softcapping,
        **_gemma(config),
    )


def read_gemma3(config: Any) -> ModelSpec:
    """Read the text part of Gemma 3: one rope for sliding layers, another one for the rest.

    Its `attn_logit_softcapping` is not read: `transformers` does not apply it either.
    """
    if config.model_type == "gemma3":
        return _text_part(config)
    layers = _typed_layers(config, has_typed_ropes=True)
    return read_decoder(config, layers=layers, qk_norm=True, **_gemma(config))


def _gemma(config: Any) -> dict[str, Any]:
    bias = bool(config.attention_bias)
    return {
        "attention_scale": _positive_int(config, "query_pre_attn_scalar") ** -0.5,
        "activation_key": "hidden_activation",
        "norm_style": "one_plus",
        "post_norms": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": config.hidden_size**0.5,
        "logit_softcap": config.final_logit_softcapping,
    }


def _text_part(config: Any) -> ModelSpec:
    """Read the decoder of an image-and-text checkpoint, under either of the two naming schemes."""
    return replace(
        read_gemma3(config.text_config),
        model_type=config.model_type,
        tied=bool(config.tie_word_embeddings),
        logit_softcap=None,  # as in transformers, which caps in the text-only model alone
        renames=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
        ignored_prefixes=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    )


BUILTIN_MODELS: Final = (
    ModelEntry(name="llama", factory=read_llama, model_types=("llama",), summary="Llama 2 and 3"),
    ModelEntry(name="mistral", factory=read_mistral, model_types=("mistral",), summary="Mistral, Nemo"),
    ModelEntry(name="qwen2", factory=read_qwen2, model_types=("qwen2",), summary="Qwen2 and Qwen2.5"),
    ModelEntry(name="qwen3", factory=read_qwen3, model_types=("qwen3",), summary="Qwen3, dense"),
    ModelEntry(name="phi3", factory=read_phi3, model_types=("phi3",), summary="Phi-3 and Phi-4"),
    ModelEntry(name="gemma2", factory=read_gemma2, model_types=("gemma2",), summary="Gemma 2"),
    ModelEntry(
        name="gemma3",
        factory=read_gemma3,
        model_types=("gemma3", "gemma3_text"),
        summary="Gemma 3, its text part",
    ),
)
"""The families of the core, registered like those of plugins."""
