"""Requests: the one validator, refusal by refusal, and the counters of a request's life."""

from __future__ import annotations

import array
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequestError, RequestError, RequestTooLargeError
from core.request import (
    MAX_ID_BYTES,
    MAX_SEED,
    FinishReason,
    Request,
    RequestLimits,
    RequestStatus,
    SamplingParams,
)

LIMITS = RequestLimits(vocab_size=100, max_model_len=64, max_kv_tokens=50)
HUGE = 10**5000  # more digits than Python writes


def check(prompt=(1, 2, 3), limits=LIMITS, *, priority=0, cache_salt="", request_id="", **params):
    return limits.check(
        prompt,
        SamplingParams(**params),
        priority=priority,
        cache_salt=cache_salt,
        request_id=request_id,
    )


NUMBERS = {
    # field: (legal values, illegal values)
    "n": ([1, 128], [0, 129, -1, HUGE]),
    "min_tokens": ([0, 16], [-1, 65, HUGE]),
    "max_tokens": ([1, 16], [0, -1, 2**31, HUGE]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, HUGE]),
    "logprobs": ([0, 20], [-1, 21, HUGE]),
    "prompt_logprobs": ([0, 20], [-1, 21, HUGE]),
    "seed": ([0, MAX_SEED], [-1, MAX_SEED + 1, HUGE]),
    "priority": ([-(2**31), 2**31 - 1], [-(2**31) - 1, 2**31, HUGE]),
    "temperature": ([0, 0.0, -0.0, 5e-324, 1, 100.0], [-1e-9, 100.1, HUGE]),
    "top_p": ([5e-324, 0.5, 1, 1.0], [0, 0.0, -0.0, 1.0000001, HUGE]),
    "min_p": ([0, 0.0, 1.0], [-0.1, 1.1, HUGE]),
    "presence_penalty": ([-2, 2.0], [-2.1, 2.1, HUGE]),
    "frequency_penalty": ([-2, 2.0], [-2.1, 2.1, HUGE]),
    "repetition_penalty": ([5e-324, 1, 100.0], [0, 0.0, -1, 100.5, HUGE]),
}
REALS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
LEGAL = [(field, value) for field, (legal, _) in NUMBERS.items() for value in legal]
ILLEGAL = [(field, value) for field, (_, illegal) in NUMBERS.items() for value in illegal]
WRONG_TYPES = [
    (field, value) for field in NUMBERS for value in (True, False, "1", [1], {}, b"1", 1 + 0j)
]
NOT_INTEGERS = [(field, value) for field in NUMBERS if field not in REALS for value in (1.0, math.nan)]
NOT_FINITE = [(field, value) for field in REALS for value in (math.nan, math.inf, -math.inf)]
NO_NONE = [
    (field, None)
    for field in NUMBERS
    if field not in ("max_tokens", "logprobs", "prompt_logprobs", "seed")
]
FLAGS = [
    (field, value)
    for field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
    for value in (0, 1, None, "true", [])
]


@pytest.mark.parametrize(("field", "value"), LEGAL)
def test_legal_numbers_pass(field, value):
    assert check(**{field: value}) >= 1


@pytest.mark.parametrize(
    ("field", "value"),
    ILLEGAL + WRONG_TYPES + NOT_INTEGERS + NOT_FINITE + NO_NONE + FLAGS,
    ids=lambda value: repr(value) if value != HUGE else "huge",
)
def test_illegal_values_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        check(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("n", 129, "128"), ("logprobs", 21, "20"), ("temperature", 101.0, "100"), ("top_k", -7, "-1")],
)
def test_refusals_hold_value_and_limit(field, value, limit):
    with pytest.raises(InvalidRequestError) as caught:
        check(**{field: value})
    assert str(value) in str(caught.value)
    assert limit in str(caught.value)


def test_small_vocabularies_limit_logprobs():
    limits = RequestLimits(vocab_size=4, max_model_len=64)
    check((1,), limits, logprobs=4)
    with pytest.raises(InvalidRequestError, match=r"logprobs: must be between 0 and 4, got 5"):
        check((1,), limits, logprobs=5)


