"""The code in the README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("llama3", tmp_path_factory.mktemp("readme") / "model", vocab_size=400)
    make_tokenizer("byte-level", path)
    return path.parent


def run(folder: Path, code: str) -> str:
    script = code.replace("path/to/checkpoint", str(folder / "model"))
    done = subprocess.run(  # noqa: S603  our own README
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_is_known_here() -> None:
    assert len(BLOCKS) == 3


def test_offline(folder: Path) -> None:
    assert re.search(r"\b(length|stop)\b", run(folder, BLOCKS[0]))


def test_stream(folder: Path) -> None:
    assert len(run(folder, BLOCKS[1]).splitlines()) > 1


def test_plugin(folder: Path) -> None:
    (folder / "report_requests.py").write_text(BLOCKS[2])
    code = (
        "from core import LLM, SamplingParams\n"
        "with LLM('path/to/checkpoint', plugins=['py:report_requests']) as llm:\n"
        "    llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))\n"
    )
    assert re.search(r"0: 3 tokens, length, \d+\.\d+ s", run(folder, code))
