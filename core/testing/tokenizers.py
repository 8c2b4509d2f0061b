"""Small real tokenizers, trained in memory and saved as `AutoTokenizer` loads them.

They differ in how tokens become text, which is what a server can get wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPECIAL_TOKENS: Final = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
"""Ids 0 and up, the same in every kind; 1 and 2 are those of `core.testing.checkpoints`."""
PAD_ID, BOS_ID, EOS_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID = range(len(SPECIAL_TOKENS))
PLAIN_ADDED_TOKEN: Final = "<tool>"  # noqa: S105  no password
"""Added to the vocabulary without being special: it shows even if special tokens are skipped."""

CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('unknown role ' + message.role) -}}
  {%- endif -%}
  {{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""

CORPUS: Final = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A token is the unit that a language model reads and writes; a word may need several of them.",
    "  Indented text, with  two spaces,\tand tabs.\n\nThen a new paragraph begins.\n",
    "def add(first, second):\n    return first + second  # the sum of both\n",
    '{"name": "value", "list": [1, 2, 3], "nested": {"true": false}}',
    "Numbers: 0 1 2 3 10 42 100 1999 2024 3.14159 and 65536.",
    "Größe, façade, naïve, señor, Łódź, čeština: Latin letters beyond ASCII.",
    "Привет, мир! Быстрая лиса прыгает через ленивую собаку.",
    "你好，世界！今天的天气很好。 日本語の文章もあります。",  # noqa: RUF001  Chinese punctuation
    "Emoji: 😀 🎉 👩‍👩‍👧 🇩🇪 and symbols → ≤ ≥ € ½.",
    "the the the and and of of to to in in that that is is it it for for with with on on",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One way in which models tokenize.

    :param make: makes it with a given vocabulary size, without added tokens.
    :param min_vocab_size: what its alphabet needs.
    """

    make: Callable[[int], Tokenizer]
    min_vocab_size: int


def make_tokenizer(kind: str, path: Path, *, vocab_size: int = 400) -> Path:
    """Train a tokenizer and write its files, beside a checkpoint if the folder holds one.

    `transformers` makes a byte-level tokenizer of whatever lies beside a Qwen2 checkpoint.

    :param kind: a key of `KINDS`.
    :param path: the folder, made if needed.
    :param vocab_size: ids are in [0, vocab_size), and all of them are used.
    :return: `path`.
    :raises ValueError: the vocabulary is too small for this kind.
    """
    entry = KINDS[kind]
    if vocab_size < entry.min_vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {kind!r} needs at least {entry.min_vocab_size}"
        )
    tokenizer = entry.make(vocab_size - 1)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(PLAIN_ADDED_TOKEN, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(path / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _update_generation_config(path / "generation_config.json")
    return path


_TOKENIZER_CONFIG: Final[dict[str, Any]] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1_000_000,
}


def _update_generation_config(file: Path) -> None:
    config = json.loads(file.read_text()) if file.exists() else {}
    config |= {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, END_ID], "pad_token_id": PAD_ID}
    _write_json(file, config)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


# --- kinds ----------------------------------------------------------------------------------------


def _make_byte_level(vocab_size: int) -> Tokenizer:
    """BPE over bytes.  A vocabulary too small for 256 of them keeps ASCII and drops other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < _FULL_BYTE_LEVEL:
        alphabet = ["Ċ", "Ġ", *(char for char in alphabet if "!" <= char <= "~")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=0,
        show_progress=False,
    )
    corpus = CORPUS if vocab_size >= _FULL_BYTE_LEVEL else [t for t in CORPUS if t.isascii()]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


_FULL_BYTE_LEVEL: Final = 256 + len(SPECIAL_TOKENS)
_WORD_PATTERN: Final = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _make_sentencepiece(vocab_size: int) -> Tokenizer:
    """BPE over characters with ▁ for a space, and bytes for characters that are not known."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    fixed = [*SPECIAL_TOKENS, "<unk>", *byte_tokens]
    vocab, merges = _train_characters(vocab_size - len(fixed))
    ids = {token: index for index, token in enumerate([*fixed, *vocab])}
    return Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # noqa: S106  no password
    )


def _train_characters(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    # Chosen here, because the trainer breaks ties between rare characters differently every time.
    counts = Counter("".join(CORPUS).replace(" ", "▁"))
    alphabet = sorted(counts, key=lambda char: (-counts[char], char))[:_NUM_CHARACTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=0,
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


_NUM_CHARACTERS: Final = 64  # the rest of the corpus is left to bytes


def _make_llama2(vocab_size: int) -> Tokenizer:
    tokenizer = _make_sentencepiece(vocab_size)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _make_gemma(vocab_size: int) -> Tokenizer:
    tokenizer = _make_sentencepiece(vocab_size)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _make_metaspace(vocab_size: int) -> Tokenizer:
    """Make one whose decoder looks at more than one token: a leading ▁ is no space at the start."""
    tokenizer = _make_sentencepiece(vocab_size)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


_MIN_SENTENCEPIECE: Final = 256 + len(SPECIAL_TOKENS) + _NUM_CHARACTERS + 2

KINDS: Final[dict[str, Kind]] = {
    "byte-level": Kind(_make_byte_level, 128),
    "llama2": Kind(_make_llama2, _MIN_SENTENCEPIECE),
    "gemma": Kind(_make_gemma, _MIN_SENTENCEPIECE),
    "metaspace": Kind(_make_metaspace, _MIN_SENTENCEPIECE),
}
"""byte-level as in Llama 3 and Qwen; llama2 also as in Mistral and Phi-3; gemma strips no space."""
