"""Files of a checkpoint: full shards, a true index, and no folder that only looks whole."""

from __future__ import annotations

import json
import stat

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from core.errors import CheckpointError, ConfigError
from core.model.weights import list_files
from core.quant.checkpoint import ShardWriter, copy_side_files, new_folder


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    max_bytes=st.integers(1, 40),
)
@settings(deadline=None, max_examples=50)
def test_every_tensor_is_in_one_shard_of_bounded_size(tmp_path_factory, sizes, max_bytes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{index}": torch.full((size,), float(index)) for index, size in enumerate(sizes)}
    writer = ShardWriter(folder, max_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    found = {}
    for file, promised in list_files(folder).items():
        held = load_file(file)
        assert not promised or promised == set(held)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_bytes
        found |= held
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert writer.num_bytes == sum(t.nbytes for t in tensors.values())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == writer.num_bytes
    assert {f.suffix for f in folder.iterdir()} <= {".safetensors", ".json"}


def test_views_are_written_without_what_they_are_views_of(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    writer = ShardWriter(tmp_path)
    writer.add("rows", whole[1:3])
    writer.add("columns", whole.T)
    writer.finish()
    held = load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["rows"], whole[1:3])
    assert torch.equal(held["columns"], whole.T)


def test_others_may_read_the_weights_if_they_may_read_the_folder(tmp_path):
    tmp_path.chmod(0o755)
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(1))
    writer.finish()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


def test_a_full_disk_is_told_as_what_it_is(tmp_path):
    writer = ShardWriter(tmp_path / "missing")
    writer.add("t", torch.zeros(1))
    with pytest.raises(CheckpointError, match="cannot be written"):
        writer.finish()


def test_the_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "a" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("text")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["file"]
    assert list(out.parent.iterdir()) == [out]


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "file").write_text("text")
    assert (out / "file").read_text() == "text"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ConfigError, OSError])
def test_nothing_is_left_of_a_run_that_ended_early(tmp_path, kind):
    def fill() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("text")
            raise kind

    with pytest.raises(kind):
        fill()
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="there already"), new_folder(out):
            pass
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_side_files_are_copied_and_weights_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {"tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "generation_config.json"}
    left = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.py"}
    for name in (*kept, *left, "config.json"):
        (source / name).write_text(name)
    (source / "linked.model").symlink_to(source / "tokenizer.json")
    (source / "original").mkdir()
    copy_side_files(source, target)
    assert {f.name for f in target.iterdir()} == kept | {"linked.model"}
    assert not (target / "linked.model").is_symlink()
