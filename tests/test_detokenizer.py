from __future__ import annotations

import codecs
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.detokenizer import Delta, IncrementalDetokenizer
from core.errors import InvalidRequestError
from core.testing.tokenizers import BOS_ID, EOS_ID, KINDS, make_tokenizer
from core.tokenizer import load_tokenizer

TABLE_KINDS = ["byte-level", "llama2", "gemma"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NUM_IDS = 400
IDS = st.lists(st.integers(0, NUM_IDS + 3), max_size=24)  # some of them unknown


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        kind: load_tokenizer(make_tokenizer(kind, tmp_path_factory.mktemp(kind), vocab_size=NUM_IDS))
        for kind in KINDS
    }


def _chunks(data, ids):
    """Cut `ids` into pushes, some of them empty."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6), label="cuts"))
    edges = [0, *cuts, len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def _run(detokenizer, chunks):
    """All text and all kept tokens."""
    deltas = [detokenizer.push(chunk) for chunk in chunks]
    text = "".join(delta.text for delta in deltas) + detokenizer.finish()
    return text, sum(delta.num_tokens_kept for delta in deltas)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), prompt=TEXT, text=TEXT, skip=st.booleans())
def test_text_in_any_chunks_is_what_transformers_decodes_after_the_prompt(
    tokenizers, kind, *, data, prompt, text, skip
):
    tokenizer = tokenizers[kind]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=data.draw(st.booleans(), label="bos"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.hf.decode(prompt_ids, skip_special_tokens=skip)
    both = tokenizer.hf.decode(prompt_ids + ids, skip_special_tokens=skip)
    detokenizer = IncrementalDetokenizer(
        tokenizer, prompt_token_ids=prompt_ids, skip_special_tokens=skip
    )
    streamed, num_kept = _run(detokenizer, _chunks(data, ids))
    assert before + streamed == both
    assert num_kept == detokenizer.num_tokens == len(ids)


@pytest.mark.parametrize("kind", TABLE_KINDS)
@given(data=st.data(), prompt=IDS, ids=IDS, skip=st.booleans())
def test_any_tokens_give_the_text_of_one_decode(tokenizers, kind, *, data, prompt, ids, skip):
    tokenizer = tokenizers[kind]
    before, both = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip)
    streamed, num_kept = _run(detokenizer, _chunks(data, ids))
    assert num_kept == len(ids)
    if both.startswith(before):
        assert before + streamed == both
    else:  # the output completes a character that the prompt had begun
        assert before.endswith("\ufffd")
        assert before[:-1] + streamed == both


@pytest.mark.parametrize("ids", [[], [0x80], [0x41], [0xC3, 0xA9]])
def test_prompt_that_ends_in_half_a_surrogate(tokenizers, ids):
    tokenizer = tokenizers["llama2"]
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(NUM_IDS)}
    prompt, output = [by_byte[b"\xed"], by_byte[b"\xa0"]], [by_byte[bytes([i])] for i in ids]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    streamed = "".join(detokenizer.push([token_id]).text for token_id in output) + detokenizer.finish()
    assert tokenizer.decode(prompt) + streamed == tokenizer.decode(prompt + output)


@given(data=st.data(), ids=IDS, skip=st.booleans())
def test_ill_formed_bytes_stream_as_transformers_decodes_them_at_byte_level(
    tokenizers, data, ids, skip
):
    tokenizer = tokenizers["byte-level"]
    known = [token_id for token_id in ids if token_id < NUM_IDS]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    streamed, _ = _run(detokenizer, _chunks(data, known))
    assert streamed == tokenizer.hf.decode(known, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", TABLE_KINDS)
@given(ids=IDS)
def test_every_push_gives_all_whole_characters_and_no_half_one(tokenizers, kind, ids):
    tokenizer = tokenizers[kind]
    anchor = tokenizer.encode("x", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=anchor, skip_special_tokens=False)
    reference = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id in ids:
        assert detokenizer.push([token_id]).text == reference.decode(tokenizer.token_bytes(token_id))
    assert detokenizer.finish() == reference.decode(b"", final=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_appears_when_its_last_token_does(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("see:")
    ids = tokenizer.encode("see:\U0001f9ea")[len(prompt) :]
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    assert [detokenizer.push([i]).text for i in ids] == [""] * (len(ids) - 1) + ["\U0001f9ea"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_at_the_end_is_flushed_once(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("see:")
    ids = tokenizer.encode("see:\U0001f9ea")[len(prompt) : -1]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    assert detokenizer.push(ids).text == ""
    assert set(detokenizer.finish()) == {"\ufffd"}
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", TABLE_KINDS)
@given(text=st.text("aé語🧪", min_size=1, max_size=6), data=st.data())
def test_a_prompt_that_ends_inside_a_character_leaves_it_to_the_output(tokenizers, kind, text, data):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("x" + text)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=ids[:cut])
    streamed, _ = _run(detokenizer, [[i] for i in ids[cut:]])
    whole = tokenizer.decode(ids[:cut], True).removesuffix("\ufffd")
    assert whole + streamed == ("x" + text if cut < len(ids) else whole)


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_the_first_space_depends_on_whether_the_prompt_shows_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    the = tokenizer.encode("of the", add_special_tokens=False)[-1]
    shown = tokenizer.encode("of")

    def first_text(prompt, skip):
        detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip
        )
        return detokenizer.push([the]).text

    assert first_text(shown, skip=True) == " the"
    assert first_text([], skip=True) == "the"
    assert first_text([BOS_ID], skip=True) == "the"
    assert first_text([BOS_ID], skip=False) == " the"
    assert first_text([*shown, *[EOS_ID] * 20], skip=True) == " the"


def test_special_tokens_show_only_if_asked_for(tokenizers):
    for tokenizer in tokenizers.values():
        prompt = tokenizer.encode("x")
        for skip, shown in ((True, ""), (False, "<eos>")):
            detokenizer = IncrementalDetokenizer(
                tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip
            )
            assert _run(detokenizer, [[EOS_ID]]) == (shown, 1)


# --- stop strings ---------------------------------------------------------------------------------

STOP_TEXT = st.text("ab é\n", max_size=24)
STOPS = st.lists(st.text("ab é\n", min_size=1, max_size=5), min_size=1, max_size=4)


def _first_stop(texts, stops, min_tokens):
    """The first stop string to be complete, by trying all: its end, itself, and its token's number."""
    text, lengths = "".join(texts), []
    for number, piece in enumerate(texts, 1):
        lengths += [number] * len(piece)
    for end, number in enumerate(lengths, 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and number > min_tokens:
            return end, max(found, key=len), number
    return None


def _num_held(text, stops):
    """The longest end of the text that begins a stop string."""
    starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
    return max((n for n in range(1, len(text) + 1) if text[-n:] in starts), default=0)


def _piece_texts(tokenizer, prompt, ids):
    """The text that each token adds where nothing is held back for stop strings."""
    plain = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    texts = [plain.push([token_id]).text for token_id in ids]
    return [*texts, plain.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.data(),
    text=STOP_TEXT,
    stops=STOPS,
    include=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 1, 3, 6]),
)
def test_stop_strings_in_any_chunks(tokenizers, kind, *, data, text, stops, include, min_tokens):
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("x")
    ids = tokenizer.encode("x" + text)[len(prompt) :]
    texts = _piece_texts(tokenizer, prompt, ids)
    detokenizer = IncrementalDetokenizer(
        tokenizer, stop=stops, include_stop=include, prompt_token_ids=prompt, min_tokens=min_tokens
    )
    streamed, num_kept = _run(detokenizer, _chunks(data, ids))
    first = _first_stop(texts, stops, min_tokens)
    if first is None:
        assert (streamed, num_kept) == ("".join(texts), len(ids))
        assert detokenizer.stop_reason is None
        return
    end, stop, number = first
    assert streamed == "".join(texts)[: end if include else end - len(stop)]
    assert detokenizer.stop_reason == stop
    assert num_kept == detokenizer.num_tokens == number


