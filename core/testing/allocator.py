"""Conformance of block allocators: what every `core.interfaces.BlockAllocator` must do.

Subclass `AllocatorConformance` in a test module and say how to make yours::

    class TestAcmePool(AllocatorConformance):
        def make_allocator(self, num_blocks):
            return AcmePool(num_blocks)

A state machine runs random operations on pools of 1 to 8 usable blocks, so that exhaustion and reuse
are the rule, and compares each answer with a model that fits on half a page: a count per block, and
the order in which free blocks have to come out.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.errors import IntegrityError, OutOfBlocksError
from core.interfaces import BlockAllocator, missing_members

if TYPE_CHECKING:
    from collections.abc import Sequence


class AllocatorModel:
    """What a correct allocator of `num_usable` blocks would do."""

    def __init__(self, num_usable: int) -> None:
        self.holders = Counter(dict.fromkeys(range(1, num_usable + 1), 0))
        # Free blocks come out in this order; those that were never used, in any order of their own.
        self.front: list[int] = []
        self.unused = set(self.holders)
        self.back: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return len(self.front) + len(self.unused) + len(self.back)

    @property
    def held(self) -> list[int]:
        """Each block as often as it has holders."""
        return list(self.holders.elements())

    def allocate(self, block_ids: Sequence[int]) -> None:
        """Check blocks that were handed out, and take them."""
        for block in block_ids:
            if self.front:
                assert block == self.front[0], f"block {self.front[0]} was to come first, not {block}"
            elif self.unused:
                assert block in self.unused, f"unused blocks were to come first, not {block}"
            else:
                assert block == self.back[0], f"{self.back[0]} is least recently used, not {block}"
            self.share([block])

    def share(self, block_ids: Sequence[int]) -> None:
        """Add one holder to each block."""
        for block in block_ids:
            self.unused.discard(block)
            for queue in (self.front, self.back):
                if block in queue:
                    queue.remove(block)
            self.holders[block] += 1

    def release(self, block_ids: Sequence[int], *, keep: bool) -> None:
        """Take one holder from each block."""
        for block in block_ids:
            self.holders[block] -= 1
            if not self.holders[block]:
                if keep:
                    self.back.append(block)
                else:
                    self.front.insert(0, block)


class AllocatorMachine(RuleBasedStateMachine):
    """Random operations, legal and not, on a tiny pool beside the model."""

    allocator: BlockAllocator
    model: AllocatorModel

    def __init__(self, conformance: AllocatorConformance) -> None:
        super().__init__()
        self.conformance = conformance

    @initialize(num_usable=st.sampled_from([8, 6, 5, 4, 3, 2, 1]))
    def start(self, num_usable: int) -> None:
        """Make a fresh pool."""
        self.allocator = self.conformance.make_allocator(num_usable + 1)
        self.model = AllocatorModel(num_usable)

    @rule(share=st.sampled_from([0.0, 0.2, 0.2, 0.5, 0.5, 1.0]))
    def allocate(self, share: float) -> None:
        """Take a share of the free blocks."""
        count = round(share * self.model.num_free)
        block_ids = self.allocator.allocate(count)
        assert len(block_ids) == count
        self.model.allocate(block_ids)

    @rule(excess=st.integers(1, 3), share=st.sampled_from([0.0, 1.0]))
    def allocate_too_many(self, excess: int, share: float) -> None:
        """Take more blocks than there are: then none may be taken, and their order stays."""
        with pytest.raises(OutOfBlocksError):
            self.allocator.allocate(self.model.num_free + excess)
        self.allocate(share)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Add holders to held and free blocks, one block several times too."""
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.model.holders)), max_size=4))
        self.allocator.share(block_ids)
        self.model.share(block_ids)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        """Take away holders, several of one block too, in any order."""
        held = self.model.held
        chosen = data.draw(st.lists(st.sampled_from(range(len(held))), unique=True, max_size=6))
        block_ids = [held[index] for index in chosen]
        self.allocator.release(block_ids, keep=keep)
        self.model.release(block_ids, keep=keep)

    @rule(data=st.data(), keep=st.booleans())
    def release_too_often(self, data: st.DataObject, keep: bool) -> None:
        """Take one holder too many from a block, among others that may let go: nothing may change."""
        block = data.draw(st.sampled_from(sorted(self.model.holders)))
        others = data.draw(st.lists(st.sampled_from(self.model.held or [block]), max_size=2))
        block_ids = [*others, *[block] * (self.model.holders[block] + 1)]
        with pytest.raises(IntegrityError):
            self.allocator.release(data.draw(st.permutations(block_ids)), keep=keep)

    @rule(stranger=st.sampled_from([0, -1, 9, 2**40]), data=st.data())
    def refuse_strangers(self, stranger: int, data: st.DataObject) -> None:
        """Name a block that is not one, behind some that are."""
        block_ids = [
            *data.draw(st.lists(st.sampled_from(sorted(self.model.holders)), max_size=3)),
            stranger,
        ]
        with pytest.raises(IntegrityError):
            self.allocator.share(block_ids)
        with pytest.raises(IntegrityError):
            self.allocator.release(block_ids)

    @rule(keep=st.booleans())
    def run_dry(self, keep: bool) -> None:
        """Give everything back at once, then take everything."""
        held = self.model.held
        self.allocator.release(held, keep=keep)
        self.model.release(held, keep=keep)
        self.allocate(1.0)

    @invariant()
    def books_balance(self) -> None:
        """Every count is the model's, and the allocator agrees with itself."""
        if not hasattr(self, "model"):
            return
        holders = self.model.holders
        assert self.allocator.num_blocks == len(holders) + 1
        assert self.allocator.num_free == self.model.num_free
        assert {block: self.allocator.num_holders(block) for block in holders} == dict(holders)
        self.allocator.check_integrity()


