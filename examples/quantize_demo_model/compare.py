"""Quantize a model in several ways, and compare how well each predicts text that none of them has seen."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core import LLM
from core.quant.calibration import QuantizeOptions
from core.quant.job import QuantizeJob, make_source_config
from core.quant.perplexity import measure
from core.quant.report import REPORT_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.quant.perplexity import Score

PLAIN_BITS: Final = 16.0


@dataclass(frozen=True)
class Way:
    """One way to quantize."""

    name: str
    written: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `QuantizeOptions` to write a checkpoint with; empty: the model is used as it is."""
    served: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the engine."""
    bits: float | None = None
    """Bits per weight, if no report tells them."""


GPTQ: Final = {"method": "gptq"}
AWQ: Final = {"method": "awq"}
FP8: Final = {"method": "fp8"}
STATIC: Final = {"activation_scheme": "static"}
ZEROS: Final = {"symmetric": False}
KEEP: Final = {"plugin_settings": {"quant.fp8": {"activations": "keep"}}}
WAYS: Final = (
    Way("not quantized", bits=PLAIN_BITS),
    Way("fp8 at load", served={"quantization": "fp8"}, bits=8.0),
    Way("fp8 at load, inputs kept", served={"quantization": "fp8", **KEEP}, bits=8.0),
    Way("fp8, scale per row, dynamic", written=FP8),
    Way("fp8, scale per row, static", written=FP8 | STATIC),
    Way("fp8, scale per tensor, static", written=FP8 | STATIC | {"strategy": "tensor"}),
    Way("fp8, scale per block, dynamic", written=FP8 | {"strategy": "block"}),
    Way("gptq, 8 bits", written=GPTQ | {"bits": 8}),
    Way("gptq, 4 bits", written=GPTQ),
    Way("gptq, 4 bits, act order", written=GPTQ | {"act_order": True}),
    Way("gptq, 4 bits, zero points", written=GPTQ | ZEROS),
    Way("gptq, 4 bits, zero points, groups of 32", written=GPTQ | ZEROS | {"group_size": 32}),
    Way("awq, 4 bits", written=AWQ),
    Way("awq, 4 bits, groups of 32", written=AWQ | {"group_size": 32}),
    Way("gptq, 3 bits, zero points", written=GPTQ | ZEROS | {"bits": 3}),
    Way("gptq, 2 bits, zero points", written=GPTQ | ZEROS | {"bits": 2}),
)
"""Groups have 128 inputs where nothing else is said."""


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--eval", type=Path, required=True, help="text to predict")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints; used again if there"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="to calibrate with")
    parser.add_argument("--num-eval-samples", type=int, help="default: the whole text")
    parser.add_argument("--sample-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the engine that predicts")
    parser.add_argument("--only", action="append", default=[], help="ways that have this in their name")
    return parser.parse_args(words)


def write(way: Way, args: argparse.Namespace) -> str:
    """Quantize the model unless that is done already.

    :return: the folder to load.
    """
    if not way.written:
        return str(args.model)
    out = args.out / way.name.replace(", ", "-").replace(" ", "-")
    if not (out / REPORT_FILE).is_file():
        QuantizeJob(
            config=make_source_config(args.model, device=args.device),
            options=QuantizeOptions(**way.written),
            out=out,
            calibration=args.calibration,
            num_samples=args.num_samples,
            sample_len=args.sample_len,
            num_eval_samples=0,
        ).run(lambda _layer, _count: None)
    return str(out)


def predict(way: Way, folder: str, args: argparse.Namespace) -> Score:
    """Let an engine predict the text."""
    settings = {"device": args.device, "dtype": args.dtype, "log_level": "warning", **way.served}
    with LLM(folder, **settings) as llm:
        return measure(llm, args.eval, sample_len=args.sample_len, num_samples=args.num_eval_samples)


def bits_of(way: Way, folder: str) -> float:
    """Bits of a weight, scales included."""
    if way.bits is not None:
        return way.bits
    report = json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))
    return float(report["bits_per_weight"])


def main(words: Sequence[str] | None = None) -> None:
    """Print a row of Markdown for each way, the first of which the others are compared with."""
    args = parse_arguments(words)
    print("| weights | bits per weight | perplexity | change | same best token |")
    print("|---|---:|---:|---:|---:|")
    plain, *others = WAYS
    base = predict(plain, write(plain, args), args)
    chosen = [way for way in others if not args.only or any(part in way.name for part in args.only)]
    for way in (plain, *chosen):
        folder = write(way, args)
        score = base if way is plain else predict(way, folder, args)
        change, agreement = score.perplexity / base.perplexity - 1, score.agreement(base)
        cells = f"{bits_of(way, folder):.2f} | {score.perplexity:.3f} | {change:+.2%} | {agreement:.1%}"
        print(f"| {way.name} | {cells} |", flush=True)
    print(f"\n{base.num_tokens} tokens predicted")


if __name__ == "__main__":
    main()
