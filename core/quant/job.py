"""One run of `python -m core quantize`, from settings to a folder that engines can load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.assemble import ActivePlugins, resolve, start_plugins
from core.config import flag_origin, load_config
from core.demo import find_model
from core.errors import ConfigError
from core.model.kv_scales import COMPRESSED_TENSORS_SCHEME
from core.model.weights import find_checkpoint
from core.quant.checkpoint import (
    check_free,
    copy_side_files,
    new_folder,
    read_config,
    write_config,
    write_json,
)
from core.quant.quality import QualityProbe
from core.quant.report import REPORT_FILE
from core.quant.samples import SampleReader, Samples
from core.quant.stated import find_quantization
from core.quant.writer import FP8, CheckpointQuantizer, Setup, complete_ignore, find_ignored, verify
from core.registry import QuantizerEntry
from core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.config import EngineConfig
    from core.plan import Plan
    from core.quant.calibration import LayerQuantizer, QuantizeOptions
    from core.quant.report import LayerReport, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """What to quantize, how, with which text, and into which folder."""

    config: EngineConfig
    """Of the checkpoint that is read; its device and dtype are those of the calibration."""
    options: QuantizeOptions
    out: Path
    calibration: Path
    num_samples: int = 128
    sample_len: int = 512
    evaluation: Path | None = None
    """Text to measure perplexity on; `None`: what follows the samples in the calibration text."""
    num_eval_samples: int = 64
    """At most; 0 measures nothing."""

    def run(self, report_layer: Callable[[LayerReport, int], None]) -> Report:
        """Quantize.

        :param report_layer: called after each layer with what came of it and the number of layers.
        :raises CytheraError: it cannot be done; then `out` is as it was.
        """
        self._check_numbers()
        check_free(self.out.absolute())
        active = start_plugins(self.config)
        make_writer = _find_writer(active, self.options.method)
        folder = find_checkpoint(find_model(self.config.model), self.config.revision)
        hf_config = read_config(folder)
        _refuse_quantized(hf_config, folder)
        source = resolve(self.config, active).plan
        options = complete_ignore(self.options, source.model)
        ignored = find_ignored(options, self.options.ignore, source)
        quantizer = make_writer(options)
        calibration, probe = self._read_texts(source)
        with new_folder(self.out) as target:
            # Engines read the config first: what they object to is known before hours have passed.
            write_config(target, hf_config, self._make_config(quantizer))
            setup = Setup(
                source=source,
                written=self._plan_written(target, active),
                folder=folder,
                target=target,
                options=options,
                ignored=ignored,
                quantizer=quantizer,
                calibration=calibration,
            )
            report = CheckpointQuantizer(setup, probe).run(
                lambda layer: report_layer(layer, source.model.num_layers)
            )
            write_config(target, hf_config, self._make_config(quantizer))  # now it knows all layers
            copy_side_files(folder, target)
            write_json(target / REPORT_FILE, report.to_dict())
            verify(self._plan_written(target, active), target)
        return report

    def _make_config(self, quantizer: LayerQuantizer) -> dict[str, Any]:
        """Return `quantization_config`, with what its format says of the KV cache."""
        config = quantizer.config()
        has_scales = self.options.kv_cache_dtype == FP8
        if has_scales and config.get("quant_method") == "compressed-tensors":
            config["kv_cache_scheme"] = dict(COMPRESSED_TENSORS_SCHEME)
        return config

    def _check_numbers(self) -> None:
        if self.options.kv_cache_dtype not in ("auto", FP8):
            raise ConfigError(
                f"--kv-cache-dtype {self.options.kv_cache_dtype}: scales are written for {FP8} only"
            )
        lowest = {"num_samples": 1, "sample_len": 2, "num_eval_samples": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)}: at least {least} is needed")

    def _read_texts(self, source: Plan) -> tuple[Samples, QualityProbe | None]:
        """Cut both texts into samples.

        :raises ConfigError: a text is too short or cannot be read, or samples are too long.
        """
        tokenizer = load_tokenizer(
            self.config.tokenizer or source.model_path, revision=self.config.revision
        )
        if tokenizer is None:
            raise ConfigError(f"{source.model_path} has no tokenizer; name one with --tokenizer")
        if self.sample_len > source.max_model_len:
            raise ConfigError(
                f"--sample-len {self.sample_len} is beyond the model's {source.max_model_len} positions"
            )
        reader = SampleReader(self.calibration, tokenizer, self.sample_len)
        calibration = reader.take_all(self.num_samples)
        if self.num_eval_samples == 0:
            return calibration, None
        if self.evaluation is not None:
            reader = SampleReader(self.evaluation, tokenizer, self.sample_len)
            samples, name = reader.take_some(self.num_eval_samples), str(self.evaluation)
        else:
            samples = reader.take(self.num_eval_samples)
            name = f"{self.calibration}, after the samples for calibration"
        return calibration, QualityProbe(samples, name) if len(samples.tokens) else None

    def _plan_written(self, target: Path, active: ActivePlugins) -> Plan:
        """Plan an engine for the checkpoint to be, whose config is written already.

        :raises PlanError: no active plugin would read it.
        """
        config = load_config({**_given(self.config), "model": str(target)})
        return resolve(config, active).plan


def make_source_config(model: str, **settings: object) -> EngineConfig:
    """Make the configuration of the checkpoint to read: one rank, in float32 unless told otherwise.

    :param settings: of `EngineConfig`; a `None` leaves one to the environment.
    :raises ConfigError: a setting is unknown or malformed.
    """
    given = {"model": model, "dtype": "float32", **settings}
    one_rank = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return load_config({**given, **one_rank}, environ=os.environ, origin=flag_origin)


def _given(config: EngineConfig) -> dict[str, object]:
    names = ("dtype", "device", "plugins", "plugin_settings", "max_model_len")
    return {name: getattr(config, name) for name in names}


def _find_writer(active: ActivePlugins, method: str) -> Callable[[QuantizeOptions], LayerQuantizer]:
    """Find who writes a method.

    :raises PluginNotFoundError: no active quantizer has that name.
    :raises ConfigError: the one that has only reads.
    """
    entry = active.registry.get("quant", method).descriptor
    if isinstance(entry, QuantizerEntry) and entry.make_writer is not None:
        return entry.make_writer
    entries = [registered.descriptor for registered in active.registry.all("quant")]
    able = [e.name for e in entries if isinstance(e, QuantizerEntry) and e.make_writer is not None]
    raise ConfigError(
        f"--method {method}: it only reads checkpoints; those that write are {', '.join(able) or 'none'}"
    )


def _refuse_quantized(hf_config: dict[str, object], folder: Path) -> None:
    stated = find_quantization(hf_config, str(folder))
    if stated:
        method = stated.get("quant_method", "quantization_config")
        raise ConfigError(
            f"{folder} is quantized already ({method}); quantize the checkpoint that it was made of"
        )
