"""The requests and responses of the OpenAI API, and the extensions that users of vLLM know.

Requests are strict about types and lenient about the rest: whether a value makes sense is for
`core.request.RequestLimits` to say.  In responses `UNSET` fields are left out, `None` is `null`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

# --- requests -------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream tells beside its tokens."""

    include_usage: bool | None = None
    """Count tokens in a chunk of its own, the last one."""
    continuous_usage_stats: bool | None = None
    """Count the tokens so far in every chunk."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions have in common; `null` is the same as leaving a field out."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    custom_token_bans: list[int] | None = None
    """An older name of `banned_token_ids`; both together are added up."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    """Keep this many tokens from the end of the prompt; -1 keeps as many as the context allows."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Write tokens in log-probabilities as `token_id:123`."""
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    timeout: float | None = None
    """Seconds for the whole request."""


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    """The newer name of `max_tokens`, which it overrides."""
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    """One text, several, the token ids of one prompt, or those of several."""
    logprobs: int | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


# --- parts of responses ---------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all prompts and all completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct, frozen=True):
    """The log-probability of one token at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each prompt token by token id; `null` for the first one, which nothing predicts."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token that was drawn at a position."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat completion."""

    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a plain completion: four lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


# --- responses ------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True):
    """The model's answer."""

    role: str
    content: str
    refusal: str | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `n` completions of a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to one of the completions."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion of one prompt, or what a chunk adds to it."""

    index: int
    """Number of the prompt times `n`, plus number of the completion."""
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What responses and chunks of both APIs have in common."""

    id: str
    object: str
    created: int
    """Seconds since the epoch."""
    model: str
    system_fingerprint: str | None = None
    usage: Usage | UnsetType = UNSET
    warnings: list[str] | UnsetType = UNSET
    """What was asked for and did not happen."""


class ChatAnswer(Answer, frozen=True, kw_only=True):
    """Response to `POST /v1/chat/completions`."""

    choices: list[ChatChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(Answer, frozen=True, kw_only=True):
    """A chunk of the same as a stream."""

    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionAnswer(Answer, frozen=True, kw_only=True):
    """Response to `POST /v1/completions`, and a chunk of it."""

    choices: list[CompletionChoice]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A name that the model is served by."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "cythera"
    root: str
    """The first of its names."""
    parent: str | None = None
    max_model_len: int | None
    """Context length in tokens; `null` until the engine is ready."""
    permission: list[dict[str, Any]] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Response to `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Response to `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """Response to `POST /detokenize`."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Response to `GET /tokenizer_info`."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    special_tokens: dict[int, str]
    """By token id."""
    chat_template: str | None


class CancelAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Response to `POST /v1/requests/{id}/cancel`."""

    id: str
    object: str = "request.cancelled"
    cancelled: bool = True
