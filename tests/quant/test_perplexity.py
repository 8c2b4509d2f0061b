"""Perplexity as an engine measures it, against `transformers`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from core import LLM
from core.cli import main
from core.errors import ConfigError, RequestError
from core.quant import perplexity
from core.quant.perplexity import Score, measure
from core.testing.checkpoints import reference_logits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64}


@pytest.fixture(scope="module")
def source(checkpoint) -> Path:
    return checkpoint("llama3")


@pytest.fixture(scope="module")
def llm(source) -> Iterator[LLM]:
    with LLM(str(source), max_model_len=64, **SETTINGS) as engine:
        yield engine


def test_it_is_that_of_transformers(llm, source, text):
    score = measure(llm, text, sample_len=16, num_samples=5)
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    tokens = tokenizer.encode(text.read_text())
    rows = [tokens[:1] + tokens[1 + 15 * i : 16 + 15 * i] for i in range(5)]
    logits = torch.cat([reference_logits(source, row)[:-1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row[1:]])
    assert score.num_tokens == 5 * 15
    assert score.perplexity == pytest.approx(
        math.exp(functional.cross_entropy(logits, targets)), rel=1e-4
    )
    assert score.best == logits.argmax(-1).tolist()


def test_the_whole_text_is_read_in_batches(llm, text, monkeypatch):
    at_once = measure(llm, text, sample_len=32)
    monkeypatch.setattr(perplexity, "SAMPLES_AT_ONCE", 3)
    apart = measure(llm, text, sample_len=32)
    assert apart.num_tokens == at_once.num_tokens > 3 * 31
    assert apart.num_tokens % 31 == 0
    assert apart.loss == pytest.approx(at_once.loss, rel=1e-5)
    assert apart.agreement(at_once) == 1.0


def test_agreement_is_the_share_of_equal_tokens():
    assert Score(4, 1.0, [1, 2, 3, 4]).agreement(Score(4, 9.0, [1, 2, 0, 4])) == 0.75


def test_a_text_shorter_than_a_sample_is_refused(llm, tmp_path):
    (tmp_path / "short.txt").write_text("few")
    with pytest.raises(ConfigError, match="holds 3 tokens, but 31 are needed"):
        measure(llm, tmp_path / "short.txt", sample_len=32)


def test_samples_beyond_the_context_are_refused(llm, text):
    with pytest.raises(RequestError, match="64"):
        measure(llm, text, sample_len=65)


def test_the_command_tells_it(source, text, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    given = [
        "perplexity",
        str(source),
        "--text",
        str(text),
        "--sample-len=16",
        "--num-samples=5",
        *flags,
    ]
    assert main(given) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main([*given, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_tokens"] == 75
    assert answer["perplexity"] > 1
