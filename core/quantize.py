"""`python -m core quantize`: a checkpoint and a text in, a quantized checkpoint and a report out."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  cyclopts reads the annotations
from typing import Annotated, Any, Final

from cyclopts import Group, Parameter

from core.log import configure_logging
from core.quant.calibration import QuantizeOptions

_DEFAULTS: Final = QuantizeOptions(method="")
_METHOD: Final = Group("Method", sort_key=1)
_TEXT: Final = Group("Text", sort_key=2)
_MODEL: Final = Group("Model", sort_key=3)


def _flag(group: Group, text: str, **settings: Any) -> Parameter:
    return Parameter(group=group, help=text, **settings)


def quantize(
    model: str,
    /,
    *,
    method: Annotated[str, _flag(_METHOD, "Quantizer to write with, such as awq, gptq or fp8.")],
    out: Annotated[Path, _flag(_MODEL, "Folder to write; must be new or empty.", metavar="DIR")],
    calibration: Annotated[
        Path,
        _flag(_TEXT, "Text to calibrate with; .jsonl holds text or messages per line.", metavar="FILE"),
    ],
    bits: Annotated[int, _flag(_METHOD, "Bits of a weight.", metavar="N")] = _DEFAULTS.bits,
    group_size: Annotated[
        int, _flag(_METHOD, "Inputs that share a scale; -1: all of a row.", metavar="N")
    ] = _DEFAULTS.group_size,
    symmetric: Annotated[
        bool | None,
        _flag(
            _METHOD,
            "Whether to do without zero points; unset: as the method likes it.",
            negative="--asymmetric",
        ),
    ] = None,
    act_order: Annotated[
        bool, _flag(_METHOD, "gptq: quantize important inputs first (desc_act).", show_default=False)
    ] = False,
    damp_percent: Annotated[
        float, _flag(_METHOD, "gptq, fp8: damping of the Hessian, as a share of its mean.", metavar="X")
    ] = _DEFAULTS.damp_percent,
    activation_scheme: Annotated[
        str, _flag(_METHOD, "fp8: static or dynamic scales of inputs.", metavar="NAME")
    ] = _DEFAULTS.activation_scheme,
    strategy: Annotated[
        str, _flag(_METHOD, "fp8: what shares a scale: tensor, channel or block.", metavar="NAME")
    ] = _DEFAULTS.strategy,
    kv_cache_dtype: Annotated[
        str, _flag(_METHOD, "fp8 writes scales for a KV cache in FP8 too.", metavar="NAME")
    ] = _DEFAULTS.kv_cache_dtype,
    ignore: Annotated[
        tuple[str, ...],
        _flag(
            _METHOD,
            "Layer to leave as it is: a name, parts of one such as layers.0, or re: and a regular "
            "expression; may be repeated. lm_head always stays.",
            negative=(),
            metavar="NAME",
            show_default=False,
        ),
    ] = (),
    num_samples: Annotated[int, _flag(_TEXT, "Samples to calibrate with.", metavar="N")] = 128,
    sample_len: Annotated[int, _flag(_TEXT, "Tokens of a sample.", metavar="N")] = 512,
    evaluation: Annotated[
        Path | None,
        _flag(
            _TEXT,
            "Text to measure perplexity on; unset: what follows the samples in the calibration text.",
            name="--eval",
            metavar="FILE",
        ),
    ] = None,
    num_eval_samples: Annotated[
        int, _flag(_TEXT, "Most samples to measure with; 0 measures nothing.", metavar="N")
    ] = 64,
    device: Annotated[
        str | None, _flag(_MODEL, "auto, cpu, cuda or cuda:N; unset: a GPU if there is one.")
    ] = None,
    dtype: Annotated[str, _flag(_MODEL, "Type to compute in while calibrating.")] = "float32",
    tokenizer: Annotated[
        str | None, _flag(_MODEL, "Folder or id of the tokenizer; unset: the model's own.")
    ] = None,
    revision: Annotated[
        str | None, _flag(_MODEL, "Branch, tag or commit of the model on the hub.")
    ] = None,
    plugins: Annotated[
        tuple[str, ...],
        _flag(_MODEL, "Plugins, as serve takes them.", negative=(), metavar="A,B", show_default=False),
    ] = (),
) -> None:
    """Quantize a checkpoint, one layer at a time, and report what that did to it.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    # They import torch and transformers, and the help needs neither.
    from core.quant.display import QuantizeDisplay, make_console, print_report  # noqa: PLC0415
    from core.quant.job import QuantizeJob, make_source_config  # noqa: PLC0415

    config = make_source_config(
        model,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        plugins=plugins or None,
    )
    configure_logging(config.log_level, config.log_format)
    options = QuantizeOptions(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damp_percent=damp_percent,
        activation_scheme=activation_scheme,
        strategy=strategy,
        kv_cache_dtype=kv_cache_dtype,
        ignore=ignore,
    )
    job = QuantizeJob(
        config=config,
        options=options,
        out=out,
        calibration=calibration,
        num_samples=num_samples,
        sample_len=sample_len,
        evaluation=evaluation,
        num_eval_samples=num_eval_samples,
    )
    with QuantizeDisplay() as display:
        report = job.run(display.show_layer)
    print_report(make_console(), report)