def test_min_tokens_may_not_exceed_max_tokens():
    assert check(min_tokens=5, max_tokens=5) == 5
    with pytest.raises(InvalidRequestError, match=r"at most max_tokens=5, got 6") as caught:
        check(min_tokens=6, max_tokens=5)
    assert caught.value.field == "min_tokens"


# --- texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, "x", [], ["a", "b"], ("a",), ["ß" * 128], ["y"] * 16])
def test_legal_stop_strings_pass(stop):
    check(stop=stop)


@pytest.mark.parametrize(
    ("stop", "field"),
    [
        (7, "stop"),
        ({"a": 1}, "stop"),
        (["y"] * 17, "stop"),
        ("", "stop[0]"),
        (["a", ""], "stop[1]"),
        (["a", None], "stop[1]"),
        (["a", 5], "stop[1]"),
        (["z" * 257], "stop[0]"),
        (["ß" * 129], "stop[0]"),  # 258 bytes
        (["\ud800"], "stop[0]"),
    ],
)
def test_illegal_stop_strings_are_refused_by_name(stop, field):
    with pytest.raises(InvalidRequestError) as caught:
        check(stop=stop)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["cache_salt", "request_id"])
def test_identifiers_are_bounded_texts(field):
    check(**{field: "é" * (MAX_ID_BYTES // 2)})
    for value in ("x" * (MAX_ID_BYTES + 1), "é" * MAX_ID_BYTES, None, 5, b"x", "\udfff"):
        with pytest.raises(InvalidRequestError) as caught:
            check(**{field: value})
        assert caught.value.field == field


@settings(deadline=None)
@given(st.text(max_size=300))
def test_accepted_texts_can_travel(text):
    try:
        check(request_id=text, stop=[text or "x"])
    except InvalidRequestError:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(text)) == text
    assert len(text.encode()) <= MAX_ID_BYTES


def test_stop_strings_are_a_tuple_however_they_were_written():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


# --- token ids ---------------------------------------------------------------------------------------


ID_LISTS = ["stop_token_ids", "banned_token_ids", "allowed_token_ids"]


@pytest.mark.parametrize("field", ID_LISTS)
def test_token_lists_hold_ids_of_the_vocabulary(field):
    for value in (None, [0, 99], (5,), [7, 7]):
        check(**{field: value})
    for value in ([100], [-1], [True], [1.0], ["1"], [None], [[1]], 5, "12", {1}, {1: 2}, [HUGE]):
        with pytest.raises(InvalidRequestError) as caught:
            check(**{field: value})
        assert caught.value.field == field


def test_logit_bias_maps_ids_to_bounded_numbers():
    for value in (None, {}, {0: 100, 99: -100.0}):
        check(logit_bias=value)
    for value in ({100: 0.0}, {"1": 0.0}, {True: 0.0}, [1], "x", 3):
        with pytest.raises(InvalidRequestError) as caught:
            check(logit_bias=value)
        assert caught.value.field == "logit_bias"
    for value in (100.1, -101, math.nan, math.inf, None, "1", True, HUGE):
        with pytest.raises(InvalidRequestError) as caught:
            check(logit_bias={7: value})
        assert caught.value.field == "logit_bias[7]"


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "banned_token_ids"])
def test_token_lists_are_bounded(field):
    limits = RequestLimits(vocab_size=5000, max_model_len=64)
    for length, legal in ((1024, True), (1025, False)):
        value = dict.fromkeys(range(length), 1.0) if field == "logit_bias" else [1] * length
        if legal:
            check((1,), limits, **{field: value})
        else:
            with pytest.raises(InvalidRequestError, match=f"{field}: at most 1024 entries, got 1025"):
                check((1,), limits, **{field: value})


