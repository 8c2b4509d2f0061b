"""Run random operations on the block pool, as many as wanted, against integer counters.

    python tests/raw_pool.py --operations 20000000 --seed 1

Every operation is checked: what was handed out had no holder, what had to be refused was refused, the
number of free blocks is the counted one.  Every so often, and at the end, all counters are compared and
the pool checks itself; at last everything is given back, and a block that does not return is a leak.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.blocks import BlockPool
from core.errors import IntegrityError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.interfaces import BlockAllocator

CHECK_EVERY = 50_000


class Books:
    """Integer counters beside an allocator, and one random operation after the other on both."""

    def __init__(self, pool: BlockAllocator, seed: int) -> None:
        self.pool = pool
        self.random = random.Random(seed)
        self.num_usable = pool.num_blocks - 1
        self.num_free = self.num_usable
        self.holders = [0] * pool.num_blocks
        self.held: list[int] = []  # each block as often as it has holders
        self.num_refused = 0

    def step(self) -> None:
        """Do one operation; the more is held, the likelier something is given back."""
        draw = self.random.random()
        if draw < 0.02:
            self.be_refused()
        elif draw < 0.15:
            self.share()
        elif self.held and draw < 0.15 + 0.85 * min(0.9, len(self.held) / self.num_usable):
            self.release()
        else:
            self.allocate()
        if self.pool.num_free != self.num_free:
            raise AssertionError(f"{self.pool.num_free} blocks are free, {self.num_free} should be")

    def allocate(self) -> None:
        count = 1 + int(self.random.random() * 4)
        if count > self.num_free:
            self.refuse(OutOfBlocksError, lambda: self.pool.allocate(count))
            return
        block_ids = self.pool.allocate(count)
        for block in block_ids:
            if self.holders[block] or not block:
                raise AssertionError(f"block {block} was handed out with {self.holders[block]} holders")
            self.holders[block] = 1
        self.held += block_ids
        self.num_free -= count

    def share(self) -> None:
        block = 1 + int(self.random.random() * self.num_usable)
        self.pool.share([block])
        self.num_free -= not self.holders[block]
        self.holders[block] += 1
        self.held.append(block)

    def release(self) -> None:
        block_ids = [self.take() for _ in range(min(len(self.held), 1 + int(self.random.random() * 4)))]
        self.pool.release(block_ids, keep=self.random.random() < 0.7)
        for block in block_ids:
            self.holders[block] -= 1
            self.num_free += not self.holders[block]

    def take(self) -> int:
        """Draw a held block: swap it with the last and pop."""
        held = self.held
        index = int(self.random.random() * len(held))
        held[index], held[-1] = held[-1], held[index]
        return held.pop()

    def be_refused(self) -> None:
        """Release one holder too many, or a block that is none, behind blocks that may go."""
        block = 1 + int(self.random.random() * self.num_usable)
        too_many = [block] * (self.holders[block] + 1)
        stranger = [*self.held[-2:], self.random.choice([0, -1, self.num_usable + 1])]
        self.refuse(IntegrityError, lambda: self.pool.release(too_many))
        self.refuse(IntegrityError, lambda: self.pool.release(stranger, keep=False))
        self.refuse(IntegrityError, lambda: self.pool.share(stranger))

    def refuse(self, error: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
        except error:
            self.num_refused += 1
            return
        raise AssertionError(f"{error.__name__} was to be raised")

    def check(self) -> None:
        """Compare everything."""
        self.pool.check_integrity()
        counts = [self.pool.num_holders(block) for block in range(self.pool.num_blocks)]
        if counts != self.holders:
            raise AssertionError(f"holders are {counts}, should be {self.holders}")

    def close(self) -> int:
        """Give everything back; return how many blocks did not become free."""
        self.pool.release(self.held)
        self.pool.check_integrity()
        return self.num_usable - self.pool.num_free


def run(
    pool: BlockAllocator,
    *,
    num_operations: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Do it; return how many blocks leaked and how many calls were rightly refused."""
    books = Books(pool, seed)
    for start in range(0, num_operations, CHECK_EVERY):
        count = min(CHECK_EVERY, num_operations - start)
        for _ in range(count):
            books.step()
        books.check()
        advance(count)
    return books.close(), books.num_refused


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random operations on the block pool.")
    parser.add_argument("--operations", type=int, default=20_000_000)
    parser.add_argument("--blocks", type=int, default=256, help="usable blocks")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("operations", total=options.operations)
        num_leaked, num_refused = run(
            BlockPool(options.blocks + 1),
            num_operations=options.operations,
            seed=options.seed,
            advance=lambda count: progress.advance(task, count),
        )
    seconds = time.monotonic() - began
    Console().print(
        f"{options.operations:,} operations on {options.blocks} blocks in {seconds:.1f} s "
        f"({options.operations / seconds:,.0f}/s, counters included): "
        f"{num_leaked} blocks leaked, {num_refused:,} illegal calls refused",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if num_leaked else 0


if __name__ == "__main__":
    sys.exit(main())
