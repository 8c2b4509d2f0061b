from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import threading
import time
from collections import Counter, deque
from itertools import pairwise
from random import Random

import anyio
import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from core.errors import NotReadyError
from core.events import (
    EventBatch,
    FirstToken,
    RequestFinished,
    RequestPreempted,
    RequestQueued,
    RequestRefused,
    RequestScheduled,
    StepCompleted,
)
from core.pluginhost import check_plugin
from core.status import Phase, Status
from plugins.frontend import playground as plugin
from plugins.frontend.playground import page
from plugins.frontend.playground.feed import MAX_TEXT, NUM_RECENT, WINDOW, Feed

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def step(request_ids=(), *, prompt=0, running=1, waiting=0, usage=0.5):
    ids = list(request_ids)
    return StepCompleted(
        1, prompt + len(ids), len(ids), running, waiting, usage, 0.01, ids, [7] * len(ids)
    )


def finished(request_id, reason="stop", num_output=3, error=""):
    return RequestFinished(request_id, reason, 5, num_output, 2, 0, 1.25, error)


# --- the feed --------------------------------------------------------------------------------------


def tell(feed, now=0.0, running=1, waiting=0):
    return feed.message(now, num_running=running, num_waiting=waiting)


def test_a_request_is_followed_from_queue_to_end():
    feed = Feed()
    seen = []
    for events in (
        [RequestQueued("a", 5)],
        [RequestScheduled("a", 2, 0.5), step(["a"])],
        [step(["a"])],
        [RequestPreempted("a", 7)],
        [RequestScheduled("a", 4, 0.5), step(["a"])],
        [finished("a"), step(["a"])],
    ):
        for event in events:
            feed.add(event, 0.0)
        [view] = tell(feed).requests
        seen.append((view.state, view.num_prompt, view.num_cached, view.num_output, view.duration))
    assert seen == [
        ("queued", 5, 0, 0, None),
        ("running", 5, 2, 1, None),
        ("running", 5, 2, 2, None),
        ("preempted", 5, 2, 2, None),
        ("running", 5, 4, 3, None),
        ("stop", 5, 2, 3, 1.25),  # the scheduler's events come before those of the step
    ]


def test_nothing_new_is_no_message():
    feed = Feed()
    assert tell(feed) is not None
    assert tell(feed) is None
    assert tell(feed, running=2).num_running == 2
    feed.add(FirstToken("a", 0.1), 0.0)
    assert tell(feed, running=2) is None
    feed.add(RequestQueued("a", 5), 0.0)
    assert len(tell(feed, running=2).requests) == 1
    assert tell(feed, running=2) is None


def test_a_message_is_not_changed_by_what_comes_after_it():
    feed = Feed()
    feed.add(RequestQueued("a", 5), 0.0)
    first = tell(feed)
    feed.add(finished("a"), 0.0)
    assert first.requests[0].state == "queued"


def test_a_refusal_does_not_touch_the_request_whose_id_it_wanted():
    feed = Feed()
    for event in (RequestQueued("a", 5), RequestRefused("a", "id in use"), finished("a", "length")):
        feed.add(event, 0.0)
    assert [(view.number, view.state, view.error) for view in tell(feed).requests] == [
        (0, "length", ""),
        (1, "refused", "id in use"),
    ]


def test_an_id_that_is_used_again_is_another_request():
    feed = Feed()
    for event in (RequestQueued("a", 5), finished("a"), RequestQueued("a", 9)):
        feed.add(event, 0.0)
    assert [(view.number, view.state) for view in tell(feed).requests] == [(0, "stop"), (1, "queued")]


def test_an_idle_engine_holds_no_blocks_even_if_no_step_says_so():
    feed = Feed()
    feed.add(step(usage=0.75), 0.0)
    assert tell(feed).kv_usage == 0.75
    assert tell(feed, running=0).kv_usage == 0.0


def test_open_requests_outlive_ended_ones():
    feed = Feed()
    feed.add(RequestQueued("open", 5), 0.0)
    for index in range(3 * NUM_RECENT):
        feed.add(RequestQueued(f"r{index}", 5), 0.0)
        feed.add(finished(f"r{index}"), 0.0)
    assert "open" in {view.id for view in tell(feed).requests}


