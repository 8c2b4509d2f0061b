"""The kit for model families catches specs that describe another model."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import pytest

from core.model.families import read_gemma2, read_llama
from core.model.spec import LayerSpec
from core.registry import ModelEntry
from core.testing.checkpoints import make_checkpoint
from core.testing.model import ModelConformance

WANTS = "test_wants_what_the_checkpoint_holds"
LOGITS = "test_logits_equal_the_reference"
PLAIN = "test_spec_is_plain_data"
CONSISTENT = "test_spec_is_consistent"
COUNT = "test_parameters_are_counted"


def change(**changes):
    return lambda spec: replace(spec, **changes)


def change_ropes(**changes):
    return lambda spec: replace(
        spec, ropes={name: replace(rope, **changes) for name, rope in spec.ropes.items()}
    )


COUNTER = itertools.count()
LLAMA = [
    (change(qkv_bias=False), WANTS, "another model"),
    (change(qk_norm=True), WANTS, "another model"),
    (change(fused_qkv=True), WANTS, "another model"),
    (change(tied=True), WANTS, "another model"),
    (change(intermediate_size=95), WANTS, "another model"),
    (change(num_layers=1, layers=(LayerSpec(None, "default"),)), WANTS, "another model"),
    (change(renames=(("model.", "decoder."),)), WANTS, "another model"),
    (change(norm_eps=1e-1), LOGITS, "positions are off, the first at 0"),
    (change(norm_style="one_plus"), LOGITS, "positions are off, the first at 0"),
    (change(activation="gelu"), LOGITS, "positions are off, the first at 0"),
    (change(embedding_scale=2.0), LOGITS, "positions are off, the first at 0"),
    (change(attention_scale=1.0), LOGITS, "positions are off, the first at 1,"),
    (change_ropes(theta=500.0), LOGITS, "positions are off, the first at 1,"),
    (change_ropes(rotary_dim=8), LOGITS, "positions are off, the first at 1,"),
    (change(layers=(LayerSpec(8, "default"),) * 2), LOGITS, "positions are off, the first at 8,"),
    (change(layers=(LayerSpec(None, "default"),)), CONSISTENT, "1 of 2 layers"),
    (change(layers=(LayerSpec(None, "local"),) * 2), CONSISTENT, "'local'"),
    (change(num_kv_heads=3), CONSISTENT, "no multiple of"),
    (change_ropes(rotary_dim=20), CONSISTENT, "rotates 20"),
    (change_ropes(rotary_dim=7), CONSISTENT, "rotates 7"),
    (lambda spec: replace(spec, max_position=next(COUNTER)), PLAIN, "two ways"),
    (change(model_type="lama"), PLAIN, "lama"),
    (change(tied=True), COUNT, "num_parameters is"),
]
GEMMA = [
    (change(attention_softcap=None), LOGITS, "positions are off"),
    (change(logit_softcap=None), LOGITS, "positions are off"),
    (change(embedding_scale=None), LOGITS, "positions are off"),
    (change(norm_style="plain"), LOGITS, "positions are off"),
    (change(post_norms=False), WANTS, "another model"),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A suite for a reader whose specs are changed; its checkpoint is written once."""
    folders = {}

    def make(variant, reader, wrong=lambda spec: spec):
        if variant not in folders:
            folders[variant] = make_checkpoint(variant, tmp_path_factory.mktemp(variant))

        class Suite(ModelConformance):
            num_tokens = 20
            entry = ModelEntry(
                name="x", factory=lambda config: wrong(reader(config)), model_types=("llama", "gemma2")
            )

            def make_checkpoint(self, path):
                return shutil.copytree(folders[variant], path, dirs_exist_ok=True)

        return Suite()

    return make


@pytest.mark.parametrize(("wrong", "law", "message"), LLAMA)
def test_a_wrong_spec_is_caught(kit, wrong, law, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        getattr(kit("llama-bias", read_llama, wrong), law)(tmp_path)


@pytest.mark.parametrize(("wrong", "law", "message"), GEMMA)
def test_a_wrong_spec_of_gemma_is_caught(kit, wrong, law, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        getattr(kit("gemma2", read_gemma2, wrong), law)(tmp_path)


@pytest.mark.parametrize("law", [WANTS, LOGITS, PLAIN, CONSISTENT, COUNT])
@pytest.mark.parametrize(("variant", "reader"), [("llama-bias", read_llama), ("gemma2", read_gemma2)])
def test_right_specs_pass(kit, variant, reader, law, tmp_path):
    getattr(kit(variant, reader), law)(tmp_path)


def test_other_model_types_are_caught(kit, tmp_path):
    suite = kit("llama-bias", read_llama)
    suite.entry = replace(suite.entry, model_types=("gemma2",))
    with pytest.raises(AssertionError, match="but the config says 'llama'"):
        suite.test_spec_is_plain_data(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(NotImplementedError, match="make_checkpoint"):
        ModelConformance().test_spec_is_plain_data(tmp_path)
    with pytest.raises(NotImplementedError, match="entry"):
        ModelConformance().read(tmp_path)
