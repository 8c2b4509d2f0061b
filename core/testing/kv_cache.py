"""Conformance of KV caches: what every `core.interfaces.KVCache` must do.

Subclass `KVCacheConformance` in a test module and say how to make yours, prefix caching switched on::

    class TestAcmeCache(KVCacheConformance):
        def make_kv_cache(self, num_blocks, block_size):
            return AcmeCache(num_blocks, block_size)

A state machine plays scheduler over pools of 1 to 8 usable blocks.  Its model knows each block's
content, that is salt and tokens from the first to the block's last, from the commit until the block
is handed out again.  So it can tell for every lookup what must not be found, because some block
holds something else, and what must be, because nothing has displaced it.
"""

from __future__ import annotations

from collections import defaultdict
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

from core.errors import IntegrityError
from core.events import BlocksEvicted
from core.interfaces import KVCache, missing_members
from core.request import Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

Content = tuple[str, tuple[int, ...]]
"""Salt, and all tokens up to the end of a block."""
MAX_TOKENS = 14
MAX_REQUESTS = 5


def make_request(
    name: str, tokens: Sequence[int], *, salt: str = "", prompt_logprobs: int | None = None
) -> Request:
    """Make a request of which a KV cache can tell no difference to a real one."""
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Request(name, tokens, params, max_tokens=MAX_TOKENS, cache_salt=salt)


def admit(kv_cache: KVCache, request: Request, num_tokens: int | None = None) -> int:
    """Look a request up and reserve all it needs, as a scheduler does; return the cached tokens."""
    cached = kv_cache.lookup(request)
    assert kv_cache.reserve(request, request.num_tokens if num_tokens is None else num_tokens)
    request.num_computed = request.num_confirmed = cached
    return cached


def confirm(kv_cache: KVCache, request: Request, num_tokens: int | None = None) -> None:
    """Compute a request up to `num_tokens`, take in the result and commit."""
    request.num_confirmed = request.num_tokens if num_tokens is None else num_tokens
    request.num_computed = max(request.num_computed, request.num_confirmed)
    kv_cache.commit(request)


def preempt(kv_cache: KVCache, request: Request) -> None:
    """Take a request's blocks away; it can be admitted again."""
    kv_cache.free(request)
    request.num_computed = request.num_confirmed = 0
    request.num_preemptions += 1