def test_long_texts_of_clients_are_cut():
    feed = Feed()
    feed.add(RequestRefused("x" * 10_000, "y" * 10_000), 0.0)
    [view] = tell(feed).requests
    assert (len(view.id), len(view.error)) == (MAX_TEXT, MAX_TEXT)


IDS = st.sampled_from([f"r{index}" for index in range(NUM_RECENT + 5)])
EVENTS = st.one_of(
    st.builds(RequestQueued, IDS, st.integers(0, 9)),
    st.builds(RequestScheduled, IDS, st.integers(0, 9), st.floats(0, 9)),
    st.builds(RequestPreempted, IDS, st.integers(0, 9)),
    st.builds(finished, IDS, st.sampled_from(["stop", "length", "abort", "error"])),
    st.builds(RequestRefused, IDS, st.just("no")),
    st.builds(step, st.lists(IDS, max_size=9), prompt=st.integers(0, 99)),
)


@given(st.lists(st.lists(EVENTS, max_size=80), max_size=8))
def test_a_feed_is_bounded_and_loses_no_count(rounds):
    feed = Feed()
    counts = Counter()
    last_views = {}
    for events in rounds:
        for event in events:
            feed.add(event, 0.0)
            counts[type(event)] += 1
        message = tell(feed) or tell(feed, running=9)
        assert len(message.requests) <= NUM_RECENT
        assert len({view.number for view in message.requests}) == len(message.requests)
        last_views |= {view.number: view for view in message.requests}
        assert message.num_finished == counts[RequestFinished]
        assert message.num_preempted == counts[RequestPreempted]
        assert message.num_refused == counts[RequestRefused]
    assert len(feed._recent) <= NUM_RECENT
    assert len(feed._open) <= NUM_RECENT
    assert {view.number for view in feed._open.values()} <= set(feed._recent)
    for number, view in feed._recent.items():  # what was not sent again has not changed
        assert last_views[number] == view


@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.integers(0, 9), st.integers(0, 99)), min_size=1, max_size=40
    )
)
def test_rates_are_those_of_the_window(steps):
    feed = Feed()
    now = 0  # in 1/1024 s, so that no sum is rounded
    seen = []
    for gap, num_output, num_prompt in steps:
        now += gap
        seen.append((now, num_output, num_prompt))
        feed.add(step(["x"] * num_output, prompt=num_prompt), now / 1024)
    recent = [entry for entry in seen if entry[0] > now - 1024 * WINDOW]
    message = tell(feed, now / 1024)
    assert message.output_rate == sum(entry[1] for entry in recent) / WINDOW
    assert message.prompt_rate == sum(entry[2] for entry in recent) / WINDOW
    later = tell(feed, now / 1024 + WINDOW)
    assert later is None or (later.output_rate, later.prompt_rate) == (0, 0)
    assert not feed._steps


# --- the routes ------------------------------------------------------------------------------------


class Events:
    """As `core.service.EventStream`; batches may come from any thread."""

    def __init__(self):
        self.batches = deque()

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self.batches:
            await anyio.sleep(0.005)
        return self.batches.popleft()


class FakeService:
    """What the playground uses of `core.service.Service`."""

    def __init__(self, phase=Phase.READY, **settings):
        self.settings = {plugin.NAME: plugin.PlaygroundSettings(**settings)}
        self.status = Status(phase)
        self.num_running = 2
        self.num_waiting = 1
        self.wanted = set()
        self.watchers = []

    def want(self, *types):
        self.wanted |= set(types)

    def check_ready(self):
        if self.status.phase is not Phase.READY:
            raise NotReadyError(f"the model is not ready yet: {self.status.phase}", retry_after=2.4)

    @contextlib.asynccontextmanager
    async def watch(self, *types):
        assert set(types) <= self.wanted
        events = Events()
        self.watchers.append(events)
        try:
            yield events
        finally:
            self.watchers.remove(events)

    def publish(self, *events):
        for watcher in self.watchers:
            watcher.batches.append(EventBatch(0, 0, 0.0, list(events)))


def make_client(service, frontend=None):
    frontend = frontend or plugin.make_frontend(service)
    transport = httpx.ASGITransport(app=Starlette(routes=list(frontend.routes)))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def test_it_is_a_plugin():
    assert check_plugin("py:plugins.frontend.playground") == []
    [entry] = plugin.core_register_frontends()
    assert (entry.name, entry.factory) == ("playground", plugin.make_frontend)


