from __future__ import annotations

import pytest

from core.status import Phase, Status
from core.testing.tokenizers import BOS_ID, SPECIAL_TOKENS


@pytest.fixture(params=["", "/v1"])
def prefix(request):
    return request.param


@pytest.mark.parametrize("kind", ["byte-level", "llama2"])
@pytest.mark.parametrize("text", ["hello", "Größe 😀", " two  spaces", "<eos>"])
def test_tokens_go_there_and_back(make_client, prefix, kind, text):
    client = make_client(kind)
    answer = client(f"{prefix}/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 2048
    assert answer["token_strs"] is None
    back = client(f"{prefix}/detokenize", {"tokens": answer["tokens"]}).json
    assert back == {"prompt": text}


def test_a_text_becomes_the_prompt_that_a_completion_has(client):
    client.complete("hello <eos>")
    answer = client("/tokenize", {"prompt": "hello <eos>", "return_token_strs": True}).json
    assert answer["tokens"] == client.service.submitted[-1][0]
    assert answer["tokens"][0] == BOS_ID
    assert "".join(answer["token_strs"]) == "<bos>hello <eos>"


def test_a_conversation_becomes_the_prompt_that_its_answer_has(client):
    client.chat("hello")
    messages = [{"role": "user", "content": "hello"}]
    assert client("/tokenize", {"messages": messages}).json["tokens"] == client.service.submitted[-1][0]
    assert client("/tokenize", {"messages": [{"role": "user", "content": "<eos>"}]}).status == 400


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": []}, {"prompt": ""}])
def test_one_of_prompt_and_messages_is_needed(client, fields):
    assert client("/tokenize", fields).error["param"] == "prompt"


@pytest.mark.parametrize("tokens", [[-1], [400], [2**63], [True], [1.0], ["1"], [[1]], None, "x"])
def test_only_ids_of_the_vocabulary_have_a_text(client, tokens):
    reply = client("/detokenize", {"tokens": tokens})
    assert reply.status == 400
    assert reply.error["param"].startswith("tokens")


def test_the_tokenizer_describes_itself(client, prefix):
    info = client(f"{prefix}/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    assert info["special_tokens"] == {str(i): text for i, text in enumerate(SPECIAL_TOKENS)}
    assert info["vocab_size"] == 400
    assert "add_generation_prompt" in info["chat_template"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}), ("/tokenizer_info", None)],
)
def test_there_may_be_no_tokenizer_or_not_yet(client, make_client, path, body):
    assert make_client(None)(path, body).status == 400
    client.service.status = Status(Phase.LOADING)
    assert client(path, body).status == 503


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_the_model_is_checked(client, path):
    body = {"prompt": "a", "tokens": [30]}
    assert client(path, {**body, "model": "tiny"}).status == 200
    assert client(path, {**body, "model": "other"}).status == 404


# --- models ---------------------------------------------------------------------------------------


def test_all_names_of_the_model_are_listed(client):
    answer = client("/v1/models").json
    assert [card["id"] for card in answer["data"]] == ["tiny", "tiny-alias"]
    assert answer["data"][1] == {
        "id": "tiny-alias",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "cythera",
        "root": "tiny",
        "parent": None,
        "max_model_len": 2048,
        "permission": [],
    }
    assert client("/v1/models/tiny-alias").json == answer["data"][1]


def test_models_are_listed_while_they_load(client):
    client.service.status = Status(Phase.LOADING)
    assert client("/v1/models").json["data"][0]["max_model_len"] is None
    assert client("/v1/models/tiny").json["max_model_len"] is None


def test_names_may_hold_slashes(client):
    client.service.model_names = ("org/tiny",)
    assert client("/v1/models/org/tiny").json["id"] == "org/tiny"
    reply = client("/v1/models/org")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
