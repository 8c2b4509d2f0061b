from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
SOURCES = sorted(
    path for folder in ("core", "plugins", "examples") for path in (ROOT / folder).rglob("*.py")
)
TORCH_FREE = (
    "blocks",
    "config",
    "errors",
    "events",
    "hookspecs",
    "kv_cache",
    "pluginhost",
    "registry",
    "request",
    "scheduler",
    "step",
)
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "builtins.eval", "builtins.exec", "pandas.read_pickle"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree):
    """Full names of everything that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name, module):
    return name == module or name.startswith(f"{module}.")


# --- what is packed --------------------------------------------------------------------------------


def test_packages_are_listed_and_complete():
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert include == ["core", "core.*", "plugins", "plugins.*"]
    found = set(setuptools.find_packages(str(ROOT), include=include))
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("core", "plugins")
        for path in (ROOT / name).rglob("*.py")
    }
    assert found == folders, "a folder with modules lacks its __init__.py"
    assert {name.partition(".")[0] for name in found} == {"core", "plugins"}


def test_types_and_readmes_travel_along():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert (ROOT / "core" / "py.typed").exists()
    assert (ROOT / "plugins" / "py.typed").exists()
    for package, patterns in data.items():
        folder = ROOT / package
        travelling = {path for pattern in patterns for path in folder.glob(pattern)}
        files = {
            path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert files == travelling, (
            "a file does not travel along, or a pattern finds what is none of ours"
        )


def test_every_plugin_has_a_readme():
    for point in importlib.metadata.entry_points(group="cythera.plugins"):
        if is_in(point.value, "plugins"):
            assert (ROOT.joinpath(*point.value.split(".")) / "README.md").exists(), point.value


def test_licence_file_is_the_licence_that_is_declared():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- versions, entry points, dependencies ----------------------------------------------------------


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert core.__version__ == version
    assert importlib.metadata.version("cythera") == version


def entry_points():
    project = PROJECT["project"]
    return [*project["scripts"].items(), *project["entry-points"]["cythera.plugins"].items()]


@pytest.mark.parametrize(("name", "target"), entry_points())
def test_entry_points_lead_somewhere(name, target):
    module, _, attribute = target.partition(":")
    found = importlib.import_module(module)
    assert callable(getattr(found, attribute)) if attribute else found.core_api == "1.0"


def test_what_is_installed_offers_the_plugins_that_are_declared():
    declared = PROJECT["project"]["entry-points"]["cythera.plugins"]
    distribution = importlib.metadata.distribution("cythera")
    offered = {p.name: p.value for p in distribution.entry_points if p.group == "cythera.plugins"}
    assert offered == declared


def requirements(extra=""):
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {r.name: r for r in map(Requirement, lines) if r.name != "cythera"}


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {r.name: r for line in lines if line and line[0] != "#" for r in [Requirement(line)]}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    direct = requirements()
    for extra in EXTRAS:
        direct |= requirements(extra)
    pinned = pins()
    assert set(pinned) == set(direct)
    for name, requirement in direct.items():
        [pin] = pinned[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), name


def test_bounds_admit_the_oldest_torch_that_is_used():
    assert requirements()["torch"].specifier.contains("2.11.0")
    assert requirements("cuda")["triton"].specifier.contains("3.6.0")


def test_every_dependency_is_imported_and_every_import_is_a_dependency():
    third_party = set()
    for path in SOURCES:
        names = {name.partition(".")[0] for name in imports_of(parse(path))}
        third_party |= names - set(sys.stdlib_module_names) - {"core", "plugins"}
    distributions = importlib.metadata.packages_distributions()
    installed = [distributions[name][0] for name in third_party if name in distributions]
    needed = {canonicalize_name(name) for name in installed}
    known = set(requirements()).union(*map(requirements, EXTRAS - {"dev"}))
    assert needed <= known
    assert set(requirements()) <= needed


# --- what imports what -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_respect_the_borders(path):
    owner = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(parse(path)):
        if is_in(owner, "core"):
            assert not is_in(name, "plugins"), f"{owner} imports {name}"
        if is_in(owner, "plugins"):
            own = ".".join(owner.split(".")[:3])
            assert not is_in(name, "plugins") or is_in(name, own), f"{owner} imports {name}"


def test_modules_without_torch_really_are():
    modules = [f"core.{name}" for name in TORCH_FREE]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "plugins"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  ours


def test_importing_core_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import core; print(*set(sys.modules) - before)"
    command = [sys.executable, "-S", "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)  # noqa: S603  ours
    third_party = {n.partition(".")[0] for n in done.stdout.split()} - set(sys.stdlib_module_names)
    assert third_party == {"core"}


# --- nothing that runs what comes from outside -----------------------------------------------------


def unsafe_uses(tree):
    """Imports and calls that would run code out of data."""
    for name in imports_of(tree):
        if name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS:
                yield called
            for keyword in node.keywords:
                if keyword.arg in {"allow_pickle", "trust_remote_code"} and not is_false(keyword.value):
                    yield f"{called}({keyword.arg}=…)"


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path):
    assert list(unsafe_uses(parse(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "np.load(f, allow_pickle=True)",
        "AutoConfig.from_pretrained(p, trust_remote_code=flag)",
        "import cloudpickle as cp",
    ],
)
def test_unsafe_code_would_be_found(code):
    assert list(unsafe_uses(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["model.eval()", "json.load(f)", "np.load(f, allow_pickle=False)", "re.compile('x')"],
)
def test_safe_code_is_let_be(code):
    assert list(unsafe_uses(ast.parse(code))) == []


# --- scripts and papers ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_scripts_can_be_run(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    shell = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#!").split()[-1]
    subprocess.run([shell, "-n", str(path)], check=True)  # noqa: S603  ours


def test_coverage_is_demanded_of_every_module_without_torch():
    text = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    covered = set(re.search(r'^covered="(.*)"$', text, re.MULTILINE)[1].split())
    assert covered | {"hookspecs"} == set(TORCH_FREE)  # hookspecs is signatures only
    assert int(re.search(r"^floor=(\d+)$", text, re.MULTILINE)[1]) >= 95


def test_changelog_knows_the_version_or_calls_it_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