async def test_only_the_page_and_its_files_are_open():
    frontend = plugin.make_frontend(FakeService(Phase.LOADING))
    paths = {route.path for route in frontend.routes}
    assert paths - frontend.open_paths == {"/playground/events"}
    assert frontend.open_paths == {"/", *(page.PREFIX + name for name in page.ASSETS)}


async def test_the_page_names_only_files_that_are_served():
    frontend = plugin.make_frontend(FakeService())
    async with make_client(None, frontend) as client:
        text = (await client.get("/")).text
        named = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert set(named) >= {"playground/style.css", "playground/app.js"}
        for name in named:
            if not name.startswith("data:"):
                response = await client.get(f"/{name}")
                assert response.status_code == 200
                assert f"/{name}" in frontend.open_paths
        for asset in page.ASSETS:
            text = (await client.get(page.PREFIX + asset)).text
            for name in re.findall(r'from "\./([^"]+)"', text):
                assert name in page.ASSETS


async def test_nothing_runs_or_loads_but_the_pages_own_files():
    async with make_client(FakeService()) as client:
        for path in ("/", *(page.PREFIX + name for name in page.ASSETS)):
            response = await client.get(path)
            policy = dict(
                part.strip().split(" ", 1)
                for part in response.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["frame-ancestors"] == "'none'"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["content-type"].endswith("charset=utf-8")
            without_namespace = response.text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|url\(|@import|innerHTML|insertAdjacent", without_namespace)
            assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", response.text)


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.LOADING, Phase.DRAINING, Phase.FAILED])
async def test_no_feed_unless_ready(phase):
    async with make_client(FakeService(phase)) as client:
        response = await client.get("/playground/events")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
        assert (await client.get("/")).status_code == 200


async def test_head_of_the_feed_has_an_end():
    async with make_client(FakeService()) as client:
        response = await client.head("/playground/events")
        assert response.status_code == 200


class Viewer:
    """A client of the feed, below HTTP."""

    def __init__(self, service, frontend):
        self.service = service
        self.app = Starlette(routes=list(frontend.routes))
        self.sent = []
        self.left = anyio.Event()
        self.num_received = 0

    async def run(self):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/playground/events",
            "headers": [],
            "query_string": b"",
        }
        await self.app(scope, self.receive, self.send)

    async def receive(self):
        self.num_received += 1
        if self.num_received > 1:
            await self.left.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message):
        self.sent.append((time.monotonic(), message))

    @property
    def status(self):
        return self.sent[0][1]["status"]

    @property
    def messages_text(self):
        return b"".join(message["body"] for _, message in self.sent[1:]).decode()

    @property
    def messages(self):
        bodies = [message["body"].decode() for _, message in self.sent[1:] if message["body"]]
        return [json.loads(body.removeprefix("data: ")) for body in bodies if body[0] != ":"]

    async def until(self, condition):
        with anyio.fail_after(5):
            while not condition(self):
                await anyio.sleep(0.01)


async def test_a_feed_says_what_happens_and_not_too_often():
    service = FakeService()
    viewer = Viewer(service, plugin.make_frontend(service))
    async with anyio.create_task_group() as group:
        group.start_soon(viewer.run)
        await viewer.until(lambda v: v.messages)
        assert (viewer.messages[0]["num_running"], viewer.messages[0]["num_waiting"]) == (2, 1)
        for index in range(100):
            service.publish(RequestQueued(f"r{index}", 5), step([f"r{index}"]))
            await anyio.sleep(0.005)
        service.publish(finished("r99"))
        await viewer.until(lambda v: any(r["state"] == "stop" for r in v.messages[-1]["requests"]))
        times = [sent_at for sent_at, _ in viewer.sent[1:]]
        viewer.left.set()
    gaps = [late - early for early, late in pairwise(times)]
    assert len(gaps) >= 2
    assert min(gaps) >= 0.9 * page.INTERVAL
    assert service.watchers == []


async def test_a_feed_ends_with_the_client_though_nothing_happens():
    service = FakeService()
    viewer = Viewer(service, plugin.make_frontend(service))
    with anyio.fail_after(2):
        async with anyio.create_task_group() as group:
            group.start_soon(viewer.run)
            await viewer.until(lambda v: v.messages)
            viewer.left.set()
    assert service.watchers == []


