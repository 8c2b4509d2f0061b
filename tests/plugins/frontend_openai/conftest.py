"""A service without an engine: real tokenizer, limits and journal, tokens from a script."""

from __future__ import annotations

import json
from collections import deque
from types import SimpleNamespace

import anyio
import pytest
from starlette.applications import Starlette

from core.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
)
from core.journal import Journal
from core.messages import Ended, Finish, OutputBatch
from core.request import FinishReason, RequestLimits
from core.status import Phase, Status
from core.step import PromptLogprobs, TokenLogprobs
from core.testing.tokenizers import EOS_ID, make_tokenizer
from core.tokenizer import load_tokenizer
from plugins.frontend.openai import NAME, OpenAISettings, make_frontend

VOCAB_SIZE = 400
MODEL = "tiny"


def logprobs_of(token_id, position, num_top):
    """Make up a distribution that every test can make up too; the token's rank is 1 or 3."""
    rank = 1 if (token_id + position) % 2 else 3
    others = [(token_id + step) % VOCAB_SIZE for step in range(1, 25)]
    ids = [*others[: rank - 1], token_id, *others[rank - 1 :]]
    values = [-0.1 - 0.3 * place - token_id / 7000 for place in range(len(ids))]
    chosen = values[rank - 1]
    return TokenLogprobs(token_id, chosen, rank, ids[:num_top], values[:num_top])


class Stream:
    """The outputs of one prompt: one token for each open sequence whenever somebody waits."""

    def __init__(self, service, prompt_id, commands, params):
        self.service, self.prompt_id, self.params = service, prompt_id, params
        self.open = {command.request_id: (index, command) for index, command in enumerate(commands)}
        self.position = 0
        self.outputs = deque()
        self.is_cancelled = anyio.Event()
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self.outputs:
            if not self.open:
                raise StopAsyncIteration
            await self.service.pause(self)
            self._take(self._step())
        return self.outputs.popleft()

    def _step(self):
        batch = OutputBatch()
        for sequence_id, (index, command) in self.open.items():
            if self.position == 0:
                batch.cached[sequence_id] = self.service.num_cached
                self._add_prompt_logprobs(batch, sequence_id, command)
            token = self.service.script(command.prompt_token_ids, index, self.position)
            if self.is_cancelled.is_set():
                batch.ended.append(Ended(sequence_id, FinishReason.ABORT))
                continue
            if isinstance(token, str):
                batch.ended.append(Ended(sequence_id, FinishReason.ERROR, None, token))
                continue
            batch.request_ids.append(sequence_id)
            batch.tokens.append(token)
            if self.params.logprobs is not None:
                entry = logprobs_of(token, self.position, self.params.logprobs)
                batch.logprobs[sequence_id] = entry
            if token in command.stop_ids and self.position + 1 > self.params.min_tokens:
                batch.ended.append(Ended(sequence_id, FinishReason.STOP, token))
            elif self.position + 1 == command.max_tokens:
                batch.ended.append(Ended(sequence_id, FinishReason.LENGTH))
        self.position += 1
        return batch

    def _add_prompt_logprobs(self, batch, sequence_id, command):
        num_top = self.params.prompt_logprobs
        if num_top is not None:
            ids = command.prompt_token_ids
            entries = [logprobs_of(ids[i], i, num_top) for i in range(1, len(ids))]
            batch.prompt_logprobs[sequence_id] = PromptLogprobs(1, entries)

    def _take(self, batch):
        requests, commands = self.service.journal.take(batch)
        self.outputs.extend(request.read() for request in requests)
        ended = {entry.request_id for entry in batch.ended}
        ended |= {command.request_id for command in commands if isinstance(command, Finish)}
        self.open = {key: value for key, value in self.open.items() if key not in ended}


class Admission:
    def __init__(self, service, request_id, timeout):
        self.service, self.request_id, self.timeout = service, request_id, timeout
        self.streams = []

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        for stream in self.streams:
            stream.is_closed = True
            self.service.journal.abort(stream.prompt_id)
        del self.service.admissions[self.request_id]

    def generate(self, prompt_token_ids, params, *, prompt_text=None, kind, priority=0, cache_salt=""):
        prompt_id = f"{self.request_id}#{len(self.streams)}"
        commands = self.service.journal.submit(
            prompt_id, prompt_token_ids, params, kind=kind, priority=priority, cache_salt=cache_salt
        )
        stream = Stream(self.service, prompt_id, commands, params)
        self.streams.append(stream)
        self.service.submitted.append((prompt_token_ids, params, prompt_text))
        return stream

    def cancel(self, error=""):
        for stream in self.streams:
            self.service.journal.cancel(stream.prompt_id, error)
            stream.is_cancelled.set()


