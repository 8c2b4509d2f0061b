"""Tiny checkpoints with tokenizers and texts, and the job that quantizes one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from core.quant.calibration import QuantizeOptions
from core.quant.job import QuantizeJob, make_source_config
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.quant.report import Report

WORDS = ("the", "model", "reads", "a page", "of text", "and", "then", "it writes", "some", "more words")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(5)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (" ".join(draw.choices(WORDS, k=9)) for _ in range(120))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a checkpoint with a tokenizer, once for each family."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, num_shards: int = 1) -> Path:
        if (family, num_shards) not in made:
            folder = tmp_path_factory.mktemp(family)
            make_checkpoint(family, folder, num_shards=num_shards, vocab_size=400)
            make_tokenizer("byte-level", folder)
            made[family, num_shards] = folder
        return made[family, num_shards]

    return make


def make_job(model: Path, out: Path, text: Path, **changes: Any) -> QuantizeJob:
    options = QuantizeOptions(
        **{"method": "rtn8", "bits": 8, "ignore": (), **changes.pop("options", {})}
    )
    values: dict[str, Any] = {
        "config": make_source_config(str(model), plugins=["py:rtn_quantizer"], device="cpu"),
        "options": options,
        "out": out,
        "calibration": text,
        "num_samples": 6,
        "sample_len": 24,
        "num_eval_samples": 4,
    }
    return QuantizeJob(**{**values, **changes})


@pytest.fixture(scope="session")
def quantize() -> Callable[..., Report]:
    """Quantize a checkpoint with the quantizer of the tests."""

    def run(model: Path, out: Path, text: Path, **changes: Any) -> Report:
        return make_job(model, out, text, **changes).run(lambda _layer, _count: None)

    return run
