from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "train_demo_model"
LENGTH = 32
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def modules():
    """The example's modules, which import one another as scripts do; gone again afterwards."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    saved = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    loaded = type("Modules", (), {name: importlib.import_module(name) for name in names})
    yield loaded
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]
    sys.modules.update(saved)


def run(script, **options):
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v)) if w != "True"]
    command = [sys.executable, str(FOLDER / script), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  ours


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for path in [*(ROOT / "core").glob("*.py"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def prepared(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    run("prepare.py", folder=texts, out=out, vocab_size=384)
    return out


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    shape = {"hidden": 64, "layers": 2, "batch": 4, "length": LENGTH}
    run(
        "train.py",
        data=prepared,
        out=out,
        device="cpu",
        minutes=0.03,
        no_compile=True,
        max_shard_mb=0.1,
        **shape,
    )
    return out


@pytest.fixture(scope="module")
def finished(prepared, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "model"
    run("finish.py", data=prepared, trained=trained, out=out)
    return out


# --- the whole way ---------------------------------------------------------------------------------


def test_streams_are_documents_between_their_marks(modules, prepared):
    manifest = modules.storage.read_manifest(prepared)
    for name, part in ((modules.storage.TRAIN, "train"), (modules.storage.HELD_OUT, "heldout")):
        ids = modules.storage.read_tokens(prepared / name)
        assert len(ids) == sum(kind["num_tokens"] for kind in manifest[part])
        assert ids.max() < manifest["vocab_size"]
        if len(ids):
            is_end = ids == modules.vocab.EOS_ID
            assert ids[0] == modules.vocab.BOS_ID
            assert is_end[-1]
            assert (ids[1:][is_end[:-1]] == modules.vocab.BOS_ID).all()


def test_held_out_texts_are_measured_under_their_own_kind(modules, tmp_path):
    def make(kind):
        candidates = (
            modules.corpus.Document(kind, "x", str(i), f"{kind} number {i}") for i in range(9999)
        )
        return next(document for document in candidates if document.is_held_out)

    documents = [make(kind) for kind in ("chat", "code", "docs", "code")]
    trained_on = modules.corpus.Document("docs", "x", "y", "something to train on")
    assert not trained_on.is_held_out
    tokenizer = modules.vocab.train_tokenizer(iter([d.text for d in documents]), 300)
    sizes = modules.prepare.write_streams(tokenizer, [*documents, trained_on], tmp_path)
    modules.storage.write_json(tmp_path / "sizes.json", sizes)
    ids = modules.storage.read_tokens(tmp_path / modules.storage.HELD_OUT).tolist()
    offset = 0
    for part in json.loads((tmp_path / "sizes.json").read_text())["heldout"]:
        text = tokenizer.decode(ids[offset : (offset := offset + part["num_tokens"])])
        assert text == "".join(d.text for d in documents if d.kind == part["kind"])
        assert len(text.encode()) == part["num_bytes"]
    assert offset == len(ids)


def test_loss_falls_below_that_of_guessing(trained, prepared, modules):
    result = json.loads((trained / "result.json").read_text())
    parts = modules.storage.read_manifest(prepared)["heldout"]
    assert result["num_steps"] > 5
    assert result["heldout"]["all"]["loss"] < 0.9 * torch.log(torch.tensor(384.0)).item()
    assert list(result["heldout"]) == [*(part["kind"] for part in parts), "all"]


def test_transformers_computes_the_loss_that_was_measured(finished, trained, prepared, modules):
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    ids = torch.from_numpy(modules.storage.read_tokens(prepared / modules.storage.HELD_OUT))
    total, count, offset = 0.0, 0, 0
    for part in modules.storage.read_manifest(prepared)["heldout"]:
        stream = ids[offset : (offset := offset + part["num_tokens"])]
        for start in range(0, max(len(stream) - LENGTH, 1), LENGTH):
            window = stream[None, start : start + LENGTH + 1].long()
            with torch.no_grad():
                logits = model(window[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    measured = json.loads((trained / "result.json").read_text())["heldout"]["all"]
    assert count == measured["num_tokens"]
    assert total / count == pytest.approx(measured["loss"], abs=1e-4)


def test_folder_is_complete_and_the_card_says_what_went_in(finished, prepared, modules):
    assert {path.name for path in finished.iterdir()} == FILES
    card = (finished / "README.md").read_text()
    for source in modules.storage.read_manifest(prepared)["sources"]:
        assert source["name"] in card
        assert source["licence"] in card
    assert "bits of a byte" in card


def test_shards_hold_what_the_index_says(trained):
    index = json.loads((trained / "model.safetensors.index.json").read_text())
    shards = {path.name for path in trained.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) > 1
    assert not (trained / "model.safetensors").exists()


def test_engine_serves_the_folder(finished):
    with LLM(str(finished), plugins=["attention.torch"]) as llm:
        [output] = llm.generate(["def "], SamplingParams(temperature=0.0, max_tokens=8))
    assert len(output.outputs[0].token_ids) in range(1, 9)


def test_chat_template_renders_what_was_trained_on(finished, modules):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi, {{ 1 }}!"},
        {"role": "assistant", "content": "Hello."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == modules.vocab.BOS + modules.vocab.render_chat(messages)
    opened = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizer_gives_every_text_back(finished_tokenizer, text):
    ids = finished_tokenizer.encode(text, add_special_tokens=False).ids
    assert finished_tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def finished_tokenizer(finished):
    return AutoTokenizer.from_pretrained(finished).backend_tokenizer


# --- sources ---------------------------------------------------------------------------------------


def test_table_lists_each_distribution_once_under_a_permissive_licence(modules):
    sources = modules.fetch.load_table()
    keys = [(source.kind, source.name) for source in sources]
    assert len(set(keys)) == len(keys)
    assert {source.licence for source in sources} == {
        "PSF-2.0",
        "BSD",
        "MIT",
        "Apache-2.0",
        "Biopython",
    }
    assert {source.kind for source in sources} == set(modules.fetch.SUFFIXES)


@pytest.mark.parametrize(
    ("distribution", "archive", "version"),
    [
        (("wheel", "scikit-learn"), "scikit_learn-1.7.0-cp311-cp311-linux_x86_64.whl", "1.7.0"),
        (("sdist", "factory-boy"), "factory-boy-3.3.0.tar.gz", "3.3.0"),
        (("sdist", "django"), "django-5.2.tar.gz", "5.2"),
        (("deb", "python-x-doc"), "python-x-doc_1%3a2.0-1_all.deb", "1:2.0-1"),
    ],
)
def test_downloads_in_the_cache_are_found(modules, tmp_path, distribution, archive, version):
    folder = tmp_path / distribution[0]
    folder.mkdir()
    (folder / archive).touch()
    source = modules.fetch.Source(*distribution, "MIT")
    [found] = modules.fetch.fetch_all([source], tmp_path)
    assert (found.path, found.version) == (folder / archive, version)


def test_a_download_of_a_longer_name_is_another(modules, tmp_path):
    (tmp_path / "django_extensions-1.0.tar.gz").touch()
    assert modules.fetch._find(modules.fetch.Source("sdist", "django", "BSD"), tmp_path) is None


def test_archives_are_read_without_being_unpacked(modules, tmp_path):
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../x.py", "print('ä')")
        archive.writestr("latin.py", "ä".encode("latin-1"))
        archive.writestr("x.so", "binary")
    source = modules.fetch.Source("wheel", "x", "MIT", path)
    assert list(modules.fetch.read_texts(source)) == [("../x.py", "print('ä')")]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- corpus ----------------------------------------------------------------------------------------


def prose(seed, num_lines=30):
    return "\n".join(
        f"Line {seed} and {i} says that {chr(97 + i % 26) * 3} is a word of its own."
        for i in range(num_lines)
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("pkg/module.py", "code"),
        ("docs/guide.rst", "docs"),
        ("usr/share/doc/x/html/_sources/a.rst.txt", "docs"),
        ("docs/topics/forms.txt", "docs"),
        ("pkg/data.txt", None),
        ("pkg/tests/module.py", None),
        ("pkg/test_module.py", None),
        ("pip/_vendor/x.py", None),
        ("docs/changelog.rst", None),
        ("LICENSE.txt", None),
    ],
)
def test_paths_decide_what_is_read(modules, path, kind, monkeypatch):
    monkeypatch.setattr(modules.corpus, "is_worth_reading", lambda _: True)
    document = modules.corpus.make_document("x", path, prose(1))
    assert (document and document.kind) == kind


def test_tables_dumps_and_other_languages_are_refused(modules):
    text = (ROOT / "core" / "scheduler.py").read_text()
    assert modules.corpus.is_worth_reading(text)
    numbers = "".join(f"{i * i}, {i * 7 % 1001},\n" for i in range(500))
    for other in (
        numbers,
        "the same line again and again\n" * 200,
        "Überall größere Fußgänger.\n" * 40,
        text[:50],
    ):
        assert not modules.corpus.is_worth_reading(other)
    assert not modules.corpus.is_worth_reading("x" * 700 + text)


def test_tidying_keeps_code_and_drops_the_notice(modules):
    code = '"""Doc."""\n\n\ndef f():\n    return 1\n'
    assert modules.corpus.tidy_code("# Copyright X\n# All rights.\n\n" + code) == code
    assert modules.corpus.tidy_code("# About f.\n" + code) == "# About f.\n" + code
    assert (
        modules.corpus.tidy_docs(".. _x:\n\nSee :func:`~a.b` and :ref:`this <x>`.")
        == "See `a.b` and `this`.\n"
    )


def test_duplicates_are_refused_and_new_texts_are_not(modules):
    make, kept = modules.corpus.Document, modules.corpus.DuplicateFilter()
    first, other = prose(1), prose(2)
    assert kept.admit(make("docs", "x", "a", first))
    assert not kept.admit(make("docs", "y", "b", first + "\nOne line that nobody has seen before."))
    assert kept.admit(make("docs", "y", "c", other))
    assert kept.admit(make("docs", "y", "d", first + "\n" + prose(3, 40)))


@given(sizes=st.lists(st.tuples(st.sampled_from(["code", "docs"]), st.integers(1, 50)), max_size=20))
def test_sources_are_capped_whatever_their_order(modules, sizes):
    documents = [modules.corpus.Document(k, "x", str(i), "y" * n) for i, (k, n) in enumerate(sizes)]
    limits = {"code": 60, "docs": 90}
    kept = modules.corpus.cap_sources(documents, limits)
    for kind, limit in limits.items():
        assert sum(len(d.text) for d in kept if d.kind == kind) <= limit
    assert modules.corpus.cap_sources(documents[::-1], limits) == kept
    if all(sum(n for k, n in sizes if k == kind) <= limit for kind, limit in limits.items()):
        assert sorted(d.path for d in kept) == sorted(d.path for d in documents)


# --- conversations ---------------------------------------------------------------------------------

CODE = '''
"""Tools for counting."""

def count_words(text, lower=True):
    """Count the words of a text.

    More about it.
    """
    words = text.lower().split() if lower else text.split()
    return len(words)

def _secret():
    """Do what nobody asks about."""

class Box:
    """A box that holds things."""

    def open(self):
        """Open the box and look inside."""

    def _hidden(self):
        """Nobody asks about this one."""
'''


def test_docstrings_become_questions(modules):
    pairs = modules.mining.mine(modules.corpus.Document("code", "x", "pkg-1.0/src/pkg/tools.py", CODE))
    questions = "\n".join(question for question, _ in pairs)
    answers = "\n".join(answer for _, answer in pairs)
    for name in ("pkg.tools.count_words", "pkg.tools.Box.open", "pkg.tools.Box"):
        assert name in questions
    assert "count the words of a text" in questions
    assert "```python\ndef count_words(text, lower=True):" in answers
    assert "_hidden" not in questions + answers
    assert "_secret" not in questions + answers
    assert pairs == modules.mining.mine(
        modules.corpus.Document("code", "x", "pkg-1.0/src/pkg/tools.py", CODE)
    )


def test_code_that_is_none_gives_nothing(modules):
    assert modules.mining.mine(modules.corpus.Document("code", "x", "a.py", "print 'hello'")) == []


def test_glossaries_and_sections_become_questions(modules):
    glossary = (
        "Glossary\n\n.. glossary::\n\n   iterator\n"
        "      An object that represents a stream of data and returns one item of it at a time.\n"
    )
    pairs = modules.mining.mine(modules.corpus.Document("docs", "x", "html/glossary.rst.txt", glossary))
    assert pairs
    assert all("iterator" in q and a.startswith("An object that") for q, a in pairs)
    section = (
        "Signal handlers\n---------------\n\n"
        "A handler is called by the interpreter when the program is\ninterrupted by one of the signals.\n\n"
    )
    [(question, answer)] = modules.mining.mine(modules.corpus.Document("docs", "x", "a.rst", section))
    assert "Signal handlers" in question
    assert "program is interrupted" in answer


@pytest.mark.parametrize(
    ("verb", "third"),
    [("return", "returns"), ("pass", "passes"), ("copy", "copies"), ("play", "plays")],
)
def test_third_person(modules, verb, third):
    assert modules.mining.third_person(verb) == third


def test_written_answers_hold_code_that_compiles():
    table = tomllib.loads((FOLDER / "questions.toml").read_text(encoding="utf-8"))
    for entry in table["howto"]:
        compile(entry["code"], entry["task"], "exec")
    assert all(form.count("{task}") == 1 for form in table["howto_forms"])
    assert all(
        question[0].isupper() or question[0] in "*_" or question.split()[0].islower()
        for entry in [*table["fact"], *table["small_talk"]]
        for question in entry["ask"]
    )


# --- training --------------------------------------------------------------------------------------


@given(
    num_tokens=st.integers(20, 300),
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_a_pass_reads_no_window_twice_and_none_outside(modules, num_tokens, length, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = modules.windows.draw_starts(num_tokens, length, batch, generator)
    num_pieces = (num_tokens - 1) // length - 1
    if num_pieces < batch:
        with pytest.raises(ValueError, match="--batch"):
            next(drawn)
        return
    starts = torch.cat([next(drawn) for _ in range(num_pieces // batch)])
    assert len(starts.unique()) == len(starts)
    assert len((starts % length).unique()) == 1
    tokens = torch.arange(num_tokens)
    inputs, targets = modules.windows.make_windows(tokens, starts, length)
    assert (inputs + 1 == targets).all()
    assert targets.max() < num_tokens


def test_passes_cut_the_stream_at_different_places(modules):
    drawn = modules.windows.draw_starts(300, 16, 17, torch.Generator().manual_seed(0))
    shifts = [next(drawn).remainder(16).unique().tolist() for _ in range(8)]
    assert all(len(shift) == 1 for shift in shifts)
    assert len({shift[0] for shift in shifts}) > 1


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), length=st.integers(1, 12))
def test_every_part_is_measured_by_its_own_tokens(modules, sizes, length):
    class Fake:
        def losses(self, ids, targets):
            assert (ids == targets).all()  # no window may cross from one part into the next
            return targets.flatten().float()

    tokens = torch.repeat_interleave(torch.arange(len(sizes)) + 1, torch.tensor(sizes))
    parts = [{"kind": str(i + 1), "num_tokens": n, "num_bytes": 3 * n} for i, n in enumerate(sizes)]
    args = SimpleNamespace(length=length, batch=2, device="cpu")
    if max(sizes) < 2:
        return
    result = modules.train.evaluate_parts(Fake(), tokens, parts, args)
    assert set(result) == {str(i + 1) for i, n in enumerate(sizes) if n > 1} | {"all"}
    for kind, part in result.items():
        if kind != "all":
            num_windows = max((sizes[int(kind) - 1] - 1) // length, 1)
            assert part["loss"] == int(kind)
            assert part["num_tokens"] == num_windows * min(length, sizes[int(kind) - 1] - 1)
            assert part["bits_per_byte"] == pytest.approx(int(kind) / math.log(2) / 3)
    assert result["all"]["num_tokens"] == sum(p["num_tokens"] for k, p in result.items() if k != "all")


def test_learning_rate_rises_falls_and_ends_at_nothing(modules):
    rates = [modules.train.learning_rate_at(i / 1000) for i in range(1001)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(1, abs=0.01)
    assert peak == pytest.approx(1000 * modules.train.WARM_UP, abs=1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_default_shape_is_that_of_the_bundled_model(modules):
    config = modules.train.make_config(384, 6, 4096)
    assert config == modules.model.ModelConfig()
    with pytest.raises(ValueError, match="--hidden 100"):
        modules.train.make_config(100, 6, 4096)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 60))
def test_shards_keep_order_and_limit(modules, sizes, limit):
    tensors = {str(i): torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    shards = modules.checkpoint.split_tensors(tensors, limit / 1e6)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert all(len(shard) == 1 or sum(t.numel() for t in shard.values()) <= limit for shard in shards)