class PrefixModel:
    """What blocks hold, as far as it was committed."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: defaultdict[Content, set[int]] = defaultdict(set)
        self.content: dict[int, Content] = {}
        # Committed, and no block of that content has been handed out since: it has to be found.
        # Of several blocks with one content a cache may publish any, so losing one may lose all.
        self.present: set[Content] = set()
        self.num_committed: dict[Request, int] = {}
        self.survivors: set[Request] = set()  # of a reset

    def contents(self, request: Request, num_tokens: int) -> list[Content]:
        """Name the contents of the full blocks within the first `num_tokens` tokens."""
        size, tokens = self.block_size, request.token_ids
        ends = range(size, num_tokens + 1, size)
        return [(request.cache_salt, tuple(tokens[:end])) for end in ends]

    def lookup(self, request: Request, num_found: int) -> None:
        """Check what a lookup found."""
        wanted = self.contents(request, request.num_tokens - 1)
        if request.params.prompt_logprobs is not None:
            wanted = []
        assert num_found == len(request.block_ids) * self.block_size
        assert len(request.block_ids) <= len(wanted), (
            f"{num_found} tokens were found, which is too many"
        )
        for block, content in zip(request.block_ids, wanted, strict=False):
            assert block in self.blocks[content], (
                f"block {block} was found for {content}, but holds {self.content.get(block)}"
            )
        for content in wanted[len(request.block_ids) :][:1]:
            assert content not in self.present, f"{content} is cached, but was not found"
        self.num_committed[request] = len(request.block_ids)

    def commit(self, request: Request) -> None:
        """Note the contents that may be found from now on."""
        contents = self.contents(request, request.num_confirmed)
        first = self.num_committed.get(request, 0)
        if request in self.survivors:
            first = 0  # may be published again, and need not
        for block, content in list(zip(request.block_ids, contents, strict=False))[first:]:
            self.blocks[content].add(block)
            self.content[block] = content
            if request not in self.survivors:
                self.present.add(content)
        self.num_committed[request] = max(first, len(contents))

    def hand_out(self, block_ids: Sequence[int]) -> set[int]:
        """Forget what blocks hold; return those whose eviction has to be reported."""
        evicted = set()
        for block in block_ids:
            content = self.content.pop(block, None)
            if content is None:
                continue
            if content in self.present and self.blocks[content] == {block}:
                evicted.add(block)
            self.blocks[content].remove(block)
            self.present.discard(content)
        return evicted

    def free(self, request: Request) -> None:
        """Forget who held blocks; what the blocks hold stays."""
        self.num_committed.pop(request, None)
        self.survivors.discard(request)

    def reset(self, requests: Sequence[Request]) -> None:
        """Forget everything; those that hold blocks may publish again or not."""
        self.blocks.clear()
        self.content.clear()
        self.present.clear()
        self.survivors = {request for request in requests if request.block_ids}

    def num_cached(self, held: set[int]) -> tuple[int, int]:
        """Bound the number of blocks that are cached and not held."""
        low = sum(not self.blocks[content] & held for content in self.present)
        return low, len(self.content.keys() - held)


@st.composite
def _requests(draw: st.DrawFn) -> Request:
    """Draw a request that begins as others do: zeros, and perhaps a single one among them."""
    tokens = [0] * draw(st.integers(1, MAX_TOKENS // 2))
    one = draw(st.integers(0, 2 * len(tokens)))
    if one < len(tokens):
        tokens[one] = 1
    salt = draw(st.sampled_from(["", "", "a"]))
    prompt_logprobs = draw(st.sampled_from([None, None, None, 0]))
    return make_request("", tokens, salt=salt, prompt_logprobs=prompt_logprobs)


class KVCacheMachine(RuleBasedStateMachine):
    """Random requests with few distinct tokens, so that prefixes collide, over a tiny pool."""

    kv_cache: KVCache
    model: PrefixModel

    def __init__(self, conformance: KVCacheConformance) -> None:
        super().__init__()
        self.conformance = conformance
        self.requests: list[Request] = []
        self.num_made = 0
        self.num_evictions = 0
        self.counts = (0, 0)

    @initialize(
        num_usable=st.sampled_from([8, 6, 5, 4, 3, 2, 1]),
        block_size=st.sampled_from([1, 2, 2, 3]),
        requests=st.lists(_requests(), min_size=2, max_size=MAX_REQUESTS),
    )
    def start(self, num_usable: int, block_size: int, requests: list[Request]) -> None:
        """Make a fresh cache, and requests that wait for it."""
        self.kv_cache = self.conformance.make_kv_cache(num_usable + 1, block_size)
        self.kv_cache.record_events = True
        self.num_usable = num_usable
        self.block_size = block_size
        self.model = PrefixModel(block_size)
        assert (self.kv_cache.num_blocks, self.kv_cache.block_size) == (num_usable, block_size)
        capacity = num_usable * block_size
        assert [n for n in range(2 * capacity) if self.kv_cache.can_ever_fit(n)] == [
            *range(capacity + 1)
        ]
        for request in requests:
            self._add(request)

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(
        request=_requests(),
        num_in_flight=st.sampled_from([0, 0, 1, 3]),
        is_short=st.booleans(),
    )
    def serve(self, request: Request, num_in_flight: int, is_short: bool) -> None:
        """Bring a new request in, and let it end at once or stay."""
        self._add(request)
        self._run(request, num_in_flight)
        if is_short:
            self._free(request)
            self.requests.remove(request)

    @precondition(lambda self: self._without_blocks())
    @rule(data=st.data(), num_in_flight=st.sampled_from([0, 0, 1, 3]))
    def admit(self, data: st.DataObject, num_in_flight: int) -> None:
        """Let a request run that waits or was preempted."""
        self._run(data.draw(st.sampled_from(self._without_blocks())), num_in_flight)

    @precondition(lambda self: self._without_blocks())
    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        """Look a request up and leave it at that."""
        self._lookup(data.draw(st.sampled_from(self._without_blocks())))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), ahead=st.integers(-2, 2))
    def reserve(self, data: st.DataObject, ahead: int) -> None:
        """Grow a table up to about the known tokens."""
        request = data.draw(st.sampled_from(self.requests))
        self._reserve(request, max(1, request.num_tokens + ahead))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        """Compute some positions, and let a part of what is in flight come back."""
        request = data.draw(st.sampled_from(self.requests))
        covered = min(request.num_tokens, len(request.block_ids) * self.block_size)
        request.num_computed = data.draw(st.integers(request.num_computed, covered))
        self._confirm(request, data.draw(st.integers(request.num_confirmed, request.num_computed)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def generate(self, data: st.DataObject, tokens: list[int]) -> None:
        """Go on for some tokens, as long as there are blocks."""
        request = data.draw(st.sampled_from(self.requests))
        for token in tokens:
            if request.num_tokens >= MAX_TOKENS or not self._reserve(request, request.num_tokens):
                return
            self._confirm(request, request.num_tokens)
            request.token_ids.append(token)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), is_last=st.booleans())
    def free(self, data: st.DataObject, is_last: bool) -> None:
        """End or preempt a request."""
        request = data.draw(st.sampled_from(self.requests))
        self._free(request)
        if is_last:
            self.requests.remove(request)

    @rule(chance=st.integers(0, 7))
    def reset(self, chance: int) -> None:
        """Forget all prefixes, now and then."""
        if chance == 0:
            self.kv_cache.reset()
            self.model.reset(self.requests)

    @invariant()
    def books_balance(self) -> None:
        """Every block is free, cached or in a table, and the numbers say so."""
        if not hasattr(self, "model"):
            return
        self.kv_cache.check_integrity(self.requests)
        stats, held = self.kv_cache.stats(), self._held()
        assert (stats.num_blocks, stats.num_used) == (self.num_usable, len(held))
        low, high = self.model.num_cached(held)
        assert low <= stats.num_cached <= high
        counts = (stats.num_hits, stats.num_queries)
        assert stats.num_hits <= stats.num_queries
        assert counts >= self.counts
        self.counts = counts
        self._check_fragmentation(stats.fragmentation, held)

    def _add(self, request: Request) -> None:
        self.num_made += 1
        request.request_id = f"r{self.num_made}"
        self.requests.append(request)

    def _run(self, request: Request, num_in_flight: int) -> None:
        """Look up, reserve and compute everything; the last positions have not come back yet."""
        self._lookup(request)
        if self._reserve(request, request.num_tokens):
            request.num_computed = request.num_tokens
            self._confirm(request, max(request.num_confirmed, request.num_tokens - num_in_flight))
        elif request.block_ids:
            self._free(request)

    def _lookup(self, request: Request) -> None:
        found = self.kv_cache.lookup(request)
        assert (request.num_computed, request.num_confirmed) == (0, 0), "progress is the scheduler's"
        self.model.lookup(request, found)
        request.num_computed = request.num_confirmed = found

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """Grow a table: completely, or not at all."""
        before = request.block_ids.copy()
        num_blocks = max(len(before), -(-num_tokens // self.block_size))
        held = self._held()
        fits = num_blocks - len(before) <= self.num_usable - len(held)
        assert self.kv_cache.reserve(request, num_tokens) == fits
        assert len(request.block_ids) == (num_blocks if fits else len(before))
        assert request.block_ids[: len(before)] == before, "a block in a table has moved"
        added = request.block_ids[len(before) :]
        assert not held.intersection(added), "a block was handed out while it was held"
        self._check_evictions(added)
        return fits

    def _confirm(self, request: Request, num_tokens: int) -> None:
        confirm(self.kv_cache, request, num_tokens)
        self.model.commit(request)

    def _free(self, request: Request) -> None:
        """Take a request's blocks away; doing it twice does no harm."""
        preempt(self.kv_cache, request)
        assert request.block_ids == []
        self.kv_cache.free(request)
        self.model.free(request)

    def _check_fragmentation(self, fragmentation: float, held: set[int]) -> None:
        """Bound it: a cache may count known tokens, or those computed already."""
        num_positions = max(1, len(held) * self.block_size)
        low = self._num_unfilled([r.num_tokens for r in self.requests])
        high = self._num_unfilled([r.num_confirmed for r in self.requests])
        assert low / num_positions <= fragmentation <= high / num_positions

    def _num_unfilled(self, num_tokens: list[int]) -> int:
        """Count the positions of held blocks that no request fills; shared ones count once."""
        held, filled = set(), set()
        for request, count in zip(self.requests, num_tokens, strict=True):
            for index, block in enumerate(request.block_ids):
                slots = [(block, offset) for offset in range(self.block_size)]
                held.update(slots)
                filled.update(slots[: max(0, count - index * self.block_size)])
        return len(held - filled)

    def _check_evictions(self, added: Sequence[int]) -> None:
        """Compare what was reported as evicted with the blocks that were handed out."""
        candidates = set(added) & self.model.content.keys()
        wanted = self.model.hand_out(added)
        events = [e for e in self.kv_cache.drain_events() if isinstance(e, BlocksEvicted)]
        evicted = [block for event in events for block in event.block_ids]
        assert wanted <= set(evicted) <= candidates
        assert len(set(evicted)) == len(evicted)
        self.num_evictions += len(evicted)
        assert self.kv_cache.stats().num_evictions == self.num_evictions

    def _held(self) -> set[int]:
        return {block for request in self.requests for block in request.block_ids}

    def _without_blocks(self) -> list[Request]:
        return [request for request in self.requests if not request.block_ids]


