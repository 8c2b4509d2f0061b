from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CheckpointError, InvalidRequestError
from core.testing.tokenizers import (
    ASSISTANT_ID,
    BOS_ID,
    END_ID,
    EOS_ID,
    KINDS,
    PLAIN_ADDED_TOKEN,
    SPECIAL_TOKENS,
    USER_ID,
    make_tokenizer,
)
from core.tokenizer import compile_decoder, load_generation_defaults, load_tokenizer

TABLE_KINDS = ["byte-level", "llama2", "gemma"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(params=list(KINDS))
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def folder(tmp_path):
    return make_tokenizer("byte-level", tmp_path)


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, add_special_tokens=st.booleans())
def test_encodes_as_transformers_does(tokenizers, kind, text, add_special_tokens):
    tokenizer = tokenizers[kind]
    expected = tokenizer.hf.encode(text, add_special_tokens=add_special_tokens)
    assert tokenizer.encode(text, add_special_tokens) == expected


@pytest.mark.parametrize("text", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_is_text_unless_it_is_to_be_parsed(tokenizer, text):
    for spelled in (text, text * 2, f"a{text}b", f"{text[:3]}{text}{text[3:]}"):
        plain = tokenizer.encode(spelled, parse_special=False)
        assert set(plain[1:]).isdisjoint(tokenizer.special_ids)
        assert spelled.lstrip() in tokenizer.decode(plain)
        assert SPECIAL_TOKENS.index(text) in tokenizer.encode(spelled)[1:]


def test_plain_and_parsed_encoding_do_not_disturb_each_other(tokenizers):
    tokenizer = tokenizers["byte-level"]
    text = "hello <eos> " * 50
    wanted = {True: tokenizer.encode(text), False: tokenizer.encode(text, parse_special=False)}
    assert wanted[True] != wanted[False]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            (flag, pool.submit(tokenizer.encode, text, parse_special=flag))
            for flag in [True, False] * 50
        ]
        assert all(job.result() == wanted[flag] for flag, job in jobs)


def test_the_files_do_not_decide_whether_special_tokens_are_parsed(folder):
    _edit(folder / "tokenizer_config.json", split_special_tokens=True)
    assert load_tokenizer(folder).encode("<eos>", add_special_tokens=False) == [EOS_ID]


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match="Unicode") as error:
        tokenizer.encode("ab\ud83d")
    assert error.value.field == "prompt"


def test_truncation_and_padding_of_the_files_are_ignored(folder):
    file = folder / "tokenizer.json"
    direction = {"direction": "Right"}
    _edit(
        file,
        truncation={"max_length": 4, "strategy": "LongestFirst", "stride": 0} | direction,
        padding={"strategy": {"Fixed": 64}, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
        | {"pad_to_multiple_of": None}
        | direction,
    )
    ids = load_tokenizer(folder).encode("one two three four five six")
    assert len(ids) > 4
    assert 0 not in ids


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_the_table_agrees_with_transformers_on_every_token(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.pieces(False) is not None
    anchor = tokenizer.encode("x", add_special_tokens=False)[-1]
    for token_id in range(tokenizer.vocab_size):
        for ids in ([token_id], [anchor, token_id, anchor]):
            for skip in (False, True):
                expected = tokenizer.hf.decode(ids, skip_special_tokens=skip)
                assert tokenizer.decode(ids, skip) == expected


def test_added_tokens_in_any_spelling_decode_as_transformers_decodes_them(tmp_path):
    for kind in TABLE_KINDS:
        hf = load_tokenizer(make_tokenizer(kind, tmp_path / kind)).hf
        added = ["Ġé x", "é!", "Ã©!", "▁<0x41>", "<0x4G>", "  two", "語é"]
        assert hf.add_tokens(added) == len(added)
        hf.save_pretrained(tmp_path / kind)
        tokenizer = load_tokenizer(tmp_path / kind)
        assert tokenizer.vocab_size == 400 + len(added)
        anchor = tokenizer.encode("x", add_special_tokens=False)[-1]
        for token_id in range(400, 400 + len(added)):
            ids = [anchor, token_id]
            assert tokenizer.decode(ids) == hf.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, skip=st.booleans())
def test_decodes_text_as_transformers_does(tokenizers, kind, text, skip):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 399), max_size=30), skip=st.booleans())
def test_ill_formed_bytes_decode_as_transformers_does_at_byte_level(tokenizers, ids, skip):
    tokenizer = tokenizers["byte-level"]
    assert tokenizer.decode(ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip)


