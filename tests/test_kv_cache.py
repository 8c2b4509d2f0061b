"""The prefix cache, and whether its conformance kit would notice a broken one."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from core.blocks import BlockPool
from core.errors import ConfigError, CytheraError, IntegrityError, OutOfBlocksError
from core.events import BlocksEvicted
from core.kv_cache import PagedKVCache
from core.testing import KVCacheConformance
from core.testing.kv_cache import admit, confirm, make_request, preempt


def make_cache(num_blocks=9, block_size=2, identity=b"model", *, caching=True, record_events=False):
    return PagedKVCache(BlockPool(num_blocks), block_size, identity, caching, record_events)


def cached(cache, name, tokens, **options):
    request = make_request(name, tokens, **options)
    admit(cache, request)
    confirm(cache, request)
    table = request.block_ids.copy()
    cache.free(request)
    return table


class TestPagedKVCache(KVCacheConformance):
    def make_kv_cache(self, num_blocks, block_size):
        return make_cache(num_blocks, block_size)


class PlainPool:
    """An allocator as an outsider may write it: a list, a dictionary, and no name of ours."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.queue = list(range(num_blocks - 1, 0, -1))
        self.counts = {}

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self, count, /):
        if count > len(self.queue):
            raise OutOfBlocksError(f"{count} > {len(self.queue)}")
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.counts.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, block_ids, /):
        for block in block_ids:
            if block in self.queue:
                self.queue.remove(block)
            self.counts[block] = self.counts.get(block, 0) + 1

    def release(self, block_ids, /, *, keep=True):
        for block in block_ids:
            self.counts[block] -= 1
            if not self.counts[block]:
                self.queue.insert(len(self.queue) if keep else 0, block)

    def num_holders(self, block_id, /):
        return self.counts.get(block_id, 0)

    def check_integrity(self):
        free = {block for block in range(1, self.num_blocks) if not self.num_holders(block)}
        if sorted(free) != sorted(self.queue):
            raise IntegrityError("free is not free")


class TestOverAnOutsidersPool(KVCacheConformance):
    max_examples = 20

    def make_kv_cache(self, num_blocks, block_size):
        return PagedKVCache(PlainPool(num_blocks), block_size, b"model", enable_prefix_caching=True)


def test_factory_is_asked():
    with pytest.raises(NotImplementedError, match="make_kv_cache"):
        KVCacheConformance().make_kv_cache(2, 1)


# --- what may be shared ------------------------------------------------------------------------------


def chain(request, identity, block_size):
    """The digests of a request's full blocks, written down a second time."""
    domain = b"cythera prefix cache, chain of token blocks, 1"
    parts = [domain, str(block_size).encode(), identity]
    base = hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()
    parent = hashlib.sha256(base + request.cache_salt.encode("utf-8", "surrogatepass")).digest()
    digests = []
    for start in range(0, request.num_tokens - block_size + 1, block_size):
        tokens = request.token_ids[start : start + block_size]
        parent = hashlib.sha256(parent + struct.pack(f"<{block_size}I", *tokens)).digest()
        digests.append(parent)
    return digests


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12),
    block_size=st.integers(1, 5),
    identity=st.binary(max_size=5),
    salt=st.text(max_size=4),
)
def test_digests_are_the_documented_chain(tokens, block_size, identity, salt):
    cache = make_cache(20, block_size, identity)
    request = make_request("a", tokens, salt=salt)
    admit(cache, request)
    confirm(cache, request)
    assert request.block_digests == chain(request, identity, block_size)


@given(
    one=st.tuples(st.binary(max_size=3), st.text(max_size=3)),
    other=st.tuples(st.binary(max_size=3), st.text(max_size=3)),
)
def test_identity_and_salt_cannot_be_shifted_into_each_other(one, other):
    digests = []
    for identity, salt in (one, other):
        request = make_request("a", [1, 2], salt=salt)
        cache = make_cache(identity=identity)
        admit(cache, request)
        confirm(cache, request)
        digests.append(request.block_digests[0])
    assert (digests[0] == digests[1]) == (one == other)