async def test_a_feed_ends_when_the_engine_stops():
    service = FakeService()
    viewer = Viewer(service, plugin.make_frontend(service))
    with anyio.fail_after(2):
        async with anyio.create_task_group() as group:
            group.start_soon(viewer.run)
            await viewer.until(lambda v: v.messages)
            service.status = Status(Phase.DRAINING)
    assert viewer.sent[-1][1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_server_that_refuses_to_send_ends_the_feed():
    service = FakeService()
    viewer = Viewer(service, plugin.make_frontend(service))

    async def fail(_message):
        raise BrokenPipeError

    viewer.send = fail
    with anyio.fail_after(2):
        await viewer.run()
    assert service.watchers == []


async def test_silence_is_filled_with_comments(monkeypatch):
    monkeypatch.setattr(page, "PING_INTERVAL", 0.3)
    service = FakeService()
    viewer = Viewer(service, plugin.make_frontend(service))
    async with anyio.create_task_group() as group:
        group.start_soon(viewer.run)
        await viewer.until(lambda v: v.sent and v.sent[-1][1].get("body") == b": ping\n\n")
        viewer.left.set()
    assert len(viewer.messages) == 1


async def test_feeds_are_counted_and_given_back():
    service = FakeService(max_feeds=2)
    frontend = plugin.make_frontend(service)
    viewers = [Viewer(service, frontend) for _ in range(3)]
    async with anyio.create_task_group() as group:
        for viewer in viewers[:2]:
            group.start_soon(viewer.run)
            await viewer.until(lambda v: v.messages)
        with anyio.fail_after(2):
            await viewers[2].run()
        assert viewers[2].status == 429
        assert "frontend.playground.max_feeds" in viewers[2].messages_text
        viewers[0].left.set()
        await viewers[0].until(lambda _: len(service.watchers) == 1)
        late = Viewer(service, frontend)
        group.start_soon(late.run)
        await late.until(lambda v: v.messages)
        assert late.status == 200
        for viewer in (viewers[1], late):
            viewer.left.set()


# --- the page, in a browser ------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = "<img src=x onerror=document.title='owned'>"
WAVE = "🌊".encode()
WORDS = ["The", " sea", " is", " calm", ".\n", "A", " swell", " of", " ", HOSTILE, " rises", ","]
ANSWER = [
    *((word, [(word, word.encode(), 0.999 - 0.08 * index)]) for index, word in enumerate(WORDS)),
    ("", [("\ufffd", WAVE[:2], 0.5)]),  # a character that takes three tokens
    ("", [("\ufffd", WAVE[2:3], 0.9)]),
    ("🌊", [("\ufffd", WAVE[3:], 0.97)]),
    (" gone", [(" gone", b" gone", 0.31)]),
    ("", [("<|end|>", b"<|end|>", 0.9)]),
]
ANSWER_TEXT = "".join(text for text, _ in ANSWER)
ALTERNATIVES = [(" still", 0.4), (" wide", 0.2), ('"', 0.05), (" deep", 0.01), ("\n", 0.001)]


def chat_logprobs(tokens):
    def entry(text, raw, p):
        return {"token": text, "logprob": math.log(p), "bytes": list(raw)}

    others = [entry(text, text.encode(), p) for text, p in ALTERNATIVES]
    return {"content": [{**entry(*token), "top_logprobs": others} for token in tokens]}


def text_logprobs(tokens):
    others = {text: math.log(p) for text, p in ALTERNATIVES}
    return {
        "tokens": [text for text, _, _ in tokens],
        "token_logprobs": [math.log(p) for _, _, p in tokens],
        "top_logprobs": [{**others, text: math.log(p)} for text, _, p in tokens],
        "text_offset": [0] * len(tokens),
    }


class FakeOpenAI:
    """The routes of the playground beside scripted ones, in a thread of its own."""

    def __init__(self):
        self.service = FakeService()
        self.key = ""
        self.delay = 0.0
        self.bodies = []
        self.num_broken_off = 0
        frontend = plugin.make_frontend(self.service)
        routes = [
            *frontend.routes,
            Route("/readyz", self.readyz),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)
        self.open_paths = frontend.open_paths | {"/readyz"}
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"

    async def __call__(self, scope, receive, send):
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key and scope["path"] not in self.open_paths and key != f"Bearer {self.key}":
            response = JSONResponse({"error": {"message": "that key is wrong"}}, 401)
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @contextlib.contextmanager
    def serve(self):
        config = uvicorn.Config(self, log_level="critical", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [self.socket]})
        thread.start()
        try:
            yield self
        finally:
            self.service.status = Status(Phase.STOPPED)
            server.should_exit = True
            thread.join(5)

    async def readyz(self, _request):
        status = self.service.status
        body = {"phase": status.phase, "percent": status.percent, "error": status.error}
        return JSONResponse(body, 200 if status.phase is Phase.READY else 503)

    async def models(self, _request):
        return JSONResponse({"object": "list", "data": [{"id": "tiny"}]})

    async def chat(self, request):
        body = await request.json()
        self.bodies.append(body)
        shape = chat_logprobs if body.get("logprobs") else None
        parts = ({"delta": {"content": t}, "logprobs": shape and shape(ts)} for t, ts in ANSWER)
        last = body["messages"][-1]["content"]
        return self.stream(parts, is_endless=last == "forever", fails=last == "fail")

    async def completions(self, request):
        body = await request.json()
        self.bodies.append(body)
        shape = text_logprobs if body.get("logprobs") else None
        return self.stream({"text": t, "logprobs": shape and shape(ts)} for t, ts in ANSWER)

    def stream(self, parts, *, is_endless=False, fails=False):
        async def events():
            try:
                while is_endless:
                    yield make_chunk({"delta": {"content": "la "}, "logprobs": None})
                    await anyio.sleep(0.01)
                for part in parts:
                    yield make_chunk(part)
                    await anyio.sleep(self.delay)
                    if fails:
                        yield 'data: {"error": {"message": "a step failed"}}\n\ndata: [DONE]\n\n'
                        return
                yield make_chunk({"delta": {}, "text": "", "finish_reason": "stop"})
                yield 'data: {"choices": [], "usage": {"completion_tokens": 17}}\n\ndata: [DONE]\n\n'
            except BaseException:
                self.num_broken_off += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")