@given(text=STOP_TEXT, stops=STOPS, min_tokens=st.integers(0, 30))
def test_exactly_what_could_become_a_stop_string_is_held_back(tokenizers, text, stops, min_tokens):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = _piece_texts(tokenizer, [], ids)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stops, min_tokens=min_tokens)
    streamed = ""
    for number, token_id in enumerate(ids, 1):
        delta = detokenizer.push([token_id])
        streamed += delta.text
        if delta.stop_reason is not None:
            return
        known = "".join(texts[:number])
        assert streamed == known[: len(known) - _num_held(known, stops)]


@settings(max_examples=50)
@given(ids=IDS, stops=st.lists(st.sampled_from(["\ufffd", "\ufffd\ufffd", "a\ufffd"]), min_size=1))
def test_a_stop_string_may_be_completed_by_the_flush(tokenizers, ids, stops):
    tokenizer = tokenizers["byte-level"]
    texts = _piece_texts(tokenizer, [], ids)
    first = _first_stop(texts, stops, 0)
    streamed, _ = _run(IncrementalDetokenizer(tokenizer, stop=stops), [[i] for i in ids])
    whole = "".join(texts)
    assert streamed == (whole if first is None else whole[: first[0] - len(first[1])])


def test_nothing_comes_after_a_stop_string(tokenizers):
    tokenizer = tokenizers["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["dog"])
    ids = tokenizer.encode("the dog and the dog", add_special_tokens=False)
    delta = detokenizer.push(ids)
    assert (delta.text, delta.stop_reason) == ("the ", "dog")
    assert tokenizer.decode(ids[: delta.num_tokens_kept]).startswith("the dog")
    num_tokens = detokenizer.num_tokens
    assert detokenizer.push(ids) == Delta("", "dog", 0)
    assert detokenizer.finish() == ""
    assert detokenizer.num_tokens == num_tokens


def test_a_stop_string_may_begin_before_the_least_number_of_tokens(tokenizers):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("zqzq", add_special_tokens=False)
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["qz"], min_tokens=2)
    assert detokenizer.push(ids) == Delta("z", "qz", 3)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["qz"], min_tokens=3)
    assert detokenizer.push(ids) == Delta("zqz", None, 4)
    assert detokenizer.finish() == "q"