def test_lone_surrogate_in_a_salt_is_a_salt_like_any_other():
    cache = make_cache()
    cached(cache, "a", [1, 2, 3], salt="\ud800")
    assert cache.lookup(make_request("b", [1, 2, 3], salt="\ud801")) == 0
    assert cache.lookup(make_request("c", [1, 2, 3], salt="\ud800")) == 2


class Truncated(PagedKVCache):
    """Digests so short that they collide."""

    num_bytes = 1

    @classmethod
    def _hash(cls, data):
        return hashlib.sha256(data).digest()[: cls.num_bytes]


def find_collision(cache, first=()):
    """Two different blocks of one digest behind the blocks `first`."""
    seen = {}
    for token in range(10_000):
        tokens = [*first, token, token]
        request = make_request("probe", [*tokens, 0])
        cache.lookup(request)
        digest = request.block_digests[-1]
        if digest in seen:
            return seen[digest], tokens
        seen[digest] = tokens
    raise AssertionError("no collision")


def test_collision_of_a_digest_is_told_apart_by_the_tokens():
    cache = Truncated(BlockPool(9), 2, b"model", enable_prefix_caching=True)
    one, other = find_collision(cache)
    cached(cache, "a", one)
    assert cache.lookup(make_request("b", [*other, 0])) == 0
    assert cache.lookup(make_request("c", [*one, 0])) == 2


def test_nothing_behind_a_collision_is_published():
    cache = Truncated(BlockPool(20), 2, b"model", enable_prefix_caching=True)
    one, other = find_collision(cache)
    cached(cache, "a", one)
    colliding = make_request("b", [*other, 7, 7])
    admit(cache, colliding)
    confirm(cache, colliding)
    cache.check_integrity([colliding])
    colliding.token_ids += [8, 8]
    assert cache.reserve(colliding, 6)
    confirm(cache, colliding)
    found = make_request("c", [*one, 7, 7, 0])
    assert cache.lookup(found) == 2
    for request in (found, colliding):
        cache.free(request)
    cache.check_integrity([])
    assert cache.stats().num_cached == 1


def test_collision_with_another_parent_is_told_apart():
    class TokensOnly(PagedKVCache):
        """Digests that depend on the last block alone."""

        def _digest(self, request, number, parent, packed):
            return super()._digest(request, number, bytes([number]) * 32, packed)

    cache = TokensOnly(BlockPool(20), 2, b"model", enable_prefix_caching=True)
    cached(cache, "a", [1, 1, 8, 8])
    cached(cache, "b", [2, 2])
    assert cache.lookup(make_request("c", [2, 2, 8, 8, 0])) == 2


# --- digests are computed once -----------------------------------------------------------------------


class Counting(PagedKVCache):
    num_hashes = 0

    def _hash(self, data):
        self.num_hashes += 1
        return hashlib.sha256(data).digest()


def test_no_block_is_hashed_twice():
    cache = Counting(BlockPool(30), 2, b"model", enable_prefix_caching=True)
    tokens = list(range(20))
    cached(cache, "a", tokens)
    request = make_request("b", [*tokens, 20, 21, 22])
    cache.num_hashes = 0
    assert admit(cache, request) == 20
    assert cache.num_hashes == 1 + 11  # the root, ten found, one not
    confirm(cache, request)
    assert cache.num_hashes == 1 + 11
    preempt(cache, request)
    assert admit(cache, request) == 22
    assert cache.num_hashes == 2 + 11


def test_lookup_stops_at_the_first_block_that_is_missing():
    cache = Counting(BlockPool(30), 2, b"model", enable_prefix_caching=True)
    cache.num_hashes = 0
    assert cache.lookup(make_request("a", list(range(40)))) == 0
    assert cache.num_hashes == 2


def test_commit_without_a_new_full_block_does_nothing():
    cache = Counting(BlockPool(30), 4, b"model", enable_prefix_caching=True)
    request = make_request("a", list(range(10)))
    admit(cache, request)
    confirm(cache, request, 8)
    cache.num_hashes = 0
    for num_confirmed in (8, 9, 10):
        confirm(cache, request, num_confirmed)
    assert cache.num_hashes == 0


# --- tables ------------------------------------------------------------------------------------------


