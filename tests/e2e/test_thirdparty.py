"""A distribution of somebody else: built, installed beside this one, tested, and served with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess

from core import LLM, SamplingParams

SOURCE = Path(__file__).parents[1] / "thirdparty" / "acme_cythera"
NAMES = ["attention.acme", "quant.acme"]
PROMPT = "import os\n\nos.path."
NUM_TOKENS = 24


def run(*arguments, site=None, **options):
    env = {**os.environ, "PYTEST_ADDOPTS": "-q -p no:cacheprovider"}
    if site is not None:
        env["PYTHONPATH"] = str(site)
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, **options)  # noqa: S603  ours


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, because building leaves files behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    return shutil.copytree(SOURCE, tmp_path_factory.mktemp("acme") / "source", ignore=ignore)


@pytest.fixture(scope="module")
def site(source):
    """The folder that the wheel is installed into."""
    built = source.parent
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    done = run("pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", built, source)
    assert done.returncode == 0, done.stderr
    [wheel] = built.glob("*.whl")
    assert wheel.name == "acme_cythera-0.1.0-py3-none-any.whl"
    done = run("pip", "install", *offline, "--target", built / "site", wheel)
    assert done.returncode == 0, done.stderr
    return built / "site"


def test_it_is_listed_with_its_version(site):
    done = run("core", "plugins", "list", "--json", site=site)
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    for name in NAMES:
        entry = listed[name]
        assert (entry["distribution"], entry["version"]) == ("acme-cythera", "0.1.0")
        assert entry["is_present"]
    assert "attention.torch" in listed


def test_it_is_found_to_be_in_order(site):
    done = run("core", "plugins", "check", *NAMES, "--json", site=site)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [] for name in NAMES}


@pytest.mark.timeout(400)
def test_its_own_tests_pass(site, source):
    done = run("pytest", site=site, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr


# --- served ----------------------------------------------------------------------------------------


@pytest.fixture
def reference(site, monkeypatch):
    """The text that its quantizer gives with our attention."""
    monkeypatch.syspath_prepend(site)
    options = {"quantization": "acme", "dtype": "float32", "device": "cpu", "num_kv_blocks": 64}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM("demo", plugins=["quant.acme"], **options) as llm:
        choices = llm.assembly.plan.choices
        assert (choices["attention"].name, choices["quant"].name) == ("torch", "acme")
        yield llm.generate([PROMPT], params)[0].outputs[0].text
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_cythera"]:
        del sys.modules[name]


def test_it_serves_and_draws_the_tokens_of_our_attention(site, reference, tmp_path):
    flags = ("--quantization", "acme", "--dtype", "float32", "--device", "cpu", "--num-kv-blocks", "64")
    arguments = ("demo", "--plugins", ",".join(NAMES), *flags)
    env = {"PYTHONPATH": str(site)}
    with ServerProcess(*arguments, folder=tmp_path, env=env) as server:
        server.wait_until_ready()
        body = {
            "prompt": PROMPT,
            "temperature": 0,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
        }
        status, _, data = server.get("/v1/completions", body)
        assert status == 200
        assert json.loads(data)["choices"][0]["text"] == reference
        started = [line for line in server.errors.splitlines() if "engine started" in line]
        assert json.loads(started[0])["block_size"] == 32


# --- broken ----------------------------------------------------------------------------------------


@pytest.fixture
def broken(site, tmp_path):
    """Install version 0.2.0, with one change to `acme_cythera.attention`."""

    def make(old, new):
        copy = shutil.copytree(site, tmp_path / "site")
        metadata = (copy / "acme_cythera-0.1.0.dist-info").rename(copy / "acme_cythera-0.2.0.dist-info")
        replace(metadata / "METADATA", "Version: 0.1.0", "Version: 0.2.0")
        replace(copy / "acme_cythera" / "attention.py", old, new)
        return copy

    return make


def replace(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_serving_with_a_broken_version_names_it(broken):
    site = broken('core_api = "1.0"', 'core_api = "2.0"')
    done = run("core", "serve", "demo", "--plugins", "attention.acme", "--port", "0", site=site)
    assert done.returncode == 3
    assert "plugin attention.acme (acme-cythera 0.2.0) breaks the contract" in done.stderr
    assert "written for plugin API 2.0" in done.stderr
    assert "leave attention.acme out of --plugins" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("from core import hookimpl", "import acme_kernels\nfrom core import hookimpl", "acme_kernels"),
        ("@hookimpl\n", "", "core_register_attention is not marked with @core.hookimpl"),
        ('name="acme"', 'name="ac me"', "a descriptor named 'ac me'"),
    ],
)
def test_checking_a_broken_version_says_what_is_wrong(broken, old, new, part):
    done = run("core", "plugins", "check", "attention.acme", "--json", site=broken(old, new))
    assert done.returncode == 3
    [problem] = json.loads(done.stdout)["attention.acme"]
    assert part in problem
