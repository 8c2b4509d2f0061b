"""Block tables and the prefix cache, over any `core.interfaces.BlockAllocator`.

A full block is known by the digest of everything that led to it: SHA-256 over the digest of the block
before it and its own tokens, and for the first block over the identity of the model and the salt of
the request.  A request finds a cached prefix by walking its own chain of digests through the index.
The allocator's free queue is the order of eviction: a block keeps its digest while it lies there,
and loses it when it is handed out again.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from core.errors import ConfigError, IntegrityError, OutOfBlocksError
from core.events import BlocksEvicted
from core.interfaces import KVStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.events import Event
    from core.interfaces import BlockAllocator
    from core.request import Request

_DOMAIN: Final = b"cythera prefix cache, chain of token blocks, 1"
_NEVER: Final = sys.maxsize


class _Entry(NamedTuple):
    """What is published about a block."""

    digest: bytes
    parent: bytes
    """Digest of the block before it, or the root of the chain."""
    packed: bytes
    """Its tokens.  A digest of 256 bits does not collide, but comparing costs next to nothing."""


class PagedKVCache:
    """Fulfils `core.interfaces.KVCache`.

    :param allocator: its blocks belong to this cache alone.
    :param block_size: positions in one block.
    :param identity: states model, KV dtype and adapter; blocks of another identity never match.
    :param enable_prefix_caching: whether prompts may share blocks at all.
    :param record_events: whether to keep events for `drain_events`.
    :raises ConfigError: `block_size` is below 1.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        block_size: int,
        identity: bytes,
        enable_prefix_caching: bool,
        record_events: bool = False,
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size={block_size} must be at least 1 (--block-size)")
        self.block_size = block_size
        self.num_blocks = allocator.num_blocks - 1
        self.record_events = record_events
        self._pool = allocator
        self._is_caching = enable_prefix_caching
        self._tokens = struct.Struct(f"<{block_size}I")
        # Each part's length goes before it, so that no two lists of parts have one encoding.
        parts = (_DOMAIN, str(block_size).encode(), identity)
        self._base = self._hash(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        # Every request with blocks, and how many of its blocks have been offered to the index.
        self._num_offered: dict[Request, int] = {}
        self._index: dict[bytes, int] = {}
        self._entries: list[_Entry | None] = [None] * allocator.num_blocks  # by block
        self._num_cached = 0  # blocks with an entry and without a holder
        self._num_queries = 0
        self._num_hits = 0
        self._num_evictions = 0
        self._evicted: list[int] = []

    # --- the life of a table ---

    def lookup(self, request: Request, /) -> int:
        """Give a request without blocks the longest cached prefix; return its length in tokens.

        At most `num_tokens - 1` and a multiple of the block size.  A request that asks for the
        log-probabilities of its prompt gets none, because those need every position computed.
        Hashes no block behind the first that is missing, and none twice in a request's life.

        :raises IntegrityError: the request holds blocks already.
        """
        if request.block_ids:
            raise IntegrityError(
                f"request {request.request_id!r} is looked up, but holds blocks already"
            )
        if not self._is_caching or request.params.prompt_logprobs is not None:
            return 0
        block_ids = self._find(request)
        num_tokens = len(block_ids) * self.block_size
        self._num_queries += request.num_tokens
        self._num_hits += num_tokens
        if block_ids:
            num_free = self._pool.num_free
            self._pool.share(block_ids)
            self._num_cached -= num_free - self._pool.num_free
            request.block_ids.extend(block_ids)
            self._num_offered[request] = len(block_ids)
        return num_tokens

    def reserve(self, request: Request, num_tokens: int, /) -> bool:
        """Grow the table until it covers `num_tokens` positions; whether there were enough blocks.

        Appends only: a block in a table never moves.  On `False` nothing has changed.
        """
        table = request.block_ids
        if num_tokens <= len(table) * self.block_size:
            return True
        try:
            block_ids = self._pool.allocate(-(-num_tokens // self.block_size) - len(table))
        except OutOfBlocksError:
            return False
        if self._index:
            self._evict(block_ids)
        if not table:
            self._num_offered[request] = 0
        table.extend(block_ids)
        return True

    def commit(self, request: Request, /) -> None:
        """Publish every full block within `request.num_confirmed` for reuse by later prompts.

        A block whose digest another block has published already stays private.

        :raises IntegrityError: positions are confirmed that have no block or no known token.
        """
        num_full = request.num_confirmed // self.block_size
        if num_full and self._is_caching and num_full > self._num_offered.get(request, 0):
            self._publish(request, num_full)

    def free(self, request: Request, /) -> None:
        """Release all blocks of a request and empty its table; harmless without blocks.

        Its digests stay: they depend on its tokens alone, and a preempted request is looked up again.
        """
        table = request.block_ids
        if not table:
            return
        entries, pool = self._entries, self._pool
        # The tail of a chain is worthless without its head, so the tail is released, and evicted, first.
        cached = [block for block in reversed(table) if entries[block] is not None]
        if len(cached) < len(table):
            pool.release([block for block in reversed(table) if entries[block] is None], keep=False)
        if cached:
            num_free = pool.num_free
            pool.release(cached)
            self._num_cached += pool.num_free - num_free
        table.clear()
        del self._num_offered[request]

    def can_ever_fit(self, num_tokens: int, /) -> bool:
        """Whether the whole pool, all to itself, would hold `num_tokens` positions."""
        return num_tokens <= self.num_blocks * self.block_size

    def reset(self) -> None:
        """Forget all cached prefixes.

        A request that holds blocks now goes on, but publishes none until it has been freed: what it
        computes from now on may rest on what was forgotten.
        """
        self._index.clear()
        self._entries = [None] * len(self._entries)
        self._num_cached = 0
        self._num_offered = dict.fromkeys(self._num_offered, _NEVER)

    # --- the chain of digests ---

    def _find(self, request: Request) -> list[int]:
        """Walk the request's chain through the index; return the blocks found."""
        block_ids: list[int] = []
        parent = self._root(request)
        for number in range((request.num_tokens - 1) // self.block_size):
            packed = self._pack(request, number)
            digest = self._digest(request, number, parent, packed)
            block = self._index.get(digest)
            if block is None or self._entries[block] != (digest, parent, packed):
                break
            block_ids.append(block)
            parent = digest
        return block_ids

    def _publish(self, request: Request, num_full: int) -> None:
        """Offer the blocks up to `num_full` to the index."""
        table = request.block_ids
        if request.num_confirmed > min(request.num_tokens, len(table) * self.block_size):
            raise IntegrityError(
                f"request {request.request_id!r} has {request.num_confirmed} confirmed positions, but "
                f"{request.num_tokens} tokens and {len(table)} blocks of {self.block_size}"
            )
        first = self._num_offered[request]
        self._num_offered[request] = num_full
        parent = request.block_digests[first - 1] if first else self._root(request)
        for number in range(first, num_full):
            packed = self._pack(request, number)
            digest = self._digest(request, number, parent, packed)
            entry = _Entry(digest, parent, packed)
            block = self._index.setdefault(digest, table[number])
            if block == table[number]:
                self._entries[block] = entry
            elif self._entries[block] != entry:  # a collision: nothing behind it can be told apart
                self._num_offered[request] = _NEVER
                return
            parent = digest

    def _digest(self, request: Request, number: int, parent: bytes, packed: bytes) -> bytes:
        """Return the digest of a full block, and remember it: `parent` belongs to the block before."""
        digests = request.block_digests
        if number == len(digests):
            digests.append(self._hash(parent + packed))
        return digests[number]

    def _root(self, request: Request) -> bytes:
        """Hash what two requests must have in common before their tokens are compared."""
        return self._hash(self._base + request.cache_salt.encode("utf-8", "surrogatepass"))

    def _pack(self, request: Request, number: int) -> bytes:
        start = number * self.block_size
        return self._tokens.pack(*request.token_ids[start : start + self.block_size])

    @staticmethod
    def _hash(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    def _evict(self, block_ids: list[int]) -> None:
        """Forget what was published about blocks that have just been handed out."""
        for block in block_ids:
            entry = self._entries[block]
            if entry is not None:
                self._entries[block] = None
                del self._index[entry.digest]
                self._num_cached -= 1
                self._num_evictions += 1
                if self.record_events:
                    self._evicted.append(block)

    # --- reports ---

    def stats(self) -> KVStats:
        """Count right now; O(requests) for the fragmentation, O(1) for everything else.

        A position without a token lies in a block that exactly one request holds, since only full
        blocks are shared: so the unfilled ends of all tables add up without counting any twice.
        """
        num_used = self.num_blocks - self._pool.num_free
        return KVStats(
            num_blocks=self.num_blocks,
            num_used=num_used,
            num_cached=self._num_cached,
            num_queries=self._num_queries,
            num_hits=self._num_hits,
            num_evictions=self._num_evictions,
            fragmentation=self._num_unfilled() / (num_used * self.block_size) if num_used else 0.0,
        )

    def _num_unfilled(self) -> int:
        """Count the held positions for which no token is known or being sampled."""
        size = self.block_size
        unfilled = [
            len(request.block_ids) * size - len(request.token_ids) - request.num_inflight
            for request in self._num_offered
        ]
        return sum(count for count in unfilled if count > 0)

    def drain_events(self) -> list[Event]:
        """Return and forget the evictions since the last call, as one event."""
        evicted, self._evicted = self._evicted, []
        return [BlocksEvicted(evicted)] if evicted else []

    # --- laws ---

    def check_integrity(self, requests: Iterable[Request], /) -> None:
        """Check pool and cache against the tables of all requests that hold blocks.

        :raises IntegrityError: naming the law that does not hold.
        """
        self._pool.check_integrity()
        held: Counter[int] = Counter()
        holders = set()
        for request in requests:
            self._check_table(request)
            held.update(request.block_ids)
            if request.block_ids:
                holders.add(request)
        if holders != self._num_offered.keys():
            strangers = sorted(r.request_id for r in holders ^ self._num_offered.keys())
            raise IntegrityError(f"tables and cache disagree whether these hold blocks: {strangers}")
        for block in range(1, self.num_blocks + 1):
            if self._pool.num_holders(block) != held[block]:
                raise IntegrityError(
                    f"block {block} has {self._pool.num_holders(block)} holders, "
                    f"but is in {held[block]} tables"
                )
        self._check_index(held)

    def _check_table(self, request: Request) -> None:
        name, table, digests = request.request_id, request.block_ids, request.block_digests
        if len(set(table)) < len(table):
            raise IntegrityError(f"request {name!r} has a block twice in its table: {table}")
        if not all(0 < block <= self.num_blocks for block in table):
            raise IntegrityError(
                f"request {name!r} has a block in its table that is not usable: {table}"
            )
        if len(digests) > request.num_tokens // self.block_size:
            raise IntegrityError(
                f"request {name!r} has {len(digests)} digests, but {request.num_tokens} tokens"
            )
        for block, digest in zip(table, digests, strict=False):
            entry = self._entries[block]
            if entry is not None and entry.digest != digest:
                raise IntegrityError(
                    f"block {block} of request {name!r} is published as another's content"
                )

    def _check_index(self, held: Counter[int]) -> None:
        published = {block: entry for block, entry in enumerate(self._entries) if entry is not None}
        if self._index != {entry.digest: block for block, entry in published.items()}:
            raise IntegrityError(
                f"the index has {len(self._index)} digests, but {len(published)} blocks are published "
                f"or a digest is published twice"
            )
        num_cached = sum(block not in held for block in published)
        if num_cached != self._num_cached:
            raise IntegrityError(
                f"{num_cached} published blocks have no holder, but {self._num_cached} counted"
            )