def test_first_block_of_a_content_stays_the_published_one():
    cache = make_cache()
    one, other = make_request("a", [1, 2, 3, 4]), make_request("b", [1, 2, 5, 6])
    admit(cache, one)
    admit(cache, other)
    confirm(cache, one)
    confirm(cache, other)
    found = make_request("c", [1, 2, 5, 6, 0])
    assert cache.lookup(found) == 4
    assert found.block_ids == [one.block_ids[0], other.block_ids[1]]
    cache.free(other)
    assert cache.stats().num_cached == 0  # one copy is worthless, the other two blocks are held
    cache.check_integrity([one, found])


def test_lookup_of_a_request_with_blocks_is_refused():
    cache = make_cache()
    request = make_request("a", [1, 2, 3])
    admit(cache, request)
    with pytest.raises(IntegrityError, match="'a' is looked up, but holds blocks"):
        cache.lookup(request)


@pytest.mark.parametrize("num_confirmed", [4, 6])
def test_commit_beyond_what_is_there_is_refused(num_confirmed):
    cache = make_cache()
    request = make_request("a", [1, 2, 3, 4, 5])
    assert cache.reserve(request, 2)
    request.num_confirmed = num_confirmed
    with pytest.raises(
        IntegrityError, match=f"{num_confirmed} confirmed positions, but 5 tokens and 1 "
    ):
        cache.commit(request)
    cache.check_integrity([request])


def test_commit_without_blocks_is_refused():
    request = make_request("a", [1, 2, 3])
    with pytest.raises(IntegrityError, match="0 blocks"):
        confirm(make_cache(), request)


def test_block_size_is_checked():
    with pytest.raises(ConfigError, match="block_size=0"):
        make_cache(block_size=0)


def test_without_prefix_caching_nothing_is_found_or_kept():
    cache = make_cache(caching=False)
    cached(cache, "a", [1, 2, 3, 4])
    assert cache.lookup(make_request("b", [1, 2, 3, 4])) == 0
    stats = cache.stats()
    assert (stats.num_cached, stats.num_queries, stats.num_used) == (0, 0, 0)
    cache.check_integrity([])


def test_reset_with_nothing_to_forget_is_harmless():
    cache = make_cache()
    cache.reset()
    cache.check_integrity([])


def test_survivor_of_a_reset_publishes_again_once_it_was_preempted():
    cache = make_cache()
    request = make_request("a", [1, 2, 3, 4, 5])
    admit(cache, request)
    cache.reset()
    confirm(cache, request)
    assert cache.lookup(make_request("b", [1, 2, 3])) == 0
    preempt(cache, request)
    assert admit(cache, request) == 0
    confirm(cache, request)
    assert cache.lookup(make_request("c", [1, 2, 3])) == 2


# --- numbers -----------------------------------------------------------------------------------------


def test_hits_and_queries_are_counted_in_tokens():
    cache = make_cache()
    cached(cache, "a", [1, 2, 3, 4, 5])
    cached(cache, "b", [1, 2, 3, 9])
    cached(cache, "c", [1, 2, 3, 9], prompt_logprobs=0)
    stats = cache.stats()
    assert (stats.num_queries, stats.num_hits) == (9, 2)


def test_fragmentation_is_the_unfilled_share_of_held_positions():
    cache = make_cache(block_size=4)
    assert cache.stats().fragmentation == 0.0
    request = make_request("a", [1, 2, 3, 4, 5])
    admit(cache, request)
    assert cache.stats().fragmentation == 3 / 8
    request.num_inflight = 1  # the token that is being sampled will sit there
    assert cache.stats().fragmentation == 2 / 8
    short = make_request("b", [7] * 12)
    admit(cache, short, 4)  # more tokens than positions leave no gap, and fill none elsewhere
    assert cache.stats().fragmentation == 2 / 12


def test_usage_counts_held_blocks():
    cache = make_cache(num_blocks=9)
    admit(cache, make_request("a", [1, 2, 3]))
    assert cache.stats().usage == 2 / 8


def test_evictions_are_one_event_until_drained():
    cache = make_cache(num_blocks=4, record_events=True)
    table = cached(cache, "a", [1, 2, 3, 4])
    admit(cache, make_request("b", [5] * 3))
    admit(cache, make_request("c", [6]))
    assert cache.drain_events() == [BlocksEvicted(table[::-1])]
    assert cache.drain_events() == []


