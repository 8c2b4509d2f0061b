"""Text to token ids and back: the tokenizer of a checkpoint, and the defaults stored beside it.

Decoding is done here, from a table of the bytes that each token stands for, because a stream needs
the bytes: text exists only where they complete a character.  The table follows the decoder that the
tokenizer itself declares.  A tokenizer whose decoder works on more than one token at a time has no
table; its own `decode` is used then.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with none of these has no tokenizer."""

REPLACEMENT: Final = "\ufffd"


# --- bytes of tokens ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecoderRule:
    """A declared decoder, reduced to what happens to one token and to the start of a text.

    :param to_bytes: from a token as the vocabulary spells it to the bytes it stands for.
    :param num_lead_spaces: so many spaces are dropped at most, where a text begins.
    """

    to_bytes: Callable[[str], bytes]
    num_lead_spaces: int = 0


def compile_decoder(state: Mapping[str, Any] | None) -> DecoderRule | None:
    """Reduce a decoder, as `tokenizer.json` declares it, to a rule for single tokens.

    Knows byte-level decoders (Llama 3, Qwen, GPT) and what SentencePiece models become (Llama 2,
    Mistral, Phi-3, Gemma): replacements, byte fallback, and spaces stripped from the start.

    :return: `None` if the decoder does something else.
    """
    steps = _flatten(state)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return DecoderRule(_byte_level_to_bytes)
    replacements = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    strip = steps[2] if len(steps) == 3 else _NO_STRIP
    if strip["content"] != " " or strip["stop"]:
        return None
    return DecoderRule(_FallbackToBytes(tuple(replacements)), strip["start"])


_NO_STRIP: Final[Mapping[str, Any]] = {"content": " ", "start": 0, "stop": 0}


def _flatten(state: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state["decoders"] for step in _flatten(inner)]


