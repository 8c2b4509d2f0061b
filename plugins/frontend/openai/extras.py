"""Fields that clients send and this engine does not have: refused, or told of in `warnings`."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plugins.frontend.openai.body import Extras

MAX_NAMES: Final = 16
"""Names that `warnings` holds; the rest is counted."""

REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "custom_logit_processor": (),
    "ebnf": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "logits_processors": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (),
}
"""What the answer could not be right without, and values beside the empty ones that ask for nothing."""

IGNORED: Final[Mapping[str, tuple[Any, ...]]] = {
    "dry_multiplier": (),
    "dynatemp_max": (),
    "dynatemp_min": (),
    "dynatemp_range": (),
    "early_stopping": (),
    "epsilon_cutoff": (),
    "eta_cutoff": (),
    "length_penalty": (1,),
    "min_keep": (),
    "mirostat": (),
    "mirostat_mode": (),
    "no_repeat_ngram_size": (),
    "nsigma": (),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "sampler_priority": (),
    "skew": (),
    "smoothing_factor": (),
    "spaces_between_special_tokens": (True,),
    "temperature_last": (),
    "tfs": (1,),
    "top_a": (),
    "top_n_sigma": (),
    "typical": (1,),
    "typical_p": (1,),
    "xtc_probability": (),
}
"""Known elsewhere; without it the answer is another one, but still an answer."""

SILENT: Final = frozenset(
    {
        "dry_allowed_length",
        "dry_base",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "metadata",
        "mirostat_eta",
        "mirostat_tau",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "smoothing_curve",
        "store",
        "user",
        "xtc_threshold",
    }
)
"""Says nothing about the answer, or only together with a field that is told of itself."""

_EMPTY: Final[tuple[Any, ...]] = (None, False, "", [], {})


def check_extras(extras: Extras) -> list[str]:
    """Judge the fields that no request type has.

    :return: one sentence for each field that was ignored, for the first `MAX_NAMES` of them.
    :raises InvalidRequestError: one asks for what this engine cannot do.
    """
    warnings = []
    for name, raw in extras.items():
        if name in REFUSED:
            _check_refused(name, raw)
        elif name in IGNORED:
            if not _is_one_of(raw, IGNORED[name]):
                warnings.append(f"field '{name}' is not supported and was ignored")
        elif name not in SILENT:
            warnings.append(f"field {reprlib.repr(name)} is not known and was ignored")
    num_more = len(warnings) - MAX_NAMES
    if num_more > 0:
        warnings[MAX_NAMES:] = [f"{num_more} more fields were ignored"]
    return warnings


def _check_refused(name: str, raw: msgspec.Raw) -> None:
    if not _is_one_of(raw, REFUSED[name]):
        neutral = "".join(f" or {msgspec.json.encode(value).decode()}" for value in REFUSED[name])
        raise InvalidRequestError(
            f"{name}: this engine does not support it; leave it out, or send null{neutral}", field=name
        )


def _is_one_of(raw: msgspec.Raw, values: tuple[Any, ...]) -> bool:
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:  # what the shallow look at the body did not see, such as 1e999
        return False
    return value in _EMPTY or value in values
