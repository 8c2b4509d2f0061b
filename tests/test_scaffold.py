"""Starting packages of every kind: clean, installable, conforming, and at work in one engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from core.cli import main
from core.errors import ConfigError
from core.registry import KINDS
from core.scaffold.kinds import STARTERS
from core.scaffold.package import MAX_NAME_LENGTH, NewPackage, make_package

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(400)  # some tests here run those of thirteen packages
NAMES = {kind: f"my_{kind}" for kind in STARTERS}


def run(*arguments, folder, path=()):
    """Run a module of Python, with nothing of this machine's settings."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("CYTHERA_")}
    environ |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603  our own interpreter
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- what is written -------------------------------------------------------------------------------


def test_every_kind_has_a_starting_package():
    assert list(STARTERS) == [*KINDS, "events", "command"]


def test_the_command_says_what_comes_next(tmp_path, capsys):
    assert main(["plugins", "new", "attention", "Acme-Fast", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "cythera-acme-fast"
    title, *commands = capsys.readouterr().out.splitlines()
    assert title == f"made {folder}: the plugin attention.acme_fast. What comes next:"
    assert commands == [
        f'  cd {folder} && python -m pip install -e ".[dev]"',
        "  python -m pytest",
        "  python -m core serve demo --plugins attention.acme_fast",
    ]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "cythera_acme_fast/__init__.py",
        "cythera_acme_fast/backend.py",
        "cythera_acme_fast/py.typed",
        "tests/test_acme_fast.py",
    }


@pytest.mark.parametrize("kind", STARTERS)
def test_metadata_offers_the_plugin(kind, tmp_path):
    package, folder = make_package(kind, "acme", tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["cythera.plugins"] == {package.plugin: "cythera_acme"}
    assert [requirement.partition(">=")[0] for requirement in project["dependencies"]] == ["cythera"]
    assert "cythera[testing]" in project["optional-dependencies"]["dev"]
    assert package.use in (folder / "README.md").read_text()


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        ("atention", "acme", "did you mean attention?"),
        ("thing", "acme", "is none of attention, quant"),
        ("quant", "", "begin with a letter"),
        ("quant", "4bit", "begin with a letter"),
        ("quant", "a/b", "begin with a letter"),
        ("quant", "../up", "begin with a letter"),
        ("quant", "my plugin", "begin with a letter"),
        ("quant", "ünï", "begin with a letter"),
        ("quant", "a-", "begin with a letter"),
        ("quant", "a\n", "begin with a letter"),
        ("quant", "cythera-", "begin with a letter"),
        ("quant", "class", "means something else"),
        ("scheduler", "default", "means something else"),
        ("quant", "x" * (MAX_NAME_LENGTH + 1), f"at most {MAX_NAME_LENGTH}"),
        ("attention", "torch", "attention.torch is a plugin of cythera"),
    ],
)
def test_a_bad_name_is_refused(kind, name, part, tmp_path):
    with pytest.raises(ConfigError) as caught:
        make_package(kind, name, tmp_path)
    assert part in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["acme", "ACME", "cythera-acme", "cythera_acme", "Cythera.Acme"])
def test_names_are_spelled_as_python_does(name, tmp_path):
    package, folder = make_package("events", name, tmp_path)
    assert (package.name, folder.name) == ("acme", "cythera-acme")


def test_a_folder_that_exists_is_left_alone(tmp_path):
    folder = tmp_path / "cythera-acme"
    folder.mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        make_package("events", "acme", tmp_path)
    assert not any(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        make_package("events", "acme", tmp_path / "file")


# --- style -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one package of each kind."""
    folder = tmp_path_factory.mktemp("written")
    for kind, name in NAMES.items():
        make_package(kind, name, folder)
    return folder


@pytest.mark.parametrize("length", [1, MAX_NAME_LENGTH])
def test_linter_and_formatter_have_no_complaints(length, tmp_path):
    for kind in STARTERS:
        make_package(kind, "x" * length, tmp_path / kind)
    run("-m", "ruff", "check", "--no-cache", ".", folder=tmp_path)
    run("-m", "ruff", "format", "--no-cache", "--check", ".", folder=tmp_path)


def test_types_are_right(written):
    packages = [path for path in written.glob("cythera-*/cythera_*") if path.is_dir()]
    assert len(packages) == len(STARTERS)
    run("-m", "mypy", "--config-file", "pyproject.toml", *packages, folder=ROOT)


# --- installed -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(written, tmp_path_factory):
    """A folder that all of them are installed into."""
    target = tmp_path_factory.mktemp("site")
    flags = (
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--no-index",
    )
    packages = sorted(written.iterdir())
    run("-m", "pip", "install", *flags, "--target", target, *packages, folder=written)
    return target


def test_their_own_tests_pass(written, site):
    tests = sorted(written.glob("*/tests"))
    assert len(tests) == len(STARTERS)
    flags = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error")
    run("-m", "pytest", *flags, *tests, folder=written, path=[site])


def test_plugins_check_finds_nothing(site, tmp_path):
    plugins = [NewPackage(kind, name).plugin for kind, name in NAMES.items()]
    shown = run("-m", "core", "plugins", "check", "--json", *plugins, folder=tmp_path, path=[site])
    assert json.loads(shown.stdout) == {plugin: [] for plugin in plugins}


IN_ONE_ENGINE = {
    "attention": {},
    "quant": {"quantization": "my_quant"},
    "scheduler": {"scheduler": "my_scheduler"},
    "kv_cache": {"kv_cache": "my_kv_cache"},
    "executor": {"executor": "my_executor"},
    "sampler": {"sampler": "my_sampler", "plugin_settings": {"sampler.my_sampler": {"n_sigma": 1.0}}},
    "events": {},
}
"""What can work together in one process, and the settings that choose it."""


def test_they_work_together(site, tmp_path):
    plugins = [NewPackage(kind, NAMES[kind]).plugin for kind in IN_ONE_ENGINE]
    settings = {key: value for chosen in IN_ONE_ENGINE.values() for key, value in chosen.items()}
    script = f"""
from core import LLM, SamplingParams
with LLM("demo", plugins={plugins}, num_kv_blocks=64, device="cpu", **{settings}) as llm:
    choices = llm.assembly.plan.choices
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.5, logprobs=1)
    llm.generate(["What does os.path.join do?"], params)
print(*(choices[kind].name for kind in {[kind for kind in IN_ONE_ENGINE if kind != "events"]}))
"""
    done = run("-c", script, folder=tmp_path, path=[site])
    report, chosen = done.stdout.splitlines()
    assert report.startswith("0: 5 tokens in ")
    assert chosen.split() == [NAMES[kind] for kind in IN_ONE_ENGINE if kind != "events"]
