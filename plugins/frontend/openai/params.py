"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from core.errors import InvalidRequestError
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plugins.frontend.openai.types import GenerationRequest

MAX_REQUEST_ID: Final = 128
TIMEOUT_HEADER: Final = "x-request-timeout"
READ_TIMEOUT_HEADER: Final = "x-stainless-read-timeout"
"""How long the client libraries of OpenAI wait for the next byte, in seconds."""

SAME_NAME: Final = (
    "n",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "seed",
)
"""Fields that a request and `SamplingParams` share."""


def make_params(
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Merge what a client asks for with what it leaves open.

    :param defaults: fields of `SamplingParams` that the model recommends.
    :return: not checked yet; only an engine knows its vocabulary and its caps.
    """
    asked = {name: value for name in SAME_NAME if (value := getattr(request, name)) is not None}
    fields = {
        **defaults,
        **asked,
        "banned_token_ids": _join(request.banned_token_ids, request.custom_token_bans),
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    return SamplingParams(**fields)


def _join(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    return [*(first or ()), *(second or ())] or None


def check_request_id(request_id: str) -> str:
    """Return the id that a client gave its request.

    :raises InvalidRequestError: it could not stand in a path or a log.
    """
    if not 1 <= len(request_id) <= MAX_REQUEST_ID or not all("!" <= char <= "~" for char in request_id):
        raise InvalidRequestError(
            f"request_id: must be 1 to {MAX_REQUEST_ID} visible ASCII characters, got "
            f"{len(request_id)} characters",
            field="request_id",
        )
    return request_id


def find_timeout(request: GenerationRequest, headers: Mapping[str, str]) -> float | None:
    """Find out how many seconds the client gives its request: the least of what it says.

    A client's read timeout counts for an answer in one piece only; in a stream it starts anew with
    every chunk.

    :param headers: by lower-case name.
    :return: `None` if it says nothing.
    :raises InvalidRequestError: it says something else than a positive number.
    """
    limits = [] if request.timeout is None else [_check_seconds("timeout", request.timeout)]
    if TIMEOUT_HEADER in headers:
        seconds = _parse_seconds(headers[TIMEOUT_HEADER])
        limits.append(_check_seconds(TIMEOUT_HEADER, seconds))
    if not request.stream:  # `not-given` is among the values that the libraries send
        seconds = _parse_seconds(headers.get(READ_TIMEOUT_HEADER, ""))
        limits += [seconds] if 0 < seconds < math.inf else []
    return min(limits, default=None)


def _parse_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_seconds(field: str, seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(f"{field}: must be a positive number of seconds", field=field)
    return seconds