def test_an_ill_formed_byte_does_not_take_its_neighbours_along(tokenizers):
    tokenizer = tokenizers["gemma"]
    ids = tokenizer.hf.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>"])
    assert tokenizer.decode(ids) == "é\ufffd"


def test_ids_without_a_token_stand_for_no_text(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    strange = [tokenizer.vocab_size, *ids, 10**6, -1, 2**63]
    assert tokenizer.decode(strange) == tokenizer.decode(ids)
    assert tokenizer.token_bytes(10**6) == b""
    if tokenizer.pieces(False) is not None:
        assert set(tokenizer.pieces(False)) <= set(range(tokenizer.vocab_size))


def test_a_token_inside_a_text_keeps_its_space_and_its_bytes(tokenizers):
    for kind in TABLE_KINDS:
        tokenizer = tokenizers[kind]
        the = tokenizer.encode("of the", add_special_tokens=False)[-1]
        assert tokenizer.token_text(the) == " the"
        emoji = tokenizer.encode("\U0001f9ea", add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, emoji)).decode().strip() == "\U0001f9ea"
    assert tokenizers["byte-level"].token_text(EOS_ID) == "<eos>"


def test_decoders_that_need_more_than_one_token_have_no_table(tokenizers):
    assert tokenizers["metaspace"].pieces(True) is None
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tail = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    assert (
        compile_decoder({"type": "Sequence", "decoders": [replace, *tail, strip]}).num_lead_spaces == 1
    )
    for steps in (
        [],
        [{"type": "WordPiece", "prefix": "##", "cleanup": True}],
        [{"type": "ByteLevel"}, {"type": "Fuse"}],
        [replace | {"pattern": {"Regex": "▁"}}, *tail],
        [*tail, replace],
        [*tail, strip | {"stop": 1}],
        [*tail, strip | {"content": "x"}],
    ):
        assert compile_decoder({"type": "Sequence", "decoders": steps}) is None
    assert compile_decoder(None) is None


# --- chat -----------------------------------------------------------------------------------------


def test_chat_equals_transformers(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße!"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "the dog?"},
    ]
    for flag in (True, False):
        expected = tokenizer.hf.apply_chat_template(
            messages, add_generation_prompt=flag, tokenize=True, return_dict=False
        )
        assert tokenizer.apply_chat_template(messages, flag) == expected
    ids = tokenizer.apply_chat_template(messages)
    assert ids[0] == BOS_ID
    assert ids.count(BOS_ID) == 1
    assert ids[-2:] == [END_ID, ASSISTANT_ID]
    assert ids.count(USER_ID) == 2


def test_chat_joins_text_parts_and_leaves_the_message_alone(tokenizers):
    tokenizer = tokenizers["byte-level"]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = {"role": "user", "content": parts}
    assert tokenizer.render_chat([message]) == "<bos><|user|>one\ntwo<|end|><|assistant|>"
    assert message == {"role": "user", "content": parts}


def test_chat_can_continue_the_last_message(tokenizers):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Sure, the"}]
    text = tokenizers["byte-level"].render_chat(messages, continue_final_message=True)
    assert text == "<bos><|user|>a<|end|><|assistant|>Sure, the"


def test_variables_reach_the_template(folder):
    _edit(folder / "tokenizer_config.json", chat_template="{{ mood }}: {{ messages[0].content }}")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], mood="calm") == "calm: x"