class FakeService:
    def __init__(self, tokenizer, *, max_model_len=2048):
        self.model_names = (MODEL, "tiny-alias")
        self.created = 1_700_000_000
        self.config = SimpleNamespace(max_n=128, max_logprobs=20)
        self.settings = {NAME: OpenAISettings()}
        self.plan = SimpleNamespace(digest=lambda: "0123456789abcdef" * 4)
        self._tokenizer = tokenizer
        self._limits = RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=max_model_len)
        self.journal = Journal(self._limits, tokenizer, eos_token_ids=[EOS_ID])
        self.defaults = {}
        self.status = Status(Phase.READY)
        self.num_cached = 0
        self.admissions = {}
        self.timeouts = []
        self.submitted = []
        self.refused = []
        self.admit_error = None
        self.script = lambda prompt, index, position: 20 + (sum(prompt) + 7 * index + position) % 300
        self.pause = lambda stream: anyio.lowlevel.checkpoint()

    def _if_ready(self, value):
        self.check_ready()
        return value

    limits = property(lambda self: self._if_ready(self._limits))
    tokenizer = property(lambda self: self._if_ready(self._tokenizer))
    sampling_defaults = property(lambda self: self._if_ready(self.defaults))

    def check_ready(self):
        if self.status.phase not in (Phase.READY, Phase.DRAINING):
            raise NotReadyError("the model is not ready yet", retry_after=2.5)

    def check_model(self, name):
        if name not in self.model_names:
            raise ModelNotFoundError(f"model: {name!r} is not served here", field="model")

    def admit(self, request_id, *, num_sequences=1, timeout=None):
        self.check_ready()
        if self.admit_error is not None:
            raise self.admit_error
        if num_sequences > 128:
            raise InvalidRequestError("n: too many", field="n")
        if request_id in self.admissions:
            raise InvalidRequestError("request_id: in use", field="request_id")
        self.timeouts.append(timeout)
        admission = self.admissions[request_id] = Admission(self, request_id, timeout)
        return admission

    def cancel(self, request_id, error=""):
        admission = self.admissions.get(request_id)
        if admission is not None:
            admission.cancel(error)
        return admission is not None

    def refuse(self, request_id, error):
        self.refused.append((request_id, error))

    async def encode(self, text, *, add_special_tokens=True, parse_special=False):
        return self.need_tokenizer("tokens").encode(
            text, add_special_tokens, parse_special=parse_special
        )

    async def decode(self, token_ids, *, skip_special_tokens=False):
        if any(not 0 <= token_id < VOCAB_SIZE for token_id in token_ids):
            raise InvalidRequestError("tokens: out of range", field="tokens")
        return self.need_tokenizer("tokens").decode(token_ids, skip_special_tokens)

    def need_tokenizer(self, field):
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(f"{field}: there is no tokenizer", field=field)
        return tokenizer

    async def render_chat(
        self,
        messages,
        *,
        add_generation_prompt=True,
        continue_final_message=False,
        tools=None,
        documents=None,
        chat_template_kwargs=None,
    ):
        kwargs = dict(chat_template_kwargs or {})
        self._tokenizer.check_template_variables(kwargs)
        kwargs |= {key: value for key, value in [("tools", tools), ("documents", documents)] if value}
        if continue_final_message:
            kwargs["continue_final_message"] = True
        return self._tokenizer.render_chat(messages, add_generation_prompt, **kwargs)


class Reply:
    def __init__(self, messages):
        self.messages = messages
        start, *rest = messages
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.pieces = [message["body"] for message in rest]
        self.body = b"".join(self.pieces)
        self.is_complete = not rest[-1].get("more_body", False) if rest else False

    @property
    def json(self):
        return json.loads(self.body, parse_constant=pytest.fail)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        """Return the chunks of a stream whose framing is right to the last byte."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        frames = self.body.decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        data = [frame for frame in frames[:-2] if not frame.startswith(":")]
        assert all(frame.startswith("data: {") and "\n" not in frame for frame in data)
        return [json.loads(frame[len("data: ") :], parse_constant=pytest.fail) for frame in data]


class Client:
    """Talks ASGI, so that a test decides what is sent, read and left when."""

    def __init__(self, service, frontend=None):
        self.service = service
        self.app = Starlette(routes=(frontend or make_frontend(service)).routes)

    def configure(self, **settings):
        self.service.settings = {NAME: OpenAISettings(**settings)}
        self.app = Starlette(routes=make_frontend(self.service).routes)

    def scope(self, method, path, headers, request_id):
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
            "state": {} if request_id is None else {"request_id": request_id},
        }

    async def run(
        self, method, path, body=b"", *, headers=None, request_id="r1", send=None, leave=None
    ):
        """Run one request.

        :param send: called with every message of the response before it counts as sent.
        :param leave: an event after which the client is gone.
        """
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        sent, is_read = [], False

        async def receive():
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await (anyio.sleep_forever() if leave is None else leave.wait())
            return {"type": "http.disconnect"}

        async def keep(message):
            if send is not None:
                await send(message)
            sent.append(message)

        await self.app(self.scope(method, path, headers or {}, request_id), receive, keep)
        return Reply(sent) if sent else None

    def __call__(self, path, body=None, **kwargs):
        method, body = ("GET", b"") if body is None else ("POST", body)
        return anyio.run(lambda: self.run(method, path, body, **kwargs))

    def chat(self, text="hello", **fields):
        return self("/v1/chat/completions", chat_body(text, **fields))

    def complete(self, prompt="hello", **fields):
        return self("/v1/completions", {"prompt": prompt, **fields})


def chat_body(text="hello", **fields):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    return {
        kind: load_tokenizer(make_tokenizer(kind, tmp_path_factory.mktemp(kind)))
        for kind in ("byte-level", "llama2")
    }


@pytest.fixture
def service(tokenizers):
    return FakeService(tokenizers["byte-level"])


@pytest.fixture
def client(service):
    return Client(service)


@pytest.fixture
def make_client(tokenizers):
    def make(kind="byte-level", **kwargs):
        return Client(FakeService(tokenizers[kind] if kind else None, **kwargs))

    return make


@pytest.fixture
def client_of():
    return Client


@pytest.fixture
def body():
    return chat_body


@pytest.fixture
def expected_logprobs():
    return logprobs_of
