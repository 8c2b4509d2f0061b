"""The block pool: which blocks of KV positions are free, and how many holders the others have.

The free queue is a doubly linked list threaded through two flat lists of block numbers, so that a
block leaves from its middle in O(1) when a prefix is found again; no object is made per block and
none in the loop.  A deque could not do that, and a list of node objects would be slower to walk.
Block 0, the null block, is never handed out: it is the list's sentinel instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import ConfigError, IntegrityError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockPool:
    """Fulfils `core.interfaces.BlockAllocator`; every operation is O(1) per block.

    :param num_blocks: blocks of the pool, the null block included; at least 2.
    :raises ConfigError: there would be no usable block.
    """

    __slots__ = ("_holders", "_next", "_num_free", "_prev", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"a pool of {num_blocks} KV blocks has no usable one, since block 0 is the null block; "
                f"it takes at least 2 (--num-kv-blocks)"
            )
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        # The queue runs from _next[0], reused first, to _prev[0]; links of held blocks mean nothing.
        self._next = [*range(1, num_blocks), 0]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]
        self._num_free = num_blocks - 1

    def __repr__(self) -> str:
        return f"BlockPool(num_blocks={self.num_blocks}, num_free={self._num_free})"

    @property
    def num_free(self) -> int:
        """Blocks without a holder: what `allocate` can still give."""
        return self._num_free

    def num_holders(self, block_id: int, /) -> int:
        """Holders of one block; the null block has none.

        :raises IntegrityError: there is no such block.
        """
        if not 0 <= block_id < self.num_blocks:
            raise IntegrityError(f"there is no block {block_id} in a pool of {self.num_blocks}")
        return self._holders[block_id]

    def allocate(self, count: int, /) -> list[int]:
        """Take `count` blocks off the front of the free queue; one holder each.

        :raises OutOfBlocksError: fewer are free; nothing was taken then.
        :raises IntegrityError: `count` is negative.
        """
        if not 0 <= count <= self._num_free:
            raise self._cannot_allocate(count)
        successor, holders = self._next, self._holders
        block_ids = []
        block = successor[0]
        for _ in range(count):
            block_ids.append(block)
            holders[block] = 1
            block = successor[block]
        successor[0] = block
        self._prev[block] = 0
        self._num_free -= count
        return block_ids

    def share(self, block_ids: Sequence[int], /) -> None:
        """Add one holder to each block.  A free block leaves the free queue, its content intact.

        :raises IntegrityError: an id is out of range or the null block; nothing changed then.
        """
        num_blocks, holders = self.num_blocks, self._holders
        for block in block_ids:
            if not 0 < block < num_blocks:
                raise IntegrityError(f"cannot share block {block}: usable are 1 to {num_blocks - 1}")
        for block in block_ids:
            if not holders[block]:
                self._unlink(block)
            holders[block] += 1

    def release(self, block_ids: Sequence[int], /, *, keep: bool = True) -> None:
        """Take one holder from each block, in the given order; without holders it becomes free.

        :param keep: put a freed block at the back of the free queue, where it is reused last;
            `False` puts it at the front.
        :raises IntegrityError: a block would lose more holders than it has (one block twice in
            one call counts twice); nothing changed then.
        """
        num_blocks, holders, successor, previous = (
            self.num_blocks,
            self._holders,
            self._next,
            self._prev,
        )
        num_free = self._num_free
        num_done = 0
        for block in block_ids:
            if not 0 < block < num_blocks or not (left := holders[block]):
                self._num_free = num_free
                self._take_back(block_ids[:num_done])
                raise self._cannot_release(block, block_ids)
            num_done += 1
            holders[block] = left - 1
            if left > 1:
                continue
            num_free += 1
            if keep:
                before = previous[0]
                previous[block], successor[block] = before, 0
                successor[before] = previous[0] = block
            else:
                after = successor[0]
                previous[block], successor[block] = 0, after
                previous[after] = successor[0] = block
        self._num_free = num_free

    def check_integrity(self) -> None:
        """Walk the free queue: free + held = total, no block twice, both directions agree.

        :raises IntegrityError: naming the law that does not hold.
        """
        is_free = self._walk()
        num_free = sum(is_free)
        if num_free != self._num_free:
            raise IntegrityError(f"{num_free} blocks are queued as free, but {self._num_free} counted")
        if self._holders[0] != 0:
            raise IntegrityError(f"the null block has {self._holders[0]} holders")
        for block in range(1, self.num_blocks):
            count = self._holders[block]
            if count < 0 or (count == 0) != bool(is_free[block]):
                state = "is" if is_free[block] else "is not"
                raise IntegrityError(f"block {block} has {count} holders and {state} in the free queue")

    def _walk(self) -> bytearray:
        """Mark the blocks of the free queue; a damaged queue cannot make this loop for ever."""
        seen = bytearray(self.num_blocks)
        before, block = 0, self._next[0]
        while block:
            if seen[block]:
                raise IntegrityError(f"block {block} is twice in the free queue")
            if self._prev[block] != before:
                raise IntegrityError(
                    f"block {block} follows {before}, but points to {self._prev[block]}"
                )
            seen[block] = 1
            before, block = block, self._next[block]
        if self._prev[0] != before:
            raise IntegrityError(f"the free queue ends with {before}, but its tail is {self._prev[0]}")
        return seen

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self._num_free -= 1

    def _take_back(self, block_ids: Sequence[int]) -> None:
        """Undo a release, last block first, which restores the queue exactly."""
        for block in reversed(block_ids):
            if not self._holders[block]:
                self._unlink(block)
            self._holders[block] += 1

    def _cannot_allocate(self, count: int) -> IntegrityError | OutOfBlocksError:
        if count < 0:
            return IntegrityError(f"cannot allocate {count} blocks")
        return OutOfBlocksError(
            f"{count} blocks were asked for, but {self._num_free} of {self.num_blocks - 1} are free; "
            f"none was taken (--num-kv-blocks, --gpu-memory-utilization)"
        )

    def _cannot_release(self, block: int, block_ids: Sequence[int]) -> IntegrityError:
        if not 0 < block < self.num_blocks:
            return IntegrityError(
                f"cannot release block {block}: usable are 1 to {self.num_blocks - 1}"
            )
        return IntegrityError(
            f"cannot release block {block} {block_ids.count(block)} times: "
            f"it has {self._holders[block]} holders"
        )