class KVCacheConformance:
    """Subclass, return your cache from `make_kv_cache`, and let pytest collect the tests."""

    max_examples = 100

    def make_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Make the cache under test, prefix caching switched on.

        :param num_blocks: the null block included.
        """
        raise NotImplementedError("a subclass of KVCacheConformance must define make_kv_cache")

    def machine_settings(self) -> settings:
        """Choose how long the state machine searches."""
        return settings(
            max_examples=self.max_examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )

    def test_state_machine(self) -> None:
        """Random requests beside a model of what every block holds."""
        machine = partial(KVCacheMachine, self)
        # Any factory will do, whatever the annotation says.
        run_state_machine_as_test(machine, settings=self.machine_settings())  # type: ignore[arg-type]

    def test_members(self) -> None:
        """Everything that the contract names is there."""
        assert missing_members(self.make_kv_cache(2, 1), KVCache) == []

    def test_last_token_is_left_to_compute(self) -> None:
        """A prompt that is cached completely is found up to its last block."""
        cache = self.make_kv_cache(9, 2)
        self._cache(cache, "a", [1, 2, 3, 4])
        again = make_request("b", [1, 2, 3, 4])
        assert cache.lookup(again) == 2
        longer = make_request("c", [1, 2, 3, 4, 5])
        assert cache.lookup(longer) == 4
        assert longer.block_ids[:1] == again.block_ids
        cache.check_integrity([again, longer])

    def test_salts_do_not_share(self) -> None:
        """What one salt has cached, another does not find."""
        cache = self.make_kv_cache(9, 2)
        self._cache(cache, "a", [1, 2, 3], salt="mine")
        assert cache.lookup(make_request("b", [1, 2, 3], salt="yours")) == 0
        assert cache.lookup(make_request("c", [1, 2, 3])) == 0
        assert cache.lookup(make_request("d", [1, 2, 3], salt="mine")) == 2

    def test_equal_tokens_behind_different_ones_do_not_match(self) -> None:
        """A block is known by everything before it, not by its own tokens."""
        cache = self.make_kv_cache(9, 2)
        self._cache(cache, "a", [1, 2, 8, 9])
        self._cache(cache, "b", [3, 4])
        assert cache.lookup(make_request("c", [3, 4, 8, 9, 0])) == 2
        assert cache.lookup(make_request("d", [8, 9, 0])) == 0

    def test_unconfirmed_positions_are_not_published(self) -> None:
        """A step in flight may still fail."""
        cache = self.make_kv_cache(9, 2)
        request = make_request("a", [1, 2, 3, 4])
        admit(cache, request)
        request.num_computed = 4
        confirm(cache, request, 3)
        assert cache.lookup(make_request("b", [1, 2, 3, 4, 5])) == 2

    def test_request_for_prompt_logprobs_is_computed(self) -> None:
        """It needs the hidden states of its whole prompt, but others may reuse what it computed."""
        cache = self.make_kv_cache(9, 2)
        self._cache(cache, "a", [1, 2, 3])
        request = make_request("b", [1, 2, 3, 4, 5], prompt_logprobs=0)
        assert admit(cache, request) == 0
        confirm(cache, request)
        assert cache.lookup(make_request("c", [1, 2, 3, 4, 5])) == 4

    def test_failed_reserve_changes_nothing(self) -> None:
        """One block too many, and everything is as it was."""
        cache = self.make_kv_cache(5, 2)
        holder, request = make_request("a", [1, 2, 3]), make_request("b", [4, 5])
        admit(cache, holder)
        admit(cache, request)
        table = request.block_ids.copy()
        assert not cache.reserve(request, 6)
        assert request.block_ids == table
        assert cache.stats().num_used == 3
        cache.check_integrity([holder, request])

    def test_reused_block_is_not_found(self) -> None:
        """Content is gone from the moment its block is handed out; evictions are counted."""
        cache = self.make_kv_cache(3, 2)
        cache.record_events = True
        old = self._cache(cache, "a", [1, 2, 3, 4])
        request = make_request("b", [5, 6, 7, 8])
        admit(cache, request)
        assert cache.lookup(make_request("c", [1, 2, 3, 4, 5])) == 0
        events = [e for e in cache.drain_events() if isinstance(e, BlocksEvicted)]
        assert sorted(b for event in events for b in event.block_ids) == sorted(old)
        assert cache.stats().num_evictions == 2
        assert not cache.drain_events()

    def test_tail_is_evicted_before_head(self) -> None:
        """However many blocks go, the head of the chain can still be found."""
        tokens = list(range(11))
        for num_evicted in range(5):
            cache = self.make_kv_cache(6, 2)
            self._cache(cache, "a", tokens[:10])
            admit(cache, make_request("b", [99] * (2 * num_evicted + 1)), 2 * num_evicted)
            assert cache.lookup(make_request("c", tokens)) == 10 - 2 * num_evicted

    def test_worthless_blocks_are_reused_first(self) -> None:
        """The partly filled end of a table goes before anything that can be found again."""
        cache = self.make_kv_cache(6, 2)
        self._cache(cache, "a", [1, 2, 3, 4])
        self._cache(cache, "b", [5, 6, 7])
        last = make_request("c", [8])
        admit(cache, last)
        admit(cache, make_request("d", [9]))
        assert cache.stats().num_evictions == 0
        preempt(cache, last)
        admit(cache, make_request("e", [9]))
        assert cache.stats().num_evictions == 0

    def test_least_recently_used_prefix_goes_first(self) -> None:
        """Finding a prefix makes it recent."""
        cache = self.make_kv_cache(4, 2)
        for name, token in (("a", 1), ("b", 2), ("c", 3)):
            self._cache(cache, name, [token, token])
        touched = make_request("d", [1, 1, 0])
        assert cache.lookup(touched) == 2
        cache.free(touched)
        admit(cache, make_request("e", [7, 7]))
        found = [cache.lookup(make_request(f"f{token}", [token, token, 0])) for token in (1, 2, 3)]
        assert found == [2, 0, 2]

    def test_preempted_request_finds_its_own_outputs(self) -> None:
        """It is looked up again with everything that it has generated."""
        cache = self.make_kv_cache(9, 2)
        request = make_request("a", [1, 2, 3])
        admit(cache, request)
        confirm(cache, request)
        for token in (4, 5, 6):
            request.token_ids.append(token)
            assert cache.reserve(request, request.num_tokens)
            confirm(cache, request)
        preempt(cache, request)
        assert admit(cache, request) == 4
        confirm(cache, request)
        cache.check_integrity([request])

    def test_shared_blocks_are_counted_once(self) -> None:
        """In use and in fragmentation."""
        cache = self.make_kv_cache(9, 4)
        self._cache(cache, "a", [1, 2, 3, 4, 5])
        requests = [make_request(name, [1, 2, 3, 4, 5]) for name in "bc"]
        for request in requests:
            assert admit(cache, request) == 4
            confirm(cache, request)
        stats = cache.stats()
        assert stats.num_used == 3
        assert stats.fragmentation == pytest.approx(6 / 12)

    def test_reset_forgets_everything(self) -> None:
        """Also what running requests have published; these can go on and end."""
        cache = self.make_kv_cache(9, 2)
        self._cache(cache, "a", [1, 2, 3])
        running = make_request("b", [4, 5, 6])
        admit(cache, running)
        confirm(cache, running)
        cache.reset()
        assert cache.stats().num_cached == 0
        assert cache.lookup(make_request("c", [1, 2, 3])) == 0
        assert cache.lookup(make_request("d", [4, 5, 6])) == 0
        running.token_ids.append(7)
        assert cache.reserve(running, 4)
        confirm(cache, running)
        cache.check_integrity([running])
        cache.free(running)
        cache.check_integrity([])

    def test_leak_is_noticed(self) -> None:
        """`check_integrity` knows when blocks are held that no table holds."""
        cache = self.make_kv_cache(9, 2)
        admit(cache, make_request("a", [1, 2, 3]))
        with pytest.raises(IntegrityError):
            cache.check_integrity([])

    def _cache(self, cache: KVCache, name: str, tokens: list[int], *, salt: str = "") -> list[int]:
        """Compute and free a request; return the blocks it had."""
        request = make_request(name, tokens, salt=salt)
        admit(cache, request)
        confirm(cache, request)
        block_ids = request.block_ids.copy()
        cache.free(request)
        return block_ids