def test_nobody_listens_and_nothing_is_kept():
    cache = make_cache(num_blocks=4)
    cached(cache, "a", [1, 2, 3, 4])
    admit(cache, make_request("b", [5] * 6))
    assert cache.stats().num_evictions == 2
    assert cache.drain_events() == []


# --- laws --------------------------------------------------------------------------------------------


def damage_table_twice(cache, request, other):
    request.block_ids.append(request.block_ids[0])


def damage_table_null(cache, request, other):
    request.block_ids[0] = 0


def damage_digests(cache, request, other):
    request.block_digests.append(b"")


def damage_content(cache, request, other):
    request.block_digests[0] = request.block_digests[1]


def damage_holders(cache, request, other):
    cache._pool.share([request.block_ids[0]])


def damage_unknown_holder(cache, request, other):
    del cache._num_offered[other]


def damage_index(cache, request, other):
    cache._index.popitem()


def damage_duplicate_digest(cache, request, other):
    cache._entries[other.block_ids[-1]] = cache._entries[request.block_ids[0]]


def damage_counter(cache, request, other):
    cache._num_cached += 1


def damage_pool(cache, request, other):
    cache._pool._num_free += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_table_twice, "'a' has a block twice"),
        (damage_table_null, "'a' has a block in its table that is not usable"),
        (damage_digests, "'a' has 3 digests, but 5 tokens"),
        (damage_content, "published as another's content"),
        (damage_holders, "has 2 holders, but is in 1 tables"),
        (damage_unknown_holder, r"whether these hold blocks: \['b'\]"),
        (damage_index, "blocks are published"),
        (damage_duplicate_digest, "a digest is published twice"),
        (damage_counter, "have no holder, but 1 counted"),
        (damage_pool, "queued as free"),
    ],
)
def test_damage_is_noticed(damage, message):
    cache = make_cache(num_blocks=20)
    request, other = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [9])
    admit(cache, request)
    admit(cache, other)
    confirm(cache, request)
    cache.check_integrity([request, other])
    damage(cache, request, other)
    with pytest.raises(IntegrityError, match=message):
        cache.check_integrity([request, other])


# --- planted bugs ------------------------------------------------------------------------------------


class ForgetsTheSalt(PagedKVCache):
    def _root(self, request):
        return self._base