@pytest.mark.parametrize("name", ["self", "messages", "add_generation_prompt", "tokenize"])
def test_names_of_its_own_arguments_are_no_variables(tokenizers, name):
    with pytest.raises(InvalidRequestError, match=name) as error:
        tokenizers["byte-level"].check_template_variables({"mood": "calm", name: 1})
    assert error.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    "name", ["tokenize", "chat_template", "padding", "max_length", "return_dict", "tokenizer_kwargs"]
)
def test_arguments_of_the_loader_are_no_variables(tokenizers, name):
    with pytest.raises(InvalidRequestError, match=name) as error:
        tokenizers["byte-level"].apply_chat_template([{"role": "user", "content": "x"}], **{name: True})
    assert error.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0]"),
        ([{"role": "villain", "content": "x"}], "messages"),
        ([{"role": "user", "content": "\ud800"}], "prompt"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(tokenizers, messages, field):
    with pytest.raises(InvalidRequestError) as error:
        tokenizers["byte-level"].apply_chat_template(messages)
    assert error.value.field == field


def test_the_template_s_own_words_reach_the_client(tokenizers):
    with pytest.raises(InvalidRequestError, match="unknown role villain"):
        tokenizers["byte-level"].apply_chat_template([{"role": "villain", "content": "x"}])


def test_no_chat_without_a_template(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# --- loading --------------------------------------------------------------------------------------


def test_a_checkpoint_without_tokenizer_files_has_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\x00" * 64])
def test_a_broken_tokenizer_is_an_error_that_names_the_folder(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_checkpoint_never_runs(folder, file):
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil"}))
    _edit(folder / file, auto_map=auto_map, tokenizer_class="Evil")
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        assert "trust_remote_code" in str(error.__cause__)  # noqa: PT017  either outcome is safe
    else:
        assert tokenizer.encode("hello")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        *(
            ("byte-level", m)
            for m in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
        ),
        *(("llama2", m) for m in ("llama", "mistral", "phi3")),
        *(("gemma", m) for m in ("gemma2", "gemma3_text", "gemma3")),
    ],
)
def test_the_model_s_config_does_not_change_the_tokenizer(tokenizers, tmp_path, kind, model_type):
    folder = make_tokenizer(kind, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(folder)
    ids = tokenizers[kind].encode("Hello, 世界 the dog\n")
    assert tokenizer.encode("Hello, 世界 the dog\n") == ids
    assert tokenizer.decode(ids, True) == "Hello, 世界 the dog\n"


def test_what_a_tokenizer_knows_about_itself(tokenizer):
    assert tokenizer.vocab_size == 400
    assert tokenizer.special_ids >= set(range(len(SPECIAL_TOKENS)))
    plain = tokenizer.encode(PLAIN_ADDED_TOKEN, add_special_tokens=False)[-1]
    assert plain not in tokenizer.special_ids
    assert tokenizer.decode([plain], True) == PLAIN_ADDED_TOKEN


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 9}, (5, 6, EOS_ID)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (7, EOS_ID)),
        ({"eos_token_id": [EOS_ID, 7]}, {}, (EOS_ID, 7)),
        ({}, {"eos_token_id": 9}, (9, EOS_ID)),
        ({}, {"text_config": {"eos_token_id": [8]}}, (8, EOS_ID)),
        (None, {}, (EOS_ID,)),
    ],
)
def test_where_the_end_of_a_sequence_is_stated(folder, generation, config, expected):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    file = folder / "generation_config.json"
    file.unlink()
    if generation is not None:
        file.write_text(json.dumps(generation))
    assert load_tokenizer(folder).eos_token_ids == expected


def test_generation_defaults(tmp_path):
    assert load_generation_defaults(tmp_path) == {}
    config = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1,
        "eos_token_id": 2,
        "do_sample": True,
        "max_length": 4096,
        "transformers_version": "5.0",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert load_generation_defaults(tmp_path) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1,
        "eos_token_ids": [2],
    }


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"temperature": "hot"}',
        '{"top_k": 1.5}',
        '{"top_p": true}',
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": [1, -1]}',
        '{"eos_token_id": true}',
    ],
)
def test_generation_defaults_that_make_no_sense_are_an_error(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_generation_defaults(tmp_path)


# --- the kit --------------------------------------------------------------------------------------


def test_small_vocabularies_for_tiny_models(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer("byte-level", tmp_path, vocab_size=160))
    assert tokenizer.vocab_size == 160
    text = "def f(x):\n    return x + 1  # the dog\n"
    assert tokenizer.decode(tokenizer.encode(text), True) == text
    with pytest.raises(ValueError, match="at least"):
        make_tokenizer("llama2", tmp_path / "no", vocab_size=160)
    assert not (tmp_path / "no").exists()


def test_training_gives_the_same_files_every_time(tmp_path, folders):
    for kind, folder in folders.items():
        again = make_tokenizer(kind, tmp_path / kind)
        for file in again.iterdir():
            assert file.read_bytes() == (folder / file.name).read_bytes()


def test_a_checkpoint_s_own_generation_config_is_kept(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 77}')
    make_tokenizer("byte-level", tmp_path)
    defaults = load_generation_defaults(tmp_path)
    assert defaults == {"temperature": 0.5, "eos_token_ids": [EOS_ID, END_ID]}
