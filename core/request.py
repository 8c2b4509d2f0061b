"""Requests: what a client may ask, how far an engine has come with it, and the one validator.

No tensors here. Every front end, every process and every plugin goes through `RequestLimits.check`;
there is no second place that decides what a legal request is.
"""

from __future__ import annotations

import enum
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from core.errors import InvalidRequestError, RequestTooLargeError

MAX_SEED: Final = 2**63 - 1
MAX_ID_BYTES: Final = 256


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen.  Every default is the neutral value.

    Plain data: nothing is checked here, because only an engine knows its vocabulary and its caps.
    `RequestLimits.check` is called for every request before it reaches a scheduler.
    """

    n: int = 1
    """Number of completions of the same prompt."""
    max_tokens: int | None = 16
    """Most tokens to generate; `None` means as many as the context length allows."""
    min_tokens: int = 0
    """Tokens to generate before end-of-sequence, stop ids or stop strings may end the request."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and -1 keep all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest one; in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output; > 0."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; in [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """When given, no other token can be generated."""
    banned_token_ids: list[int] | None = None
    """Tokens that can not be generated."""
    stop: str | list[str] | None = None
    """Texts that end the request when they appear in the output."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the request, beside the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence ids."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string in the text that is returned."""
    logprobs: int | None = None
    """Report the log-probability of each generated token and of this many alternatives."""
    prompt_logprobs: int | None = None
    """Report the same for each prompt token but the first."""
    seed: int | None = None
    """Makes the draws of this request reproducible, whatever shares its batch."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are the words that clients receive."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """Where a request is in its life."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """One sequence being generated, and the scheduler's whole state about it.

    `token_ids` holds the prompt and every token that has come back.  `num_inflight` more tokens
    are being sampled by steps that were submitted but not yet applied.  `num_computed` counts the
    positions whose keys and values are written or planned to be; `num_confirmed` those whose step
    has come back.  All that a scheduler does is let `num_computed` catch up with
    `num_tokens + num_inflight`.
    """

    __slots__ = (
        "arrival",
        "arrival_time",
        "block_digests",
        "block_ids",
        "cache_salt",
        "finish_reason",
        "is_decoding",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_confirmed",
        "num_inflight",
        "num_positions",
        "num_preemptions",
        "num_prompt",
        "params",
        "priority",
        "request_id",
        "row",
        "seed",
        "status",
        "stop_ids",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str = "",
    ) -> None:
        """Make a request that waits.

        :param max_tokens: resolved limit on generated tokens, at least 1.
        :param stop_ids: token ids that end it: stop ids, and end-of-sequence unless ignored.
        :param seed: resolved seed of its draws, in [0, 2^63).
        :param priority: lower runs first.
        :param arrival_time: seconds of the monotonic clock.
        :param cache_salt: only requests of the same salt share cached prefixes.
        """
        self.request_id = request_id
        self.params = params
        self.token_ids: list[int] = list(prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.seed = seed
        self.priority = priority
        self.arrival = -1  # order in which a scheduler received it
        self.arrival_time = arrival_time
        self.cache_salt = cache_salt
        # Positions it computes in its whole life: the last token is never fed back.
        self.num_positions = self.num_prompt + max_tokens - 1
        self.num_computed = 0
        self.num_confirmed = 0
        self.num_inflight = 0
        self.is_decoding = False  # all known tokens are planned: each step adds one
        self.num_cached = 0
        self.num_preemptions = 0
        self.block_ids: list[int] = []  # the block table; only a KVCache writes it
        self.block_digests: list[bytes] = []  # of its full blocks; only a KVCache writes it
        self.row = -1
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, tokens={self.num_tokens}"
            f"+{self.num_inflight}, computed={self.num_computed}, row={self.row})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known on the host: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Generated tokens that have come back."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens that have come back (a copy)."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, whatever ended it."""
        return self.status is RequestStatus.FINISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The caps of one engine, and the one validator of requests.

    :param vocab_size: token ids are in [0, vocab_size).
    :param max_model_len: most tokens of prompt and output together.
    :param max_kv_tokens: token positions of the whole KV pool.
    """

    vocab_size: int
    max_model_len: int
    max_kv_tokens: int = 2**62
    max_n: int = 128
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    max_token_list: int = 1024
    """Most entries of logit_bias, banned_token_ids and stop_token_ids; `allowed_token_ids` may
    name the whole vocabulary."""

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        request_id: str = "",
    ) -> int:
        """Raise unless the request is legal here; return its resolved `max_tokens`.

        :raises InvalidRequestError: a field has an illegal value; names field, value and limit.
        :raises RequestTooLargeError: it could never fit, however empty the engine.
        """
        self._check_strings(params, cache_salt, request_id)
        self._check_numbers(params)
        self._check_ids(params)
        _check_int("priority", priority, -(2**31), 2**31 - 1)
        self._check_prompt(prompt_token_ids)
        return self._resolve_max_tokens(len(prompt_token_ids), params)

    def _check_numbers(self, params: SamplingParams) -> None:
        _check_int("n", params.n, 1, self.max_n)
        _check_int("min_tokens", params.min_tokens, 0, self.max_model_len)
        _check_int("top_k", params.top_k, -1, 2**31 - 1)
        _check_float("temperature", params.temperature, 0.0, 100.0)
        _check_float("top_p", params.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", params.min_p, 0.0, 1.0)
        _check_float("presence_penalty", params.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", params.repetition_penalty, 0.0, 100.0, open_low=True)
        if params.max_tokens is not None:
            _check_int("max_tokens", params.max_tokens, 1, 2**31 - 1)
            if params.min_tokens > params.max_tokens:
                raise _refusal(
                    "min_tokens", params.min_tokens, f"must be at most max_tokens={params.max_tokens}"
                )
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(params, field)
            if value is not None:
                _check_int(field, value, 0, min(self.max_logprobs, self.vocab_size))
        if params.seed is not None:
            _check_int("seed", params.seed, 0, MAX_SEED)
        for field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(params, field), bool):
                raise _refusal(field, getattr(params, field), "must be true or false")

    def _check_strings(self, params: SamplingParams, cache_salt: str, request_id: str) -> None:
        if not isinstance(params.stop, str | list | tuple | None):
            raise _refusal("stop", params.stop, "must be a string or a list of strings")
        stops = params.stop_strings
        if len(stops) > self.max_stop_strings:
            raise _refusal("stop", len(stops), f"at most {self.max_stop_strings} stop strings")
        for index, text in enumerate(stops):
            _check_text(f"stop[{index}]", text, self.max_stop_bytes, empty_ok=False)
        _check_text("cache_salt", cache_salt, MAX_ID_BYTES)
        _check_text("request_id", request_id, MAX_ID_BYTES)

    def _check_ids(self, params: SamplingParams) -> None:
        self._check_bias(params.logit_bias)
        self._check_id_list("stop_token_ids", params.stop_token_ids, self.max_token_list)
        self._check_id_list("banned_token_ids", params.banned_token_ids, self.max_token_list)
        self._check_id_list("allowed_token_ids", params.allowed_token_ids, self.vocab_size)
        self._check_usable(params)

    def _check_bias(self, bias: object) -> None:
        if bias is None:
            return
        if not isinstance(bias, dict):
            raise _refusal("logit_bias", bias, "must map token ids to numbers")
        self._check_id_list("logit_bias", list(bias), self.max_token_list)
        for token_id, value in bias.items():
            _check_float(f"logit_bias[{token_id}]", value, -100.0, 100.0)

    def _check_usable(self, params: SamplingParams) -> None:
        """Refuse what would leave no token to draw at the first position."""
        masked = set(params.banned_token_ids or ())
        if params.min_tokens > 0:
            masked.update(params.stop_token_ids or ())
        rule = "must leave a token that is neither banned nor, with min_tokens, a stop token"
        if params.allowed_token_ids is not None:
            if masked.issuperset(params.allowed_token_ids):
                raise _refusal("allowed_token_ids", params.allowed_token_ids, rule)
        elif len(masked) >= self.vocab_size:
            field = "banned_token_ids" if params.banned_token_ids else "stop_token_ids"
            raise _refusal(field, getattr(params, field), rule)

    def _check_id_list(self, field: str, ids: object, limit: int) -> None:
        if ids is None:
            return
        if not isinstance(ids, list | tuple):
            raise _refusal(field, ids, "must be a list of token ids")
        if len(ids) > limit:
            raise _refusal(field, len(ids), f"at most {limit} entries")
        for token_id in ids:
            _check_int(field, token_id, 0, self.vocab_size - 1)

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        if not isinstance(prompt_token_ids, Sequence) or isinstance(prompt_token_ids, str | bytes):
            raise _refusal("prompt", prompt_token_ids, "must be a list of token ids")
        if not prompt_token_ids:
            raise _refusal("prompt", prompt_token_ids, "must hold at least one token")
        if len(prompt_token_ids) > self.max_model_len:  # before walking a huge list
            raise self._too_large(len(prompt_token_ids), 1)
        for token_id in prompt_token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                _check_int("prompt", token_id, 0, self.vocab_size - 1)

    def _resolve_max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        # The last generated token is never fed back, so it needs no position in the pool.
        room = min(self.max_model_len, self.max_kv_tokens + 1) - num_prompt
        wanted = max(params.max_tokens or 1, params.min_tokens, 1)
        if wanted > room:
            raise self._too_large(num_prompt, wanted)
        return room if params.max_tokens is None else params.max_tokens

    def _too_large(self, num_prompt: int, wanted: int) -> RequestTooLargeError:
        total = num_prompt + wanted
        if total > self.max_model_len:
            return RequestTooLargeError(
                f"prompt of {num_prompt} tokens and {wanted} tokens to generate make {total}, but the "
                f"context length is {self.max_model_len}; shorten the prompt, lower max_tokens, or "
                f"start the engine with a larger --max-model-len",
                field="prompt" if num_prompt >= self.max_model_len else "max_tokens",
            )
        return RequestTooLargeError(
            f"prompt of {num_prompt} tokens and {wanted} tokens to generate need {total - 1} positions, "
            f"but the whole KV pool has {self.max_kv_tokens}; lower max_tokens, or start the engine "
            f"with a larger --num-kv-blocks or --gpu-memory-utilization",
            field="prompt" if num_prompt > self.max_kv_tokens else "max_tokens",
        )


def _refusal(field: str, value: object, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {rule}, got {_shorten(value)}", field=field)


def _shorten(value: object) -> str:
    try:
        shown = reprlib.repr(value)  # looks at the first few entries of a container only
    except ValueError:  # Python writes no integer of more than 4300 digits
        shown = f"an enormous {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(field, value, "must be an integer")
    if not low <= value <= high:
        raise _refusal(field, value, f"must be between {low} and {high}")


def _check_float(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(field, value, "must be a number")
    # NaN compares false with everything, so it has to be asked for by name.
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise _refusal(field, value, "must be finite")
    if not low <= value <= high or (open_low and value == low):
        raise _refusal(field, value, f"must be in {'(' if open_low else '['}{low:g}, {high:g}]")


def _check_text(field: str, value: object, max_bytes: int, *, empty_ok: bool = True) -> None:
    if not isinstance(value, str):
        raise _refusal(field, value, "must be a string")
    if not value and not empty_ok:
        raise _refusal(field, value, "must not be empty")
    if len(value) > max_bytes:  # before encoding a huge text
        raise _refusal(field, value, f"at most {max_bytes} bytes")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which no message can carry
        raise _refusal(field, value, "must be valid Unicode") from None
    if num_bytes > max_bytes:
        raise _refusal(field, value, f"at most {max_bytes} bytes")
