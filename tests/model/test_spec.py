"""Specs are plain data."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from core.model.families import load_hf_config, read_model
from core.model.weights import estimate_weight_bytes
from core.testing.checkpoints import FAMILIES


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_json_keeps_everything(variant, checkpoint):
    plain = read_model(load_hf_config(checkpoint(variant))).to_dict()
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_parameters_are_counted_without_being_made(variant, checkpoint, build):
    spec = read_model(load_hf_config(checkpoint(variant)))
    decoder = build(spec, device=torch.device("meta"))
    assert spec.num_parameters() == sum(p.numel() for p in decoder.parameters())
    assert estimate_weight_bytes(spec, torch.bfloat16) == 2 * spec.num_parameters()


def test_specs_are_frozen(checkpoint):
    spec = read_model(load_hf_config(checkpoint("llama3")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.num_layers = 3


def test_specs_and_families_need_no_torch():
    script = "import sys, core.model.spec, core.model.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0  # noqa: S603  own script
