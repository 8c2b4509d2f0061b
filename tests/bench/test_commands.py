from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from core.bench.results import parse_counts, parse_numbers, parse_pairs, write_json
from core.cli import BENCHMARKS, main
from core.errors import ConfigError


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_has_help(name, capsys):
    assert main(["bench", name, "--help"]) == 0
    assert f"Usage: cythera bench {name}" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_numpy():
    code = f"""
        import sys
        from core.cli import main
        for name in {list(BENCHMARKS)}:
            assert main(["bench", name, "--help"]) == 0
        loaded = {{name.partition(".")[0] for name in sys.modules}}
        assert not loaded & {{"torch", "transformers", "plugins", "numpy", "matplotlib"}}, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)  # noqa: S603  ours


@pytest.mark.parametrize("name", ["latency", "throughput", "startup", "kernels"])
def test_those_with_an_engine_take_its_flags(name, capsys):
    assert main(["bench", name, "--help"]) == 0
    words = "".join(capsys.readouterr().out.split()).replace("│", "")
    for flag in ("--config", "--set", "--max-num-seqs", "--load-format", "--kv-cache-dtype"):
        assert flag in words
    assert main(["bench", name, "demo", "--max-num-seqs", "0"]) == 2
    assert "max_num_seqs = '0' (flag --max-num-seqs)" in capsys.readouterr().err


def test_lists_of_numbers():
    assert parse_numbers("--x", "1, 2.5,inf") == [1.0, 2.5, float("inf")]
    assert parse_counts("--x", "1,16") == [1, 16]
    assert parse_pairs("--x", ["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for parse, text in [
        (parse_numbers, ""),
        (parse_numbers, "1,a"),
        (parse_numbers, "nan"),
        (parse_numbers, "-1"),
        (parse_counts, "1.5"),
        (parse_counts, "inf"),
        (parse_pairs, ["a"]),
        (parse_pairs, ["=a"]),
    ]:
        with pytest.raises(ConfigError, match="--x "):
            parse("--x", text)


def test_a_result_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path / "file" / "r.json", {})