def test_allowed_tokens_may_be_the_whole_vocabulary():
    limits = RequestLimits(vocab_size=5000, max_model_len=64)
    check((1,), limits, allowed_token_ids=list(range(5000)))
    with pytest.raises(InvalidRequestError, match="at most 5000 entries"):
        check((1,), limits, allowed_token_ids=[0] * 5001)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("allowed_token_ids", {"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1, 3]}),
        (
            "allowed_token_ids",
            {
                "allowed_token_ids": [1, 2],
                "banned_token_ids": [2],
                "stop_token_ids": [1],
                "min_tokens": 1,
            },
        ),
        ("banned_token_ids", {"banned_token_ids": list(range(100))}),
        (
            "banned_token_ids",
            {"banned_token_ids": list(range(99)), "stop_token_ids": [99], "min_tokens": 1},
        ),
        ("stop_token_ids", {"stop_token_ids": list(range(100)), "min_tokens": 1}),
    ],
)
def test_something_must_be_left_to_draw(field, params):
    with pytest.raises(InvalidRequestError, match="must leave a token") as caught:
        check(**params)
    assert caught.value.field == field


def test_little_is_enough_to_draw():
    check(allowed_token_ids=[1, 2], banned_token_ids=[2])
    check(allowed_token_ids=[1], stop_token_ids=[1])  # ends at once, as asked
    check(banned_token_ids=list(range(99)), stop_token_ids=[98], min_tokens=1)


# --- the prompt and its length -----------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[0], (99,), [1] * 48, range(3), array.array("q", [1, 2])])
def test_legal_prompts_pass(prompt):
    check(prompt, max_tokens=1)


@pytest.mark.parametrize(
    "prompt",
    [[], (), None, 5, "abc", b"abc", {1: 2}, {1}, [100], [-1], [1, True], [1.0], ["1"], [None], [HUGE]],
    ids=lambda value: repr(value) if value != [HUGE] else "huge",
)
def test_illegal_prompts_are_refused(prompt):
    with pytest.raises(InvalidRequestError) as caught:
        check(prompt)
    assert caught.value.field == "prompt"


def test_a_prompt_may_hold_other_integer_types():
    class Token(int):
        pass

    check([Token(3)])
    with pytest.raises(InvalidRequestError):
        check([Token(100)])


@pytest.mark.parametrize(
    ("num_prompt", "params", "limits", "max_tokens"),
    [
        (10, {}, {}, 16),
        (10, {"max_tokens": 54}, {}, 54),
        (10, {"max_tokens": None}, {}, 54),
        (63, {"max_tokens": None}, {}, 1),
        (63, {"max_tokens": 1}, {}, 1),
        # The last token needs no place in the pool.
        (10, {"max_tokens": None}, {"max_kv_tokens": 20}, 11),
        (20, {"max_tokens": None}, {"max_kv_tokens": 20}, 1),
        (20, {"max_tokens": 1}, {"max_kv_tokens": 20}, 1),
        (10, {"max_tokens": None, "min_tokens": 54}, {}, 54),
    ],
)
def test_max_tokens_is_resolved(num_prompt, params, limits, max_tokens):
    limits = RequestLimits(vocab_size=100, max_model_len=64, **limits)
    assert check([1] * num_prompt, limits, **params) == max_tokens


@pytest.mark.parametrize(
    ("num_prompt", "params", "limits", "field", "words"),
    [
        (10, {"max_tokens": 55}, {}, "max_tokens", ["10", "55", "65", "64", "--max-model-len"]),
        (10, {"max_tokens": None, "min_tokens": 55}, {}, "max_tokens", ["55", "65", "64"]),
        (64, {"max_tokens": None}, {}, "prompt", ["64", "65", "--max-model-len"]),
        (10**6, {}, {}, "prompt", ["1000000", "64"]),
        (10, {"max_tokens": 12}, {"max_kv_tokens": 20}, "max_tokens", ["21", "20", "--num-kv-blocks"]),
        (21, {"max_tokens": 1}, {"max_kv_tokens": 20}, "prompt", ["21", "20", "--num-kv-blocks"]),
        (21, {"max_tokens": None}, {"max_kv_tokens": 20}, "prompt", ["21", "20"]),
    ],
)
def test_what_can_never_fit_is_refused_with_numbers_and_knobs(num_prompt, params, limits, field, words):
    limits = RequestLimits(vocab_size=100, max_model_len=64, **limits)
    with pytest.raises(RequestTooLargeError) as caught:
        check([1] * num_prompt, limits, **params)
    assert caught.value.field == field
    for word in words:
        assert word in str(caught.value)


