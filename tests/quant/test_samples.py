"""Texts become samples: every token once, in order, after what the tokenizer puts before a text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from core.errors import ConfigError
from core.quant import samples as samples_module
from core.quant.samples import SampleReader
from core.testing.tokenizers import make_tokenizer
from core.tokenizer import Tokenizer, load_tokenizer

LINES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12), max_size=20
)


@cache
def tokenizer() -> Tokenizer:
    folder = make_tokenizer("byte-level", Path(mkdtemp()))
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return loaded


def write(tmp_path: Path, text: str, name: str = "text.txt") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


@given(lines=LINES, length=st.integers(3, 9), counts=st.lists(st.integers(0, 4), max_size=4))
@settings(deadline=None, max_examples=60)
def test_samples_are_the_text_cut_up(tmp_path_factory, lines, length, counts):
    text = "".join(line + "\n" for line in lines)
    file = write(tmp_path_factory.mktemp("text"), text)
    reader = SampleReader(file, tokenizer(), length)
    taken = [reader.take(count) for count in counts]
    [bos] = tokenizer().encode("")
    assert all((s.tokens[:, 0] == bos).all() for s in taken)
    assert all(s.tokens.shape[1] == length for s in taken)
    found = [token for s in taken for row in s.tokens[:, 1:].tolist() for token in row]
    whole = tokenizer().encode(text, add_special_tokens=False, parse_special=False)
    assert found == whole[: len(found)]
    num_full = len(whole) // (length - 1)
    assert sum(len(s.tokens) for s in taken) == min(sum(counts), num_full)


def test_what_predicts_the_first_token_of_a_text_is_not_predicted(tmp_path):
    samples = SampleReader(write(tmp_path, "some words " * 20), tokenizer(), 5).take(2)
    assert samples.first_target == 1
    assert samples.num_targets == 2 * 4


def test_pieces_of_a_large_file_make_the_same_samples(tmp_path, monkeypatch):
    file = write(tmp_path, "a line of text\n" * 50)
    whole = SampleReader(file, tokenizer(), 16).take(9)
    monkeypatch.setattr(samples_module, "PIECE_CHARS", 7)
    assert SampleReader(file, tokenizer(), 16).take(9).tokens.equal(whole.tokens)


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    eos = tokenizer().eos_token_ids[0]
    spelled = tokenizer().decode([eos])
    samples = SampleReader(write(tmp_path, spelled * 10), tokenizer(), 4).take(3)
    assert eos not in samples.tokens


def test_documents_of_json_lines_end_with_the_end_of_sequence(tmp_path):
    lines = [{"text": "one two"}, {"text": "three"}]
    file = write(tmp_path, "\n\n".join(map(json.dumps, lines)), "text.jsonl")
    reader = SampleReader(file, tokenizer(), 3)
    found = [token for row in reader.take(99).tokens[:, 1:].tolist() for token in row]
    eos = tokenizer().eos_token_ids[0]
    parts = [tokenizer().encode(line["text"], add_special_tokens=False) for line in lines]
    assert found == [*parts[0], eos, *parts[1], eos][: len(found)]
    assert len(found) > len(parts[0]) + 1


def test_conversations_are_rendered_with_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    tokenizer().hf.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        file = write(tmp_path, json.dumps({"messages": messages}), "chat.jsonl")
        row = SampleReader(file, tokenizer(), 4).take(1).tokens[0].tolist()
    finally:
        tokenizer().hf.chat_template = None
    assert row[1:] == tokenizer().encode("user: hello\nassistant: yes\n", add_special_tokens=False)[:3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("short.txt", "few words", r"holds \d+ tokens, but 21 are needed"),
        ("bad.jsonl", '{"text": "fine"}\n{"text": 3}', r"bad\.jsonl, line 2: needs an object"),
        ("bad.jsonl", "no json", "cannot be read as JSON lines"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', r"line 1: .*chat template"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, name, text, message):
    reader = SampleReader(write(tmp_path, text, name), tokenizer(), 8)
    with pytest.raises(ConfigError, match=message):
        reader.take_all(3)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    for file in (tmp_path / "missing.txt", tmp_path / "missing.jsonl", tmp_path / "bytes.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            SampleReader(file, tokenizer(), 8).take(1)


def test_samples_need_room_for_text(tmp_path):
    with pytest.raises(ConfigError, match="--sample-len"):
        SampleReader(write(tmp_path, "text"), tokenizer(), 1)