class ForgetsTheParent(PagedKVCache):
    """A block is known by its own tokens alone."""

    def _digest(self, request, number, parent, packed):
        return super()._digest(request, number, b"", packed)

    def _find(self, request):
        block_ids = []
        for number in range((request.num_tokens - 1) // self.block_size):
            packed = self._pack(request, number)
            block = self._index.get(self._digest(request, number, b"", packed))
            if block is None or block in block_ids:
                break
            block_ids.append(block)
        return block_ids


class KeepsDigestOfReusedBlock(PagedKVCache):
    def _evict(self, block_ids):
        pass

    def check_integrity(self, requests, /):
        pass


class PublishesUnconfirmed(PagedKVCache):
    def commit(self, request, /):
        confirmed, request.num_confirmed = request.num_confirmed, request.num_computed
        super().commit(request)
        request.num_confirmed = confirmed


class ReleasesHeadFirst(PagedKVCache):
    def free(self, request, /):
        request.block_ids.reverse()
        super().free(request)


class FindsTheWholePrompt(PagedKVCache):
    def _find(self, request):
        request.token_ids.append(0)
        block_ids = super()._find(request)
        request.token_ids.pop()
        return block_ids


class ReservesHalfway(PagedKVCache):
    def reserve(self, request, num_tokens, /):
        if super().reserve(request, num_tokens):
            return True
        num_free = self._pool.num_free
        if num_free:
            super().reserve(request, (len(request.block_ids) + num_free) * self.block_size)
        return False


class FindsWithoutHolding(PagedKVCache):
    def lookup(self, request, /):
        found = super().lookup(request)
        if found:
            self._pool.release(request.block_ids)
        return found

    def check_integrity(self, requests, /):
        pass


class ServesPromptLogprobsFromCache(PagedKVCache):
    def lookup(self, request, /):
        params, request.params = request.params, make_request("", [0]).params
        found = super().lookup(request)
        request.params = params
        return found


class NeverPublishes(PagedKVCache):
    def commit(self, request, /):
        pass


class KeepsOnlyPrompts(PagedKVCache):
    def commit(self, request, /):
        if request.num_confirmed <= request.num_prompt:
            super().commit(request)


class ResetKeepsTheIndex(PagedKVCache):
    def reset(self):
        pass


class KeepsWorthlessBlocks(PagedKVCache):
    """Releases everything in one call, the partly filled end of a table first and kept."""

    def free(self, request, /):
        if request.block_ids:
            num_free = self._pool.num_free
            published = sum(self._entries[block] is not None for block in request.block_ids)
            worthless = len(request.block_ids) - published
            self._pool.release(request.block_ids[::-1])
            self._num_cached += max(0, self._pool.num_free - num_free - worthless)
            request.block_ids.clear()
            del self._num_offered[request]


class CountsSharedBlocksTwice(PagedKVCache):
    def stats(self):
        num_held = sum(len(request.block_ids) for request in self._num_offered) or 1
        fragmentation = self._num_unfilled() / (num_held * self.block_size)
        return replace(super().stats(), fragmentation=fragmentation)


class ForgetsToCountEvictions(PagedKVCache):
    def drain_events(self):
        super().drain_events()
        return []


class LeaksATail(PagedKVCache):
    """Forgets the last block of a table, and its own check does not look."""

    def free(self, request, /):
        if len(request.block_ids) > 1:
            request.block_ids.pop()
        super().free(request)

    def check_integrity(self, requests, /):
        pass


BUGS = {
    ForgetsTheSalt: "test_salts_do_not_share",
    ForgetsTheParent: "test_equal_tokens_behind_different_ones_do_not_match",
    KeepsDigestOfReusedBlock: "test_reused_block_is_not_found",
    PublishesUnconfirmed: "test_unconfirmed_positions_are_not_published",
    ReleasesHeadFirst: "test_tail_is_evicted_before_head",
    FindsTheWholePrompt: "test_last_token_is_left_to_compute",
    ReservesHalfway: "test_failed_reserve_changes_nothing",
    FindsWithoutHolding: "test_shared_blocks_are_counted_once",
    ServesPromptLogprobsFromCache: "test_request_for_prompt_logprobs_is_computed",
    NeverPublishes: "test_last_token_is_left_to_compute",
    KeepsOnlyPrompts: "test_preempted_request_finds_its_own_outputs",
    ResetKeepsTheIndex: "test_reset_forgets_everything",
    KeepsWorthlessBlocks: "test_worthless_blocks_are_reused_first",
    CountsSharedBlocksTwice: "test_shared_blocks_are_counted_once",
    ForgetsToCountEvictions: "test_reused_block_is_not_found",
    LeaksATail: "",
}
ORDER_OF_EVICTION = {ReleasesHeadFirst, KeepsWorthlessBlocks}
"""What the examples show and the state machine leaves open."""


def make_kit(bug):
    class Kit(KVCacheConformance):
        max_examples = 500  # it stops at the first failure; a miss must not be a matter of luck

        def make_kv_cache(self, num_blocks, block_size):
            return bug(BlockPool(num_blocks), block_size, b"model", enable_prefix_caching=True)

        def machine_settings(self):
            return settings(
                super().machine_settings(),
                phases=[Phase.generate],
                database=None,
                derandomize=True,
                report_multiple_bugs=False,
            )

    return Kit()


CAUGHT = (AssertionError, CytheraError, pytest.fail.Exception)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if BUGS[bug]], ids=lambda bug: bug.__name__)
def test_example_of_the_kit_catches(bug):
    with pytest.raises(CAUGHT):
        getattr(make_kit(bug), BUGS[bug])()


@pytest.mark.parametrize(
    "bug", [bug for bug in BUGS if bug not in ORDER_OF_EVICTION], ids=lambda bug: bug.__name__
)
def test_state_machine_of_the_kit_catches(bug):
    with pytest.raises(CAUGHT):
        make_kit(bug).test_state_machine()
