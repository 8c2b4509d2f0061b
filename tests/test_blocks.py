"""The block pool, and whether its conformance kit would notice a broken one."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import Phase, settings

import core.testing
from core.blocks import BlockPool
from core.errors import ConfigError, CytheraError, IntegrityError, OutOfBlocksError
from core.testing import AllocatorConformance


class TestBlockPool(AllocatorConformance):
    def make_allocator(self, num_blocks):
        return BlockPool(num_blocks)


class TestFactoryIsAsked(AllocatorConformance):
    test_state_machine = None

    def make_allocator(self, num_blocks):
        return BlockPool(num_blocks)

    def test_members(self):
        with pytest.raises(NotImplementedError, match="make_allocator"):
            AllocatorConformance().make_allocator(2)


# --- beyond the contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 0, -3])
def test_pool_without_usable_block_is_refused(num_blocks):
    with pytest.raises(ConfigError, match=f"{num_blocks} KV blocks.*--num-kv-blocks"):
        BlockPool(num_blocks)


def test_first_blocks_come_in_order():
    assert BlockPool(5).allocate(4) == [1, 2, 3, 4]


def test_exhaustion_names_both_numbers_and_the_knob():
    with pytest.raises(OutOfBlocksError, match=r"5 blocks were asked for, but 4 of 4.*--num-kv-blocks"):
        BlockPool(5).allocate(5)


def test_negative_count_is_refused():
    pool = BlockPool(5)
    with pytest.raises(IntegrityError, match="-1"):
        pool.allocate(-1)
    pool.check_integrity()
    assert pool.num_free == 4


@pytest.mark.parametrize("block", [-1, 3, 2**40])
def test_holders_of_a_stranger_are_refused(block):
    with pytest.raises(IntegrityError, match="no block"):
        BlockPool(3).num_holders(block)


def test_release_of_too_many_holders_says_how_many_there_are():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    with pytest.raises(IntegrityError, match=f"cannot release block {block} 2 times: it has 1 holders"):
        pool.release([block, block])


@pytest.mark.parametrize("keep", [True, False])
def test_failed_release_leaves_the_order_of_the_queue(keep):
    pool = BlockPool(7)
    blocks = pool.allocate(6)
    pool.release(blocks[:2])
    with pytest.raises(IntegrityError):
        pool.release([blocks[2], blocks[3], blocks[0]], keep=keep)
    pool.check_integrity()
    assert pool.allocate(2) == blocks[:2]


def test_repr_shows_the_numbers():
    assert repr(BlockPool(5)) == "BlockPool(num_blocks=5, num_free=4)"


def damage_count(pool):
    pool._num_free += 1


def damage_holders(pool):
    pool._holders[pool._next[0]] = 1


def damage_negative(pool):
    pool._holders[1] = -1


def damage_null(pool):
    pool._holders[0] = 1


def damage_leak(pool):
    pool._holders[1] = 0


def damage_cycle(pool):
    pool._next[pool._prev[0]] = pool._next[0]
    pool._prev[pool._next[0]] = 0


def damage_back_link(pool):
    pool._prev[pool._next[pool._next[0]]] = 0


def damage_tail(pool):
    pool._prev[0] = pool._next[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_count, "6 counted"),
        (damage_holders, "1 holders and is in the free queue"),
        (damage_negative, "-1 holders"),
        (damage_null, "null block has 1"),
        (damage_leak, "0 holders and is not in the free queue"),
        (damage_cycle, "twice in the free queue"),
        (damage_back_link, "but points to"),
        (damage_tail, "its tail is"),
    ],
)
def test_damage_is_noticed(damage, message):
    pool = BlockPool(8)
    pool.allocate(2)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()


# --- planted bugs ------------------------------------------------------------------------------------


class LeaksOnRelease(BlockPool):
    def release(self, block_ids, /, *, keep=True):
        super().release(block_ids[:3], keep=keep)


class AcceptsDoubleRelease(BlockPool):
    """Checks all blocks first, then decrements: one block twice slips through, and is queued twice."""

    def release(self, block_ids, /, *, keep=True):
        if not all(0 < block < self.num_blocks and self._holders[block] for block in block_ids):
            raise IntegrityError("no holder")
        for block in block_ids:
            self._holders[block] = max(self._holders[block], 1)
            super().release([block], keep=keep)


class FreesWhileShared(BlockPool):
    def release(self, block_ids, /, *, keep=True):
        for block in block_ids:
            if 0 < block < self.num_blocks:
                self._holders[block] = min(self._holders[block], 1)
        super().release(block_ids, keep=keep)


class FailsHalfway(BlockPool):
    def allocate(self, count, /):
        if count > self.num_free:
            super().allocate(self.num_free)
        return super().allocate(count)


class ReleasesHalfway(BlockPool):
    def release(self, block_ids, /, *, keep=True):
        for block in block_ids:
            super().release([block], keep=keep)


class SharesHalfway(BlockPool):
    def share(self, block_ids, /):
        for block in block_ids:
            super().share([block])


class HandsOutTheNullBlock(BlockPool):
    def allocate(self, count, /):
        blocks = super().allocate(count)
        return [0, *blocks[1:]] if count > 2 else blocks


class ReusesNewestFirst(BlockPool):
    def release(self, block_ids, /, *, keep=True):
        super().release(block_ids, keep=False)


class ReusesWorthlessLast(BlockPool):
    def release(self, block_ids, /, *, keep=True):
        super().release(block_ids, keep=True)


class ReordersAfterFailure(BlockPool):
    """Rolls back a failed release by sharing again, which loses the place in the queue."""

    def allocate(self, count, /):
        if count > self.num_free:
            super().release(super().allocate(self.num_free)[::-1])
        return super().allocate(count)


class LosesTheHeadWhenSharing(BlockPool):
    def _unlink(self, block):
        if self._next[0] != block:
            super()._unlink(block)


class NeverChecks(AcceptsDoubleRelease):
    """The model alone has to notice."""

    def check_integrity(self):
        pass


BUGS = [
    LeaksOnRelease,
    AcceptsDoubleRelease,
    FreesWhileShared,
    FailsHalfway,
    ReleasesHalfway,
    SharesHalfway,
    HandsOutTheNullBlock,
    ReusesNewestFirst,
    ReusesWorthlessLast,
    ReordersAfterFailure,
    LosesTheHeadWhenSharing,
    NeverChecks,
]


def quick(base):
    """The kit's settings, without shrinking and without leaving traces."""
    return settings(
        base, phases=[Phase.generate], database=None, derandomize=True, report_multiple_bugs=False
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_kit_catches(bug):
    class Kit(AllocatorConformance):
        max_examples = 500  # it stops at the first failure; a miss must not be a matter of luck

        def make_allocator(self, num_blocks):
            return bug(num_blocks)

        def machine_settings(self):
            return quick(super().machine_settings())

    with pytest.raises((AssertionError, CytheraError, pytest.fail.Exception)):
        Kit().test_state_machine()


# --- the kit and the command -------------------------------------------------------------------------


def test_kit_names_are_lazy_and_need_no_torch():
    code = (
        "import sys, json, core.testing as kit\n"
        "light = 'hypothesis' not in sys.modules\n"
        "kit.AllocatorConformance, kit.KVCacheConformance\n"
        "print(json.dumps([light, 'torch' in sys.modules, sorted(kit.__all__)]))"
    )
    child = [sys.executable, "-c", code]
    output = subprocess.run(child, capture_output=True, check=True, text=True)  # noqa: S603  our own code
    is_light, has_torch, names = json.loads(output.stdout)
    assert is_light
    assert not has_torch
    assert sorted(core.testing._MODULES) == names
    assert all(find_spec(f"core.testing.{module}") for module in core.testing._MODULES.values())
    assert set(names) <= set(dir(core.testing))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        core.testing.Nonsense  # noqa: B018  the access is what is tested


@pytest.fixture
def raw_pool():
    return runpy.run_path(str(Path(__file__).parent / "raw_pool.py"))


def test_raw_run(raw_pool, capsys):
    assert raw_pool["main"](["--operations", "20000", "--blocks", "16", "--seed", "3"]) == 0
    assert "0 blocks leaked" in capsys.readouterr().out


@pytest.mark.parametrize("bug", [LeaksOnRelease, AcceptsDoubleRelease, FailsHalfway, FreesWhileShared])
def test_raw_run_catches(raw_pool, bug):
    with pytest.raises((AssertionError, CytheraError)):
        raw_pool["run"](bug(16), num_operations=20000, seed=3)
