"""Conformance of model families: what every `core.registry.ModelEntry` must read.

Subclass `ModelConformance` in a test module, once for each variant of the family, and write a tiny
checkpoint of it::

    class TestAcme(ModelConformance):
        entry = acme_model.ENTRY

        def make_checkpoint(self, path):
            model = AutoModelForCausalLM.from_config(AcmeConfig(hidden_size=64, ...))
            randomize(model, seed=0)  # of core.testing.checkpoints
            model.save_pretrained(path)
            return path

The decoder that the entry's spec describes must want exactly the tensors of the checkpoint, and give
the logits that `transformers` gives.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from safetensors import safe_open

from core.errors import CheckpointError
from core.model.families import load_hf_config
from core.model.spec import ModelSpec
from core.model.weights import list_files
from core.sharding import divide
from core.testing.checkpoints import reference_logits
from core.testing.divided_model import run_divided, run_whole, split_by_kv_heads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.registry import ModelEntry

HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
"""Of tensors that older exports hold and nobody reads."""


class ModelConformance:
    """The tests; subclass it, set `entry` and define `make_checkpoint`."""

    entry: ClassVar[ModelEntry | None] = None
    num_tokens: ClassVar[int] = 41
    """Of the sequence that is compared; more than a window has, and no more than positions."""
    tolerance: ClassVar[float] = 1e-4
    """Largest error of logits in float32, relative to the largest of them."""
    counts_parameters: ClassVar[bool] = True
    """Whether the checkpoint holds each weight that is used once, and no other."""

    # --- what subclasses define --------------------------------------------------------------------

    def make_checkpoint(self, path: Path) -> Path:
        """Write a small checkpoint with random weights, as `save_pretrained` writes it.

        :param path: a folder.
        :return: the same.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no make_checkpoint")

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> torch.Tensor:
        """Compute the logits of a sequence in float32: [T, vocab]; by default with `transformers`."""
        return reference_logits(path, tokens)

    # --- machinery -----------------------------------------------------------------------------------

    def read(self, path: Path) -> ModelSpec:
        """Let the entry read the config of a checkpoint."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry")
        config = load_hf_config(path)
        assert config.model_type in self.entry.model_types, (
            f"model_types are {self.entry.model_types}, but the config says {config.model_type!r}"
        )
        spec = self.entry.factory(config)
        assert isinstance(spec, ModelSpec), f"the factory returns {spec!r}, no ModelSpec"
        return spec

    def tokens(self, spec: ModelSpec) -> list[int]:
        """Draw a sequence, always the same one."""
        generator = torch.Generator().manual_seed(0)
        # The last ids stand for images in models that can see.
        return torch.randint(0, spec.vocab_size - 3, (self.num_tokens,), generator=generator).tolist()

    def _run(self, spec: ModelSpec, path: Path, dtype: torch.dtype) -> torch.Tensor:
        try:
            return run_whole(spec, path, self.tokens(spec), dtype=dtype)
        except CheckpointError as error:
            raise AssertionError(
                f"the spec describes another model than the checkpoint: {error}"
            ) from error

    # --- the laws ----------------------------------------------------------------------------------

    def test_spec_is_plain_data(self, tmp_path: Path) -> None:
        """It travels in plans: the same at every reading, and fit for JSON."""
        path = self.make_checkpoint(tmp_path)
        spec = self.read(path)
        assert self.read(path) == spec, "the same config is read in two ways"
        again = json.loads(json.dumps(spec.to_dict()))
        assert again["model_type"] in (self.entry.model_types if self.entry else ()), again

    def test_spec_is_consistent(self, tmp_path: Path) -> None:
        """Every layer has a description, every description its rotary frequencies."""
        spec = self.read(self.make_checkpoint(tmp_path))
        assert len(spec.layers) == spec.num_layers, f"{len(spec.layers)} of {spec.num_layers} layers"
        unknown = {layer.rope for layer in spec.layers} - spec.ropes.keys()
        assert not unknown, f"layers rotate with {sorted(unknown)}, which ropes does not hold"
        assert not spec.num_heads % spec.num_kv_heads, (
            f"{spec.num_heads} heads are no multiple of {spec.num_kv_heads} key-value heads"
        )
        for name, rope in spec.ropes.items():
            assert 0 <= rope.rotary_dim <= spec.head_dim, f"{name} rotates {rope.rotary_dim} dimensions"
            assert not rope.rotary_dim % 2, (
                f"{name} rotates {rope.rotary_dim} dimensions, an odd number"
            )

    def test_wants_what_the_checkpoint_holds(self, tmp_path: Path) -> None:
        """Every tensor has its place, and none is missing."""
        path = self.make_checkpoint(tmp_path)
        assert self._run(self.read(path), path, torch.float32).isfinite().all()

    def test_parameters_are_counted(self, tmp_path: Path) -> None:
        """The number that tells whether a model fits before it is loaded."""
        if not self.counts_parameters:
            pytest.skip("the checkpoint holds something else besides")
        path = self.make_checkpoint(tmp_path)
        spec = self.read(path)
        stored = count_parameters(path, spec)
        assert spec.num_parameters() == stored, (
            f"num_parameters is {spec.num_parameters()}, but the checkpoint holds {stored}"
        )

    def test_logits_equal_the_reference(self, tmp_path: Path) -> None:
        """Of every position.

        If they do not, look at what differs between families first: norms and their order, biases,
        scales, windows, and which dimensions are rotated.
        """
        path = self.make_checkpoint(tmp_path)
        spec = self.read(path)
        expected = self.reference_logits(path, self.tokens(spec))
        actual = self._run(spec, path, torch.float32)
        assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
        errors = (actual - expected).abs().amax(-1) / expected.abs().max()
        wrong = (~(errors <= self.tolerance)).nonzero().flatten().tolist()
        assert not wrong, (
            f"logits at {len(wrong)} of {len(errors)} positions are off, the first at {wrong[0]}, by up to "
            f"{float(errors.max()):.2g} of the largest logit"
        )

    def test_float64_is_more_exact(self, tmp_path: Path) -> None:
        """What is computed in a narrower dtype than the model's shows here."""
        path = self.make_checkpoint(tmp_path)
        spec = self.read(path)
        exact = self._run(spec, path, torch.float64)
        assert exact.dtype == torch.float64, f"logits of a float64 model are {exact.dtype}"
        error = (self._run(spec, path, torch.float32) - exact).abs().max() / exact.abs().max()
        assert error <= self.tolerance, f"float32 and float64 differ by {float(error):.2g}"

    def test_divided_models_equal_the_whole(self, tmp_path: Path) -> None:
        """On as many ranks as there are key-value heads, and in two stages."""
        path = self.make_checkpoint(tmp_path)
        spec, tokens = self.read(path), []
        rows = split_by_kv_heads(spec, min(2, spec.num_kv_heads))
        layers = divide(spec.num_layers, min(2, spec.num_layers))
        stages = [[replace(row, layers=span) for row in rows] for span in layers]
        tokens = self.tokens(spec)
        whole, divided = run_whole(spec, path, tokens), run_divided(spec, path, stages, tokens)
        error = (whole - divided).abs().max() / whole.abs().max()
        assert error <= 1e-9, f"{len(rows)} ranks in {len(stages)} stages: off by {float(error):.2g}"


def count_parameters(path: Path, spec: ModelSpec) -> int:
    """Count the elements that a checkpoint holds of what the decoder runs."""
    total = 0
    for file in list_files(path):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  no mapping
                if name.startswith(spec.ignored_prefixes) or name.endswith(HARMLESS_SUFFIX):
                    continue
                total += torch.Size(handle.get_slice(name).get_shape()).numel()
    return total