# --- anything at all ---------------------------------------------------------------------------------


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
PLAUSIBLE = {
    "n": st.integers(-1, 130),
    "max_tokens": st.none() | st.integers(-1, 70),
    "min_tokens": st.integers(-1, 70),
    "temperature": st.floats(-1, 101),
    "top_k": st.integers(-2, 200),
    "top_p": st.floats(-0.1, 1.1),
    "min_p": st.floats(-0.1, 1.1),
    "repetition_penalty": st.floats(-1, 101),
    "stop": st.none() | st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=3),
    "stop_token_ids": st.none() | st.lists(st.integers(-1, 101), max_size=4),
    "banned_token_ids": st.none() | st.lists(st.integers(-1, 101), max_size=4),
    "allowed_token_ids": st.none() | st.lists(st.integers(-1, 101), max_size=4),
    "logit_bias": st.none() | st.dictionaries(st.integers(-1, 101), st.floats(-101, 101), max_size=3),
    "logprobs": st.none() | st.integers(-1, 21),
    "seed": st.none() | st.integers(-1, 2**64),
}
FIELDS = SamplingParams.__struct_fields__


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
    st.lists(st.integers(0, 99), min_size=1, max_size=3) | ANYTHING,
)
def test_whatever_arrives_is_accepted_or_refused_by_name(params, prompt):
    refusal = None
    try:
        max_tokens = check(prompt, **params)
    except RequestError as error:
        refusal = error
    if refusal is None:
        assert 1 <= max_tokens <= LIMITS.max_model_len
    else:
        assert refusal.field.split("[")[0] in (*FIELDS, "prompt")
        assert str(refusal)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries({}, optional=PLAUSIBLE),
    st.lists(st.integers(0, 99), min_size=1, max_size=70),
    st.integers(1, 70),
)
def test_accepted_requests_fit(params, prompt, max_kv_tokens):
    limits = RequestLimits(vocab_size=100, max_model_len=64, max_kv_tokens=max_kv_tokens)
    sampling_params = SamplingParams(**params)
    try:
        max_tokens = limits.check(prompt, sampling_params)
    except RequestError:
        return
    assert max(1, sampling_params.min_tokens) <= max_tokens
    assert max_tokens == (sampling_params.max_tokens or max_tokens)
    assert len(prompt) + max_tokens <= limits.max_model_len
    request = Request("r", prompt, sampling_params, max_tokens=max_tokens)
    assert request.num_positions <= max_kv_tokens
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(sampling_params), type=SamplingParams)
    assert travelled == sampling_params


# --- the request itself ------------------------------------------------------------------------------


def test_the_neutral_values_are_the_defaults():
    assert msgspec.to_builtins(SamplingParams()) == {}
    assert not SamplingParams().is_greedy
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=-0.0).is_greedy


def test_a_new_request_waits():
    prompt = [1, 2, 3]
    request = Request("r", prompt, SamplingParams(), max_tokens=4, seed=9, priority=-1, cache_salt="s")
    assert (request.status, request.row, request.is_finished) == (RequestStatus.WAITING, -1, False)
    assert (request.num_prompt, request.num_tokens, request.num_output) == (3, 3, 0)
    assert request.num_positions == 6  # the fourth generated token is not fed back
    assert (request.seed, request.priority, request.cache_salt) == (9, -1, "s")
    request.token_ids.append(7)
    assert prompt == [1, 2, 3]
    assert (request.num_tokens, request.num_output, request.output_token_ids) == (4, 1, [7])
    request.output_token_ids.append(8)
    assert request.num_output == 1
    request.num_inflight = 2
    assert repr(request) == "Request('r', WAITING, tokens=4+2, computed=0, row=-1)"
    request.status = RequestStatus.FINISHED
    assert request.is_finished


def test_finish_reasons_are_the_words_of_the_protocol():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