def make_chunk(choice):
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None, **choice}]})}\n\n"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def server():
    with FakeOpenAI().serve() as server:
        yield server


@pytest.fixture
def tab(browser, server):
    """A page that has not been opened, which fails the test for whatever the console complains of."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(5000)
    complaints = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "console",
        lambda line: (
            complaints.append(line.text)
            if line.type in ("error", "warning") and "Failed to load resource" not in line.text
            else None
        ),
    )
    yield tab
    context.close()
    assert complaints == []


def wait_for(condition, timeout=5.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask(tab, text):
    tab.get_by_label("Message").fill(text)
    tab.get_by_label("Message").press("Enter")


def answers(tab):
    return tab.locator("#transcript .assistant .body")


def wait_for_end(tab, num_answers=1):
    tab.locator(".facts:visible", has_text="17 tokens").nth(num_answers - 1).wait_for()


def open_page(tab, server):
    tab.goto(server.url)
    tab.locator("#phase[data-phase=ready]").wait_for()
    tab.locator("#model option", has_text="tiny").wait_for(state="attached")


def test_chat_shows_what_was_streamed_and_never_as_markup(tab, server):
    open_page(tab, server)
    ask(tab, f"What about <b>{HOSTILE}</b>?")
    wait_for_end(tab)
    assert answers(tab).inner_text() == ANSWER_TEXT
    assert tab.locator(".user .body").inner_text() == f"What about <b>{HOSTILE}</b>?"
    assert tab.locator("#transcript img, #transcript b").count() == 0
    assert tab.title() == "cythera playground"
    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": f"What about <b>{HOSTILE}</b>?"}
    ]
    ask(tab, "And now?")
    wait_for_end(tab, 2)
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"] == ANSWER_TEXT


def test_tokens_tell_their_probabilities_to_mouse_and_keys(tab, server):
    open_page(tab, server)
    ask(tab, "Hello")
    wait_for_end(tab)
    tokens = answers(tab).locator(".token")
    assert tokens.count() == len(WORDS) + 2  # the three tokens of one character are one span
    popover = tab.get_by_role("tooltip")
    tokens.nth(1).hover()
    popover.wait_for()
    lines = popover.locator("li").all_inner_texts()
    assert [line.split()[-2] for line in lines] == ["91.9", "40.0", "20.0", "5.0", "1.00", "0.10"]
    assert popover.locator(".chosen").inner_text().split() == ["␣sea", "91.9", "%"]
    tokens.nth(len(WORDS)).hover()
    assert popover.locator(".chosen").count() == 3
    answers(tab).focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert popover.locator(".chosen").inner_text().split() == ["␣sea", "91.9", "%"]
    tab.keyboard.press("Escape")
    popover.wait_for(state="hidden")


def test_settings_are_sent_only_when_set(tab, server):
    open_page(tab, server)
    ask(tab, "Hello")
    wait_for_end(tab)
    common = {"model", "messages", "stream", "stream_options", "logprobs", "top_logprobs"}
    assert set(server.bodies[0]) == common
    tab.get_by_label("System prompt").fill("Be brief.")
    tab.get_by_role("slider", name="Temperature").fill("0.7")
    for name, value in {"Top k": "40", "Max tokens": "9", "Seed": "7"}.items():
        tab.get_by_label(name).fill(value)
    tab.get_by_label("Stop at").fill("END\n\\n\\n")
    tab.get_by_label("Token probabilities").uncheck()
    tab.get_by_role("button", name="Regenerate").click()
    wait_for(lambda: len(server.bodies) == 2)
    body = server.bodies[1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(body["messages"]) == 2
    expected = {"temperature": 0.7, "top_k": 40, "max_tokens": 9, "seed": 7, "stop": ["END", "\n\n"]}
    assert {key: body[key] for key in set(body) - common} == expected
    assert "logprobs" not in body
    wait_for_end(tab)
    assert answers(tab).count() == 1
    tab.get_by_role("button", name="Reset").click()
    ask(tab, "Again")
    wait_for(lambda: len(server.bodies) == 3)
    assert set(server.bodies[2]) == common


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_can_be_stopped_and_is_kept(tab, server, how):
    open_page(tab, server)
    ask(tab, "forever")
    tab.get_by_text("la la la").wait_for()
    if how == "button":
        tab.get_by_role("button", name="Stop").click()
    else:
        tab.keyboard.press("Escape")
    tab.locator(".facts", has_text="stopped").wait_for()
    wait_for(lambda: server.num_broken_off == 1)
    assert answers(tab).inner_text().startswith("la la la")
    assert tab.get_by_role("button", name="Send").is_visible()
    tab.get_by_role("button", name="Clear").click()
    assert answers(tab).count() == 0


def test_a_failure_in_the_middle_is_said_and_can_be_retried(tab, server):
    open_page(tab, server)
    ask(tab, "fail")
    tab.get_by_role("alert").get_by_text("a step failed").wait_for()
    assert answers(tab).inner_text() == WORDS[0]
    tab.get_by_role("button", name="Regenerate").wait_for()


def test_completion_gets_the_prompt_as_it_is(tab, server):
    open_page(tab, server)
    tab.get_by_role("tab", name="Completion").click()
    box = tab.get_by_label("Prompt, exactly")
    box.fill("Once\nupon ")
    box.press("Control+Enter")
    wait_for_end(tab)
    body = server.bodies[0]
    assert (body["prompt"], body["logprobs"], "messages" in body) == ("Once\nupon ", 5, False)
    continuation = tab.locator("#continuation .body")
    assert continuation.inner_text() == ANSWER_TEXT
    assert continuation.locator("img").count() == 0
    continuation.locator(".token").nth(1).hover()
    assert tab.get_by_role("tooltip").locator(".chosen").inner_text().split() == ["␣sea", "91.9", "%"]
    tab.get_by_role("button", name="Add to prompt").click()
    assert box.input_value() == "Once\nupon " + ANSWER_TEXT


def test_loading_is_shown_until_the_server_is_ready(tab, server):
    server.service.status = Status(Phase.LOADING, 42, 100)
    tab.goto(server.url)
    tab.get_by_text("Loading the weights, 42 %").wait_for()
    ask(tab, "too early")
    assert server.bodies == []
    server.service.status = Status(Phase.READY)
    tab.get_by_text("Loading the weights").wait_for(state="hidden")
    tab.get_by_text("connected", exact=True).wait_for()
    tab.get_by_label("Message").press("Enter")
    wait_for_end(tab)


def test_a_key_is_asked_for_and_kept_in_the_tab(tab, server):
    server.key = "secret"
    tab.goto(server.url)
    box = tab.get_by_label("This server needs an API key")
    for key in ("wrong", "secret"):
        box.wait_for()
        box.fill(key)
        box.press("Enter")
        if key == "wrong":
            tab.get_by_role("alert").get_by_text("that key is wrong").wait_for()
    tab.get_by_text("connected", exact=True).wait_for()  # the feed needs the key as well
    ask(tab, "Hello")
    wait_for_end(tab)
    assert tab.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert tab.evaluate("localStorage.length") == 0
    assert "secret" not in tab.content()


def test_the_live_view_follows_the_engine(tab, server):
    open_page(tab, server)
    tab.get_by_text("connected", exact=True).wait_for()
    server.service.publish(
        RequestQueued("req-a", 5),
        RequestScheduled("req-a", 0, 0.1),
        step(["req-a"] * 3, usage=0.25),
        RequestRefused(HOSTILE, "too long"),
    )
    live = tab.locator("#live")
    live.locator("li[data-state=running]", has_text="req-a").get_by_text("5 → 3").wait_for()
    live.locator("li[data-state=refused]", has_text=HOSTILE).wait_for()
    assert live.get_by_role("meter").get_attribute("aria-valuenow") == "25.0"
    server.service.publish(finished("req-a", "length"))
    live.get_by_text("finished: length").wait_for()
    live.locator("[data-stat=num_finished]", has_text="1").wait_for()
    server.service.status = Status(Phase.DRAINING)
    tab.get_by_text("The server is shutting down").wait_for()
    tab.close()
    wait_for(lambda: not server.service.watchers)


def test_every_token_is_aligned_with_the_text_that_it_became(tab, server):
    random = Random(7)
    cases = [make_case(random) for _ in range(150)]
    tab.goto(server.url)
    results = tab.evaluate(ALIGN, cases)
    for case, spans in zip(cases, results, strict=True):
        assert "".join(text for text, _ in spans) == case["text"]
        assert [index for _, indices in spans for index in indices] == list(range(case["num_tokens"]))
        raw = [bytes(token["bytes"]) for _, tokens in case["pushes"] for token in tokens]
        for text, indices in spans:
            assert b"".join(raw[index] for index in indices).decode() == text


def make_case(random):
    """Cut a text into tokens at any byte, and let text lag behind its tokens."""
    text = "".join(random.choices("ab \nàß漢🌊👍🏽", k=random.randint(1, 20)))
    raw = text.encode()
    cuts = sorted({0, len(raw), *random.choices(range(len(raw) + 1), k=random.randint(0, 15))})
    pieces = [raw[a:b] for a, b in pairwise(cuts)]
    pushes = []
    num_sent = 0
    for index, piece in enumerate(pieces):
        known = raw[: cuts[index + 1]].decode(errors="ignore")
        held_back = 0 if index == len(pieces) - 1 else random.choice([0, 0, 1, 3])
        end = max(num_sent, len(known) - held_back)
        token = {"text": piece.decode(errors="replace"), "bytes": list(piece), "index": index}
        pushes.append((known[num_sent:end], [token]))
        num_sent = end
    return {"text": text, "pushes": pushes, "num_tokens": len(pieces)}


ALIGN = """async (cases) => {
  const { Aligner } = await import("/playground/client.js");
  return cases.map(({ pushes }) => {
    const aligner = new Aligner();
    const spans = pushes.flatMap(([text, tokens]) => aligner.push(text, tokens));
    spans.push(...aligner.flush());
    return spans.map(({ text, tokens }) => [text, tokens.map(({ index }) => index)]);
  });
}"""


@pytest.mark.parametrize("width", [360, 800])
def test_on_a_small_screen_panels_are_drawers_and_nothing_overflows(tab, server, width):
    tab.set_viewport_size({"width": width, "height": 700})
    open_page(tab, server)
    ask(tab, "Hello " + "x" * 300)
    wait_for_end(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    temperature = tab.get_by_role("slider", name="Temperature")
    assert not temperature.is_visible()
    tab.get_by_role("button", name="Settings").click()
    temperature.wait_for()
    tab.keyboard.press("Escape")
    temperature.wait_for(state="hidden")
    assert tab.get_by_role("button", name="Settings").get_attribute("aria-expanded") == "false"
