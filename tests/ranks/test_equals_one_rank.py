"""A model on several ranks draws the tokens that it draws on one."""

from __future__ import annotations

import pytest
from recorded_steps import assert_same, record, settings_of

from core.testing.checkpoints import FAMILIES, make_checkpoint
from core.testing.simulated_ranks import replay

MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Give settings and steps of a family, recorded at its first use."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = make_checkpoint(variant, tmp_path_factory.mktemp(variant))
            settings = settings_of(folder)
            made[variant] = settings, record(settings)
        return made[variant]

    return get


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [("llama-many-heads", (5, 1)), ("llama-many-heads", (8, 1)), ("gemma3", (1, 3))],
)
def test_many_ranks(variant, mesh, recorded):
    settings, steps = recorded(variant)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    assert_same(replay({**settings, **sizes}, steps, num_blocks=41), steps)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh[0]}-pp{mesh[1]}")
@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_every_family_on_several_ranks(variant, mesh, recorded):
    settings, steps = recorded(variant)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    assert_same(replay({**settings, **sizes}, steps, num_blocks=41), steps)
