"""The kit for executors catches the mistakes that are made in them."""

from __future__ import annotations

from collections import deque

import pytest

from core.builtin import core_register_executors, make_single_executor
from core.registry import ExecutorEntry
from core.step import NO_TOKEN
from core.testing.executor import ExecutorConformance

(RIGHT,) = core_register_executors()


class WrongExecutor:
    """Around a right one; `bug` names one mistake to make."""

    def __init__(self, executor, bug):
        self.inner, self.bug = executor, bug
        self.max_in_flight = 0 if bug == "takes no step" else executor.max_in_flight
        self.results, self.num_closed, self.is_failing = deque(), 0, False

    def load(self, report):
        if self.bug == "reports nothing":
            return self.inner.load(lambda done, total: None)
        if self.bug == "reports backwards":
            return self.inner.load(lambda done, total: report(total - done, total))
        if self.bug == "reports no end":
            return self.inner.load(lambda done, total: done == total or report(done, total))
        if self.bug == "reports too much":
            return self.inner.load(lambda done, total: report(done * 2, total))
        return self.inner.load(report)

    def kv_capacity(self):
        if self.bug == "finds room for everything":
            try:
                return self.inner.kv_capacity()
            except Exception:  # noqa: BLE001
                return 2
        return self.inner.kv_capacity() - (self.bug == "forgets the null block")

    def allocate(self, num_blocks):
        self.inner.allocate(num_blocks)

    def submit(self, plan):
        self.inner.submit(plan)
        self.results.append(self.take(plan))
        if self.bug == "raises in submit" and isinstance(self.results[-1], Exception):
            raise self.results.pop()

    def take(self, plan):
        try:
            result = self.inner.collect()
        except Exception as error:  # noqa: BLE001
            self.is_failing = True
            return error
        if self.bug == "draws for all rows":
            result.tokens = [token if token != NO_TOKEN else 3 for token in result.tokens]
        if self.bug == "draws for none" and plan.step > 2:
            result.tokens = [NO_TOKEN] * len(result.tokens)
        if self.bug == "forgets a row":
            result.tokens = result.tokens[:1]
        if self.bug == "mixes up rows" and len(result.tokens) > 1 and all(plan.samples):
            result.tokens = result.tokens[::-1]
        if self.bug == "is broken after an error" and self.is_failing:
            result.tokens = [0 if token != NO_TOKEN else token for token in result.tokens]
        if self.bug == "forgets the prompt's logprobs":
            result.prompt_logprobs = {}
        if self.bug == "reports logprobs to all":
            result.logprobs = dict.fromkeys(range(len(plan.rows)), *result.logprobs.values() or [None])
        return result

    def collect(self):
        newest = self.bug == "newest first"
        result = self.results.pop() if newest else self.results.popleft()
        if isinstance(result, Exception):
            if self.bug == "swallows errors":
                return self.collect() if self.results else None
            raise result
        return result

    def close(self):
        self.num_closed += 1
        if self.bug == "closes once" and self.num_closed > 1:
            raise RuntimeError("closed already")
        self.inner.close()


class Buggy(ExecutorConformance):
    __test__ = False

    def __init__(self, bug=""):
        self.bug = bug
        self.entry = ExecutorEntry(name="x", factory=self.make)

    def make(self, plan, parts):
        return WrongExecutor(make_single_executor(plan, parts), self.bug)


PROTOCOL = "test_fulfils_the_protocol"
REPORT = "test_loading_is_reported"
CAPACITY = "test_capacity_is_what_was_asked_for"
ROOM = "test_too_little_memory_is_refused"
TOKENS = "test_tokens_are_those_of_the_model"
ORDER = "test_results_come_in_order_of_submission"
LOGPROBS = "test_log_probabilities_are_reported"
ERROR = "test_an_error_is_raised_by_collect"
CLOSE = "test_it_can_be_closed_at_any_time"

CAUGHT = [
    ("takes no step", PROTOCOL, "max_in_flight is 0"),
    ("reports nothing", REPORT, "nothing is reported"),
    ("reports backwards", REPORT, "progress goes backwards"),
    ("reports no end", REPORT, "the last report is"),
    ("reports too much", REPORT, "more is done than there is"),
    ("forgets the null block", CAPACITY, "kv_capacity is 40"),
    ("finds room for everything", ROOM, "DID NOT RAISE"),
    ("draws for all rows", TOKENS, "does not sample: 3"),
    ("draws for none", TOKENS, "a row samples: -1"),
    ("forgets a row", TOKENS, "1 tokens for"),
    ("mixes up rows", TOKENS, "after"),
    ("newest first", ORDER, "is the oldest"),
    ("forgets the prompt's logprobs", LOGPROBS, "are reported"),
    ("reports logprobs to all", LOGPROBS, "that nobody asked for"),
    ("raises in submit", ERROR, "submit raises what collect should"),
    ("swallows errors", ERROR, "DID NOT RAISE"),
    ("is broken after an error", ERROR, "after a failed step"),
]


@pytest.mark.parametrize(("bug", "law", "message"), CAUGHT)
def test_planted_bug_is_caught(bug, law, message):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        getattr(Buggy(bug), law)()


@pytest.mark.parametrize("law", sorted({law for _, law, _ in CAUGHT} | {CLOSE}))
def test_without_a_bug_the_same_passes(law):
    getattr(Buggy(), law)()


def test_closing_twice_is_tried():
    with pytest.raises(RuntimeError, match="closed already"):
        getattr(Buggy("closes once"), CLOSE)()


def test_methods_that_do_not_fit_the_protocol_are_caught():
    class NoReport(WrongExecutor):
        def load(self):
            pass

    kit = Buggy()
    kit.make_executor = lambda plan, parts: NoReport(make_single_executor(plan, parts), "")
    with pytest.raises(AssertionError, match="load"):
        kit.test_fulfils_the_protocol()


def test_kit_without_an_entry_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="entry"):
        ExecutorConformance().test_fulfils_the_protocol()
