"""Decides everything that a configuration leaves open, and collects every reason against it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.config import DEFAULT_ORIGIN
from core.demo import find_model
from core.errors import ConfigError, PlanError, PluginNotFoundError
from core.plan import Choice, Plan
from core.quant.stated import find_quantization
from core.registry import (
    AttentionEntry,
    ModelEntry,
    ParallelEntry,
    PipelineParallelEntry,
    QuantizerEntry,
    Registered,
    Requirements,
    TensorParallelEntry,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.assemble import ActivePlugins
    from core.config import EngineConfig
    from core.model.spec import ModelSpec
    from core.pluginhost import Selected
    from core.sharding import Share, Span


_FIELDS: Final = {
    "attention": "attention_backend",
    "launcher": "distributed_executor_backend",
    "quant": "quantization",
}
"""Settings that are not called as the kind whose part they name."""
_DTYPE_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_KV_DTYPES: Final = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
_GPU_DEFAULTS: Final = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
"""A GPU needs more at the same time to be busy than a CPU."""


class PlanDraft:
    """A plan in the making: collects objections instead of stopping at the first."""

    def __init__(self, config: EngineConfig, active: ActivePlugins) -> None:
        from core.model.families import load_hf_config  # noqa: PLC0415  imports transformers

        self.config = config
        self.host = active.host
        self.registry = active.registry
        self.settings = active.settings
        self.objections: list[str] = []
        self.notes: list[str] = []
        self.choices: dict[str, Choice] = {}
        self.model_path = find_model(config.model)
        self.hf_config = load_hf_config(self.model_path, config.revision)
        self.model = self._read_model()
        self.device = _resolve_device(config.device)
        if self.device.startswith("cuda"):
            self.config = config = config.with_defaults(_GPU_DEFAULTS, "for a GPU")
        self.dtype = _resolve_dtype(config.dtype, self.hf_config)
        self.sizes = {axis: self._choose_parallel(axis) for axis in ("tensor", "pipeline")}
        self.requirements = self._make_requirements()

    def make_plan(self, plugins: tuple[Selected, ...]) -> Plan:
        """Choose every part and every size; what plugins object is left in `objections`.

        :raises PlanError: a part is missing or cannot serve, which everything else depends on.
        """
        self._check_nodes()
        self._choose_quantizer()
        self._choose_attention()
        for kind in ("scheduler", "kv_cache", "executor", "sampler"):
            self._choose_named(kind, getattr(self.config, kind))
        if self.sizes["tensor"] * self.sizes["pipeline"] > 1:
            self._choose_named("launcher", self.config.distributed_executor_backend)
        template = self.config.chat_template
        if template is not None and not Path(template).is_file():
            self.objections.append(f"--chat-template {template}: there is no such file")
        if self.registry.all("server"):
            self._choose_named("server", self.config.server)
        if self.objections:  # the rest of the plan needs every part
            raise PlanError(self.objections)
        shares = self._make_shares()
        return Plan(
            config=self.config,
            model=self.model,
            model_path=self.model_path,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self._resolve_max_model_len(),
            block_size=self._resolve_block_size(),
            weight_bytes=self._weight_bytes(),
            layer_bytes=self._linear_bytes() // self.model.num_layers,
            kv_bytes_per_token=self._kv_bytes_per_token(),
            choices=self.choices,
            plugins=plugins,
            settings=self.settings,
            kv_cache_dtype=self._resolve_kv_cache_dtype(),
            shares=shares,
            tensor_parallel_size=self.sizes["tensor"],
            pipeline_parallel_size=self.sizes["pipeline"],
            quantization=self.requirements.quantization_config,
            notes=tuple(self.notes),
        )

    # --- the model ---

    def _read_model(self) -> ModelSpec:
        model_type = self.hf_config.model_type
        readers = [
            registered
            for registered in self.registry.all("model")
            if isinstance(registered.descriptor, ModelEntry)
            and model_type in registered.descriptor.model_types
        ]
        if not readers:
            raise PlanError([f"{self.config.model}: {self._unread(model_type)}"])
        # A plugin may take over a family that the core reads too.
        chosen = min(readers, key=lambda registered: registered.plugin == "core.builtin")
        self.choices["model"] = Choice("model", chosen, f"reads model_type {model_type!r}")
        spec: ModelSpec = chosen.descriptor.factory(self.hf_config)
        return spec

    def _unread(self, model_type: str) -> str:
        entries = (registered.descriptor for registered in self.registry.all("model"))
        known = sorted(
            {t for entry in entries if isinstance(entry, ModelEntry) for t in entry.model_types}
        )
        return (
            f"model_type {model_type!r} is read by no active plugin; known are {', '.join(known)}; "
            f"a plugin can add it with core_register_models"
        )

    def _make_requirements(self) -> Requirements:
        model, config = self.model, self.config
        quantization = find_quantization(self.hf_config, self.model_path, config.revision)
        return Requirements(
            device=self.device.partition(":")[0],
            dtype=self.dtype,
            head_dims=frozenset({model.head_dim}),
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            kv_cache_dtype=config.kv_cache_dtype,
            has_window=any(layer.window is not None for layer in model.layers),
            has_softcap=model.attention_softcap is not None,
            block_size=config.block_size,
            quantization=config.quantization or quantization.get("quant_method"),
            quantization_config=quantization,
            model_type=model.model_type,
            tensor_parallel_size=self.sizes["tensor"],
            pipeline_parallel_size=self.sizes["pipeline"],
        )

    # --- the parts ---

    def _choose_named(self, kind: str, name: str) -> None:
        """Take the part that the configuration names; `auto` takes the first that can serve."""
        if name == "auto":
            self._choose_auto(kind, self.registry.all(kind))
            return
        try:
            registered = self.registry.get(kind, name)
        except PluginNotFoundError as error:
            self.objections.append(str(error))
            return
        reasons = registered.descriptor.unsupported(self.requirements)
        self.objections += [f"{registered.plugin}: {reason}" for reason in reasons]
        self.choices[kind] = Choice(kind, registered, self._origin(kind))

    def _origin(self, kind: str) -> str:
        return self.config.origin_of(_FIELDS.get(kind, kind))

    def _choose_auto(self, kind: str, candidates: list[Registered]) -> None:
        able, reasons = [], []
        for candidate in candidates:
            problems = candidate.descriptor.unsupported(self.requirements)
            reasons += [f"{candidate.plugin}: {problem}" for problem in problems]
            if not problems:
                able.append(candidate)
        if not able:
            self.objections += reasons or [f"no active plugin provides any {kind}"]
            return
        name = self.host.select_backend(kind, able, self.requirements)
        if name is not None:
            chosen = next(c for c in able if c.descriptor.name == name)
            why = "chosen by a plugin (core_select_backend)"
        else:
            chosen = max(able, key=lambda c: getattr(c.descriptor, "priority", 0))
            why = "the only one that can serve" if len(able) == 1 else "highest priority of those able"
        self.choices[kind] = Choice(kind, chosen, why)

    def _choose_attention(self) -> None:
        self._choose_named("attention", self.config.attention_backend)

    def _choose_quantizer(self) -> None:
        method = self.requirements.quantization
        stored = self.requirements.quantization_config.get("quant_method")
        if method == "none" and stored is None:
            self._choose_named("quant", "none")
            return
        if method is None and stored is None:
            self._choose_auto("quant", self._quantizers_of_plain())
            return
        able: list[Registered] = []
        reasons = []
        for registered in self._quantizers_of(method):
            problems = registered.descriptor.unsupported(self.requirements)
            reasons += [f"{registered.plugin}: {problem}" for problem in problems]
            able += [] if problems else [registered]
        if not able:
            self.objections += reasons or [self._unread_quantization(method, stored)]
            return
        why = "stated by the checkpoint" if stored else self.config.origin_of("quantization")
        self.choices["quant"] = Choice("quant", able[0], why)

    def _quantizers_of_plain(self) -> list[Registered]:
        return [
            registered
            for registered in self.registry.all("quant")
            if getattr(registered.descriptor, "serves_plain", False)
        ]

    def _quantizers_of(self, method: str | None) -> list[Registered]:
        """List the quantizers of that name, or that read that method."""
        stored = self.requirements.quantization_config.get("quant_method")
        found = []
        for registered in self.registry.all("quant"):
            entry = registered.descriptor
            if not isinstance(entry, QuantizerEntry) or method not in {entry.name, *entry.methods}:
                continue
            if stored in entry.methods if stored else entry.can_convert:
                found.append(registered)
        return found

    def _unread_quantization(self, method: str | None, stored: str | None) -> str:
        entries = [r.descriptor for r in self.registry.all("quant")]
        quantizers = [entry for entry in entries if isinstance(entry, QuantizerEntry)]
        if stored and method != stored:
            return (
                f"--quantization {method}: the checkpoint is quantized with {stored!r}, which no active "
                f"quantizer of that name reads; leave the flag away"
            )
        if stored:
            known = ", ".join(sorted({name for entry in quantizers for name in entry.methods}))
            return (
                f"the checkpoint is quantized with {stored!r}, which no active plugin reads (those read "
                f"{known or 'none'}); name one that does with --plugins"
            )
        able = ", ".join(entry.name for entry in quantizers if entry.can_convert) or "none"
        return (
            f"--quantization {method}: the checkpoint is not quantized, and no active quantizer of that "
            f"name converts at load (those that do: {able}); python -m core quantize can write one"
        )

    # --- ranks ---

    def _choose_parallel(self, axis: str) -> int:
        """Choose the strategy of an axis, and how many ranks it is for."""
        flag = f"{axis}_parallel_size"
        size: int = getattr(self.config, flag)
        entries = [
            registered
            for registered in self.registry.all("parallel")
            if isinstance(registered.descriptor, ParallelEntry) and registered.descriptor.axis == axis
        ]
        if not entries:
            return size  # an executor may do without a strategy; else it says what it lacks
        chosen = entries[0]
        wanted = getattr(self.settings.get(chosen.plugin), "size", None)
        if wanted is not None and wanted != size:
            if self.config.origin_of(flag) != DEFAULT_ORIGIN:
                self.objections.append(
                    f"[plugins.{chosen.plugin!r}] size is {wanted}, but {self.config.origin_of(flag)} "
                    f"says {size}; give one of them"
                )
            size = wanted
        if size > 1:
            self.choices[axis] = Choice(axis, chosen, self.config.origin_of(flag))
        return size

    def _check_nodes(self) -> None:
        num_nodes, num_ranks = self.config.nnodes, self.sizes["tensor"] * self.sizes["pipeline"]
        if num_nodes > num_ranks:
            self.objections.append(
                f"--nnodes {num_nodes} is more than the {num_ranks} ranks of --tensor-parallel-size x "
                f"--pipeline-parallel-size"
            )

    def _make_shares(self) -> tuple[Share, ...]:
        """Divide the model over the mesh.

        :raises PlanError: there are more ranks than there is to divide.
        """
        whole = self.model.whole_share()
        rows: Sequence[Share] = (whole,)
        stages: Sequence[Span] = (whole.layers,)
        tensor, pipeline = self.choices.get("tensor"), self.choices.get("pipeline")
        try:
            if tensor and isinstance(tensor.registered.descriptor, TensorParallelEntry):
                divide = tensor.registered.descriptor.divide
                rows = divide(self.model, self.sizes["tensor"], self._cut_step())
            if pipeline and isinstance(pipeline.registered.descriptor, PipelineParallelEntry):
                settings = self.settings.get(pipeline.registered.plugin)
                divide_layers = pipeline.registered.descriptor.divide
                stages = divide_layers(self.model, self.sizes["pipeline"], settings)
        except ConfigError as error:
            raise PlanError([str(error)]) from error
        return tuple(dataclasses.replace(row, layers=layers) for layers in stages for row in rows)

    def _quantizer(self) -> QuantizerEntry | None:
        entry = self.choices["quant"].registered.descriptor
        return entry if isinstance(entry, QuantizerEntry) else None

    def _cut_step(self) -> int:
        entry = self._quantizer()
        return 1 if entry is None else entry.cut_step(self.requirements)

    # --- sizes ---

    def _resolve_block_size(self) -> int:
        entry = self.choices["attention"].registered.descriptor
        asked = self.config.block_size
        if not isinstance(entry, AttentionEntry):
            return asked or 16
        if asked is not None and entry.block_sizes and asked not in entry.block_sizes:
            sizes = ", ".join(map(str, entry.block_sizes))
            self.objections.append(
                f"attention.{entry.name}: --block-size {asked} is not one of its sizes ({sizes})"
            )
        return asked or entry.default_block_size

    def _resolve_max_model_len(self) -> int:
        asked, limit = self.config.max_model_len, self.model.max_position
        if asked is not None and asked > limit:
            self.objections.append(f"--max-model-len {asked} is beyond the model's {limit} positions")
        return asked or limit

    def _weight_bytes(self) -> int:
        num_others = self.model.num_parameters() - self.model.num_linear_parameters()
        return num_others * _DTYPE_BYTES[self.dtype] + self._linear_bytes()

    def _linear_bytes(self) -> int:
        num_linear = self.model.num_linear_parameters()
        entry = self._quantizer()
        bits = None if entry is None else entry.weight_bits(self.requirements)
        return math.ceil(num_linear * (8 * _DTYPE_BYTES[self.dtype] if bits is None else bits) / 8)

    def _resolve_kv_cache_dtype(self) -> str:
        name = self.config.kv_cache_dtype
        return self.dtype if name == "auto" else _KV_DTYPES.get(name, name)

    def _kv_bytes_per_token(self) -> int:
        model = self.model
        size = _DTYPE_BYTES.get(self._resolve_kv_cache_dtype(), _DTYPE_BYTES[self.dtype])
        return 2 * model.num_layers * model.num_kv_heads * model.head_dim * size


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    import torch  # noqa: PLC0415  only to ask for a GPU

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_dtype(dtype: str, hf_config: Any) -> str:
    if dtype != "auto":
        return dtype
    stored = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None)
    name = str(stored or "float32").removeprefix("torch.")
    return name if name in _DTYPE_BYTES else "float32"
