from __future__ import annotations

import importlib.util
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from core.quant.calibration import QuantizeOptions
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "quantize_demo_model"


def load(name):
    spec = importlib.util.spec_from_file_location(f"quantize_demo_model_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What `train_demo_model/prepare.py` writes, as far as it is read here."""
    folder = make_tokenizer("byte-level", tmp_path_factory.mktemp("data"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, word in {"train.bin.xz": "calibration ", "heldout.bin.xz": "prediction "}.items():
        tokens = np.array(tokenizer.encode(word * 1500, add_special_tokens=False).ids, "<u2")
        (folder / name).write_bytes(lzma.compress(tokens.tobytes()))
    return folder


@pytest.fixture(scope="module")
def texts(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts")
    words = sys.argv
    sys.argv = ["texts.py", "--data", str(data), "--out", str(out), "--num-tokens", "2048"]
    try:
        load("texts").main()
    finally:
        sys.argv = words
    return out


def test_texts_come_from_the_streams_that_are_meant(texts):
    assert "calibration calibration" in (texts / "calibration.txt").read_text()
    assert "prediction prediction" in (texts / "heldout.txt").read_text()


def test_installed_code_is_divided_as_the_training_divides_it(tmp_path):
    texts = load("texts")
    texts.write_code(["structlog"], tmp_path, 9000)
    calibration, heldout = ((tmp_path / name).read_text() for name in texts.FILES)
    assert len(calibration) > 20_000
    assert len(heldout) > 2_000  # one file in many is held out
    files = texts.find_code([])
    assert not set(files["calibration.txt"]) & set(files["heldout.txt"])
    with pytest.raises(SystemExit, match="no such package"):
        texts.find_code(["nothing_of_that_name"])


def test_pieces_are_spread_over_the_stream():
    tokens = np.arange(10 * 1024 + 7, dtype=np.uint16)
    assert load("texts").take_pieces(tokens, 3 * 1024)[:, 0].tolist() == [0, 3 * 1024, 6 * 1024]
    assert load("texts").take_pieces(tokens, 99 * 1024).shape == (10, 1024)
    with pytest.raises(SystemExit, match="less than a piece"):
        load("texts").take_pieces(tokens[:9], 1024)


def test_ways_are_compared_with_the_model_as_it_is(texts, tmp_path, capsys):
    model = make_checkpoint("llama3", tmp_path / "model", vocab_size=400)
    make_tokenizer("byte-level", model)
    words = [
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    words += ["--calibration", str(texts / "calibration.txt"), "--eval", str(texts / "heldout.txt")]
    words += ["--num-samples", "4", "--num-eval-samples", "4", "--sample-len", "32"]
    compare = load("compare")
    compare.main([*words, "--only", "at load", "--only", "row, dynamic"])
    _, _, plain, at_load, kept, written, _, last = capsys.readouterr().out.splitlines()
    assert "| 16.00 |" in plain
    assert plain.endswith("| +0.00% | 100.0% |")
    assert len({row.split("|")[3] for row in (plain, at_load, kept, written)}) == 4
    assert last == f"{4 * 31} tokens predicted"
    assert (tmp_path / "out" / "fp8-scale-per-row-dynamic" / "config.json").is_file()


def test_all_ways_have_options_that_there_are():
    compare = load("compare")
    for way in compare.WAYS:
        if way.written:
            QuantizeOptions(**way.written)
    assert len({way.name for way in compare.WAYS}) == len(compare.WAYS)