class AllocatorConformance:
    """Subclass, return your allocator from `make_allocator`, and let pytest collect the tests."""

    max_examples = 60

    def make_allocator(self, num_blocks: int) -> BlockAllocator:
        """Make the allocator under test.

        :param num_blocks: the null block included.
        """
        raise NotImplementedError("a subclass of AllocatorConformance must define make_allocator")

    def machine_settings(self) -> settings:
        """Choose how long the state machine searches."""
        return settings(
            max_examples=self.max_examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )

    def test_state_machine(self) -> None:
        """Random operations beside a plain model."""
        machine = partial(AllocatorMachine, self)
        # Any factory will do, whatever the annotation says.
        run_state_machine_as_test(machine, settings=self.machine_settings())  # type: ignore[arg-type]

    def test_members(self) -> None:
        """Everything that the contract names is there."""
        assert missing_members(self.make_allocator(2), BlockAllocator) == []

    def test_null_block_is_never_handed_out(self) -> None:
        """All other blocks are, each once."""
        pool = self.make_allocator(5)
        assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
        assert pool.num_holders(0) == 0

    def test_failed_allocation_takes_nothing(self) -> None:
        """One block too many, and the pool is as it was."""
        pool = self.make_allocator(4)
        pool.allocate(1)
        with pytest.raises(OutOfBlocksError):
            pool.allocate(3)
        assert pool.num_free == 2
        assert len(set(pool.allocate(2))) == 2

    def test_two_holders_may_release_in_one_call(self) -> None:
        """The block becomes free once, not twice."""
        pool = self.make_allocator(3)
        (block,) = pool.allocate(1)
        pool.share([block])
        pool.release([block, block])
        assert pool.num_free == 2
        assert sorted(pool.allocate(2)) == [1, 2]

    def test_double_release_in_one_call_is_refused(self) -> None:
        """One holder cannot let go twice; the blocks before it keep their holders."""
        pool = self.make_allocator(4)
        first, second = pool.allocate(2)
        with pytest.raises(IntegrityError):
            pool.release([first, second, second])
        assert [pool.num_holders(first), pool.num_holders(second)] == [1, 1]
        assert pool.num_free == 1
        pool.check_integrity()

    def test_shared_block_stays_while_it_has_a_holder(self) -> None:
        """The first release of two frees nothing."""
        pool = self.make_allocator(2)
        (block,) = pool.allocate(1)
        pool.share([block])
        pool.release([block])
        assert pool.num_free == 0
        with pytest.raises(OutOfBlocksError):
            pool.allocate(1)

    def test_failed_share_changes_nothing(self) -> None:
        """A stranger among the blocks, and none is shared."""
        pool = self.make_allocator(4)
        (block,) = pool.allocate(1)
        with pytest.raises(IntegrityError):
            pool.share([block, 2 if block != 2 else 3, 4])
        assert pool.num_holders(block) == 1
        assert pool.num_free == 2

    def test_least_recently_released_is_reused_first(self) -> None:
        """Kept blocks come back in the order in which they were released."""
        pool = self.make_allocator(5)
        a, b, c, d = pool.allocate(4)
        pool.release([c, a])
        pool.release([d, b])
        assert [pool.allocate(1)[0] for _ in range(4)] == [c, a, d, b]

    def test_worthless_blocks_are_reused_before_kept_ones(self) -> None:
        """Whatever the order of the releases."""
        pool = self.make_allocator(5)
        a, b, c, d = pool.allocate(4)
        pool.release([a], keep=True)
        pool.release([b, c], keep=False)
        pool.release([d], keep=True)
        assert pool.allocate(4) == [c, b, a, d]

    def test_free_block_can_be_shared_out_of_the_middle(self) -> None:
        """It leaves the queue; the others keep their order."""
        pool = self.make_allocator(4)
        a, b, c = pool.allocate(3)
        pool.release([a, b, c])
        pool.share([b])
        assert pool.num_free == 2
        assert pool.allocate(2) == [a, c]