def test_an_empty_stop_string_is_refused(tokenizers):
    with pytest.raises(InvalidRequestError, match="empty") as error:
        IncrementalDetokenizer(tokenizers["byte-level"], stop=["a", ""])
    assert error.value.field == "stop"


# --- cost -----------------------------------------------------------------------------------------


def test_each_token_is_looked_up_once(tokenizers, monkeypatch):
    tokenizer = tokenizers["byte-level"]
    looked_up = []

    class Counting(type(tokenizer.pieces(True))):
        def __getitem__(self, token_id):
            looked_up.append(token_id)
            return super().__getitem__(token_id)

    pieces = tokenizer.pieces(True)
    counting = Counting(pieces._spell, pieces._rule, pieces._size, pieces._hidden)
    monkeypatch.setattr(tokenizer, "pieces", lambda _: counting)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["never to be seen"])
    ids = list(range(NUM_IDS)) * 3
    for token_id in ids:
        detokenizer.push([token_id])
    assert looked_up == ids


@pytest.mark.parametrize("token", ["<0xFF>", "<eos>", "▁the", "<0xE2>"])
def test_without_a_table_a_token_is_decoded_a_bounded_number_of_times(tokenizers, monkeypatch, token):
    tokenizer = tokenizers["metaspace"]
    num_decoded = []
    decode = tokenizer.decode

    def counting(ids, *args):
        num_decoded.append(len(ids))
        return decode(ids, *args)

    monkeypatch.setattr(tokenizer, "decode", counting)
    token_id = tokenizer.hf.convert_tokens_to_ids(token)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=tokenizer.encode("x"))
    for _ in range(300):
        detokenizer.push([token_id])
    assert sum(num_decoded) < 300 * 20