def _make_byte_alphabet() -> dict[str, int]:
    """Spell bytes as GPT-2 does: a printable one as itself, the others from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_ALPHABET: Final = _make_byte_alphabet()


def _byte_level_to_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[char] for char in token])
    except KeyError:  # an added token that is not spelled in the alphabet means itself
        return token.encode()


@dataclass(frozen=True, slots=True)
class _FallbackToBytes:
    replacements: tuple[tuple[str, str], ...]

    def __call__(self, token: str) -> bytes:
        for old, new in self.replacements:
            token = token.replace(old, new)
        match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        return bytes.fromhex(match[1]) if match else token.encode()


class Pieces(dict[int, bytes]):
    """The bytes of each token, worked out when first asked for; empty for hidden and unknown ids.

    A model's vocabulary is often padded, so it may draw ids that its tokenizer does not know.
    """

    def __init__(
        self, spell: Callable[[int], str | None], rule: DecoderRule, size: int, hidden: frozenset[int]
    ) -> None:
        super().__init__()
        self.num_lead_spaces = rule.num_lead_spaces
        self._spell = spell
        self._rule = rule
        self._size = size
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._size:
            return b""  # not stored: ids from outside must not make the table grow
        token = None if token_id in self._hidden else self._spell(token_id)
        self[token_id] = piece = b"" if token is None else self._rule.to_bytes(token)
        return piece

    def join(self, token_ids: Iterable[int]) -> bytes:
        """Concatenate the bytes of tokens at the start of a text."""
        data = b"".join([self[token_id] for token_id in token_ids])
        return strip_lead(data, self.num_lead_spaces)[0]


def strip_lead(data: bytes, num_spaces: int) -> tuple[bytes, int]:
    """Drop at most `num_spaces` leading spaces; also return how many may still be dropped."""
    rest = data.lstrip(b" ")
    num_dropped = min(len(data) - len(rest), num_spaces)
    return data[num_dropped:], 0 if rest else num_spaces - num_dropped


# --- the tokenizer --------------------------------------------------------------------------------


class Tokenizer:
    """The tokenizer of a checkpoint.  Safe to use from several threads.

    :param hf: as `transformers` loads it.
    :param eos_token_ids: what ends a sequence; the tokenizer's own is added if it is missing.
    """

    def __init__(self, hf: Any, *, eos_token_ids: Sequence[int] = ()) -> None:
        self.hf = hf
        self._backend: Any = getattr(hf, "backend_tokenizer", None)
        own = () if hf.eos_token_id is None else (hf.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_token_ids, *own]))
        self.vocab_size: int = max(hf.get_vocab().values(), default=-1) + 1
        self.special_ids: frozenset[int] = self._find_special_ids()
        if self._backend is not None:  # files may carry settings of some training run
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False
        self._pieces = self._make_pieces()

    def _find_special_ids(self) -> frozenset[int]:
        added = self.hf.added_tokens_decoder.items()
        return frozenset({i for i, token in added if token.special}.union(self.hf.all_special_ids))

    def _make_pieces(self) -> tuple[Pieces, Pieces] | None:
        """Make one table that shows special tokens, and one that hides them."""
        if self._backend is None or not _decodes_plainly(self.hf) or self._backend.decoder is None:
            return None
        rule = compile_decoder(json.loads(self._backend.decoder.__getstate__()))
        if rule is None:
            return None
        spell, size = self._backend.id_to_token, self.vocab_size
        return (
            Pieces(spell, rule, size, frozenset()),
            Pieces(spell, rule, size, self.special_ids),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self.hf.chat_template)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True
    ) -> list[int]:
        """Turn text into token ids.

        :param add_special_tokens: add what the model expects around a text, such as a first `<s>`.
        :param parse_special: text that spells a special token becomes that token, as clients of
            completion endpoints expect.  HAZARD: whoever writes such text can then forge control
            tokens, so pass `False` for text from somebody the prompt's author does not trust.
        :raises InvalidRequestError: the text holds half a surrogate pair, so it is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt: not valid Unicode text at character {error.start}", field="prompt"
            ) from None
        if self._backend is None:
            ids: list[int] = self.hf.encode(
                text, add_special_tokens=add_special_tokens, split_special_tokens=not parse_special
            )
            return ids
        backend = self._backend if parse_special else self._plain_backend
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)

    @cached_property
    def _plain_backend(self) -> Any:
        # A copy, since the switch is a state of the whole backend and requests run side by side.
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Turn the token ids of a whole text into that text.

        Bytes that form no character become U+FFFD, one for each maximal ill-formed part (Unicode
        standard, section 3.9), so that what was decoded stays as it is whatever follows.  Ids that
        the tokenizer does not know stand for no text.
        """
        pieces = self.pieces(skip_special_tokens)
        if pieces is not None:
            return pieces.join(token_ids).decode("utf-8", "replace")
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        text: str = self.hf.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def pieces(self, skip_special_tokens: bool) -> Pieces | None:
        """Return the table of the bytes of each token; `None` if this tokenizer has none."""
        return None if self._pieces is None else self._pieces[skip_special_tokens]

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for inside a text: a leading space, or half a character."""
        if self._pieces is not None:
            return self._pieces[False][token_id]
        return self.decode([token_id]).encode()

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Render a conversation and turn it into token ids.

        HAZARD: the rendered text is one text, so a message that spells a special token becomes that
        token.  Who serves people that do not trust one another should refuse such messages.

        :param messages: `{"role": …, "content": …}`; the content is text or a list of text parts.
        :param add_generation_prompt: end with the start of an answer.
        :param kwargs: `tools`, `documents`, `continue_final_message`, and variables of the template.
        :raises InvalidRequestError: there is no template, it refuses these messages, or an argument
            would change more than what the template sees.
        """
        return self.encode(
            self.render_chat(messages, add_generation_prompt, **kwargs), add_special_tokens=False
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Render a conversation as the text that `apply_chat_template` encodes."""
        if not self.has_chat_template:
            raise InvalidRequestError(
                "messages: this model's tokenizer has no chat template; send a prompt instead",
                field="messages",
            )
        self.check_template_variables(kwargs)
        if kwargs.get("continue_final_message"):
            add_generation_prompt = False
        checked = [_check_message(index, message) for index, message in enumerate(_as_list(messages))]
        try:
            text: str = self.hf.apply_chat_template(
                checked, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except Exception as error:  # a template is a program that was written elsewhere
            raise InvalidRequestError(
                f"messages: the chat template refuses this conversation: {error}", field="messages"
            ) from error
        return text

    def check_template_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse variables that would change more than what the template sees.

        Call it before names that come from elsewhere become keyword arguments of `render_chat`, which
        could otherwise take them for its own.

        :raises InvalidRequestError: names the first of them.
        """
        # What `transformers` takes for itself could turn rendering into something else.
        own = {"self", "messages", *inspect.signature(self.hf.apply_chat_template).parameters}
        refused = own - {"tools", "documents", "continue_final_message"}
        for name in sorted(refused & set(variables)):
            raise InvalidRequestError(
                f"chat_template_kwargs: {name!r} is not a variable of a chat template",
                field="chat_template_kwargs",
            )


def _decodes_plainly(hf: Any) -> bool:
    """Whether decoding is the backend's alone; some classes put steps of their own around it."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  slow to import

    return (
        isinstance(hf, PreTrainedTokenizerFast)
        and type(hf)._decode is PreTrainedTokenizerFast._decode  # noqa: SLF001  identity only
        and type(hf).decode is PreTrainedTokenizerFast.decode
    )


# --- messages -------------------------------------------------------------------------------------


def _as_list(messages: object) -> list[Any]:
    if not isinstance(messages, list | tuple) or not messages:
        raise _refuse_message("messages", "must be a list of at least one message")
    return list(messages)


def _check_message(index: int, message: object) -> dict[str, Any]:
    """Return a copy whose content is plain text, or absent where a message may have none."""
    field = f"messages[{index}]"
    if not isinstance(message, dict):
        raise _refuse_message(field, f"must be an object, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _refuse_message(f"{field}.role", "must be text")
    if isinstance(content, list | tuple):
        content = "\n".join(_check_part(f"{field}.content[{i}]", p) for i, p in enumerate(content))
    elif content is None and not message.get("tool_calls"):
        raise _refuse_message(f"{field}.content", "must be text or a list of text parts")
    elif content is not None and not isinstance(content, str):
        raise _refuse_message(f"{field}.content", f"must be text, got {type(content).__name__}")
    return {**message, "content": content}


def _check_part(field: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise _refuse_message(field, "must be a text part; this model takes text only")
    return text


def _refuse_message(field: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {rule}", field=field)


# --- loading --------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint without ever running code that comes with it.

    :param path: a folder, or the id of a repository on the hub.
    :param revision: branch, tag or commit on the hub; applies to every file.
    :return: `None` if the folder holds none.  It can be served with token ids, and who needs text
        says so to the client whose request does.
    :raises CheckpointError: there is one, but it cannot be loaded.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415  slow to import

    try:
        hf = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever is in those files, and whatever reads them
        raise CheckpointError(
            f"the tokenizer of {str(path)!r} cannot be loaded: {_first_line(error)}; it needs a "
            f"tokenizer.json, or a tokenizer class that transformers itself knows"
        ) from error
    return Tokenizer(hf, eos_token_ids=_load_eos_token_ids(path, revision))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_generation_defaults(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Read what a checkpoint's `generation_config.json` recommends.

    :return: those of `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` that it sets,
        and `eos_token_ids` as a list.  Everything else in the file is passed over.
    :raises CheckpointError: the file is not JSON, or one of these is not a number.
    """
    config = _load_json(path, "generation_config.json", revision)
    defaults: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise CheckpointError(f"generation_config.json: {name} is {value!r}, not a number")
        defaults[name] = value
    eos = _list_ids(config.get("eos_token_id"), "generation_config.json")
    return {**defaults, "eos_token_ids": eos} if eos else defaults


def _load_eos_token_ids(path: str | Path, revision: str | None) -> list[int]:
    eos = load_generation_defaults(path, revision=revision).get("eos_token_ids")
    if eos:
        return list(eos)
    config = _load_json(path, "config.json", revision)
    text_config = config.get("text_config") or {}
    return _list_ids(config.get("eos_token_id", text_config.get("eos_token_id")), "config.json")


def _list_ids(value: object, file: str) -> list[int]:
    ids: list[Any] = [] if value is None else list(value) if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(
                f"{file}: eos_token_id is {value!r}, not a token id or a list of them"
            )
    return ids


def _load_json(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    """Read one JSON object of a checkpoint; empty if there is no such file."""
    file = _find_file(path, name, revision)
    if file is None:
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{name} of {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} of {str(path)!r} holds a {type(value).__name__}, not an object")
    return value


def _find_file(path: str | Path, name: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file  # noqa: PLC0415  slow to import

    try:
        found = cached_file(str(path), name, revision=revision)
    except OSError:  # the hub has no such file, or cannot be asked
        return None
    return None if found is None else Path(found)
