from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import select
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cyclopts import App
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from server_process import heed_interrupts

from core import chat as module
from core.chat import (
    Answer,
    Chat,
    ChatClient,
    Dialogue,
    MarkdownWriter,
    ServerError,
    Session,
    chat,
    read_events,
    split_finished,
)
from core.errors import ConfigError

ANSWER = ["Hello", ", ", "wörld", "\u2028\x85", " 🌊", "."]
TEXT = "".join(ANSWER)


class FakeServer(ThreadingHTTPServer):
    """OpenAI's chat routes, scripted."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.key = ""
        self.not_ready = []
        self.models = ["tiny", "other"]
        self.refusal = None
        self.is_endless = False
        self.ending = [b'data: {"choices": [], "usage": {"completion_tokens": 6}}', b"data: [DONE]"]
        self.bodies = []
        self.left = threading.Event()

    def chunks(self):
        yield b": ping"
        for text in ANSWER:
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            yield b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode()
        while self.is_endless:
            yield b'data: {"choices": [{"delta": {"content": " la"}}]}'
            time.sleep(0.01)
        yield b'data: {"choices": [{"delta": {}, "finish_reason": "length"}], "warnings": ["odd"]}'
        yield from self.ending


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, value):
        body = json.dumps(value).encode() if isinstance(value, dict) else value
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def is_welcome(self):
        key = self.server.key
        if key and self.headers.get("authorization") != f"Bearer {key}":
            self.reply(401, {"error": {"message": "wrong key"}})
            return False
        return True

    def do_GET(self):
        if self.path == "/readyz":
            waiting = self.server.not_ready
            self.reply(503, waiting.pop(0)) if waiting else self.reply(200, {})
        elif self.path == "/v1/models" and self.is_welcome():
            self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        if not self.is_welcome():
            return
        self.server.bodies.append(json.loads(content))
        if self.server.refusal:
            self.reply(*self.server.refusal)
            return
        self.send_response(200)
        self.end_headers()
        try:
            for chunk in self.server.chunks():
                self.wfile.write(chunk + b"\n\n")
        except OSError:
            self.server.left.set()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.01)
    monkeypatch.delenv(module.API_KEY, raising=False)
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_endless = False
        server.shutdown()
        thread.join()


def make_console(*, is_terminal=True):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100, markup=False)


@pytest.fixture
def talk(server):
    """A chat whose answers and notes are collected."""
    with ChatClient(server.url) as client:
        yield Chat(client, Session("tiny"), make_console(), make_console())


def notes_of(talk):
    return re.sub(r"\x1b\[[0-9;]*m", "", talk._notes.file.getvalue())


# --- reading ---------------------------------------------------------------------------------------


@given(st.lists(st.text().map(lambda t: json.dumps(t, ensure_ascii=False))), st.data())
def test_events_are_read_whatever_the_pieces(values, data):
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    body = "".join(f": comment{end}data: {value}{end}{end}" for value in values).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=9)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert [event.decode() for event in read_events(pieces)] == values


MARKDOWN = st.lists(
    st.sampled_from(
        ["text", "\n", "\n\n", "```", "```python\n", "~~~~", "- item", "  ", "    code", "# "]
    )
).map("".join)


@given(MARKDOWN)
@example("a\n\n```\nx\n\ny\n```\n\nb")
def test_markdown_is_cut_only_where_nothing_can_change(text):
    head, tail = split_finished(text)
    assert head + tail == text
    if head:
        assert re.search(r"(^|\n)[ \t]*\n$", head)
        assert not tail[0].isspace()
        fence = ""
        for line in head.splitlines():
            found = re.match(r" {0,3}(`{3,}|~{3,})", line)
            if fence and line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
                fence = ""
            elif found and not fence:
                fence = found[1]
        assert fence == ""


@given(MARKDOWN)
def test_markdown_that_comes_in_pieces_is_the_same_markdown(text):
    blocks, tail = [], ""
    for character in text:
        block, tail = split_finished(tail + character)
        blocks.append(block)
    assert "".join(blocks) + tail == text


def test_an_answer_on_a_terminal_is_whole_and_steers_nothing():
    console = make_console()
    words = [f"word{index}" for index in range(300)]
    with MarkdownWriter(console) as writer:
        for index, word in enumerate(words):
            writer.add(f"{word}{' ' if index % 50 else chr(10) * 2}")
            if index == 100:
                writer.add("\x1b]0;owned\x07\x9b2J\x1b[2J")
    text = console.file.getvalue()
    assert "\x1b]0" not in text
    assert "\x9b" not in text
    assert "\x1b[2J" not in text
    for word in words:
        assert word in text


# --- the conversation ------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["ask", "answer", "fail", "undo", "retry"]), max_size=30))
def test_roles_take_turns_whatever_happens(actions):
    session = Session("tiny", system="Be brief.")
    pairs = []  # of question and answer
    for number, action in enumerate(actions):
        question, answer = f"q{number}", f"a{number}"
        if action in ("ask", "fail"):
            pairs = [pair for pair in pairs if pair[1]]
            session.ask(question)
            pairs.append((question, answer if action == "ask" else None))
            if action == "ask":
                session.answer(answer)
        elif action == "retry":
            assert session.take_back_answer() == bool(pairs)
            if pairs:
                session.answer(answer)
                pairs[-1] = (pairs[-1][0], answer)
        elif action == "undo":
            assert session.undo() == bool(pairs)
            pairs = pairs[:-1]
    said = [text for pair in pairs for text in pair if text]
    assert [turn["content"] for turn in session.messages] == ["Be brief.", *said]
    roles = [turn["role"] for turn in session.turns]
    assert roles == ["user" if index % 2 == 0 else "assistant" for index in range(len(roles))]


def test_settings_are_json_or_text():
    session = Session("tiny", settings={"seed": 1})
    for assignment in ("temperature=0.5", 'stop = ["a", "b=c"]', "user=me=you", "seed="):
        session.set(assignment)
    expected = {"temperature": 0.5, "stop": ["a", "b=c"], "user": "me=you"}
    assert session.settings == expected
    assert session.body().items() >= expected.items()
    for wrong in ("temperature", "=1", " "):
        with pytest.raises(ValueError, match="key=value"):
            session.set(wrong)


def test_what_is_saved_can_be_read_and_nothing_is_overwritten(tmp_path):
    session = Session("tiny", "Be brief.", {"seed": 1})
    session.ask("Wörld?")
    session.answer("Yes.")
    session.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert saved == {"model": "tiny", "settings": {"seed": 1}, "messages": session.messages}
    session.save(tmp_path / "talk.md")
    expected = "## system\n\nBe brief.\n\n## user\n\nWörld?\n\n## assistant\n\nYes.\n"
    assert (tmp_path / "talk.md").read_text("utf-8") == expected
    with pytest.raises(FileExistsError):
        session.save(tmp_path / "talk.md")


def test_pace_is_counted_from_the_first_token():
    answer = Answer(text="x", num_tokens=11, begin=10.0, first=12.0, last=14.0, ending="length")
    assert answer.describe() == "max_tokens reached · 11 tokens · 5.0 tokens/s · first after 2.00 s"
    assert Answer().describe() == ""
    assert Answer(num_tokens=1, begin=0.0, first=1.0, last=1.0).describe() == (
        "1 token · first after 1.00 s"
    )


# --- one answer ------------------------------------------------------------------------------------


def test_a_prompt_is_answered_on_standard_output(server, capsys):
    assert chat("Hi", url=server.url, system="Be brief.", temperature=0.5, max_tokens=9) == 0
    assert capsys.readouterr().out == TEXT + "\n"
    [body] = server.bodies
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "temperature": 0.5,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_standard_input_is_a_prompt(server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hällo\n".encode() + b"\xff")))
    assert chat(url=server.url, model="other") == 0
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hällo\n\ufffd"}]
    assert server.bodies[0]["model"] == "other"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    with pytest.raises(ConfigError, match="nothing to answer"):
        chat(url=server.url)


def test_it_is_a_command(server, capsys):
    app = App(result_action="return_value")
    app.command(chat)
    assert app(["chat", "--url", server.url, "--seed", "3", "--top-p", "0.5", "Hi"]) == 0
    assert capsys.readouterr().out == TEXT + "\n"
    assert server.bodies[0]["seed"] == 3
    assert server.bodies[0]["top_p"] == 0.5
    app(["chat", "--help"])
    assert "Talk to a model" in capsys.readouterr().out


def test_a_key_comes_from_the_flag_or_the_environment(server, monkeypatch):
    server.key = "secret"
    with pytest.raises(ServerError, match=r"wrong key \(HTTP 401\).*--api-key or CYTHERA_API_KEY"):
        chat("Hi", url=server.url)
    with pytest.raises(ServerError, match="wrong key"):
        chat("Hi", url=server.url, model="tiny")
    assert chat("Hi", url=server.url, api_key="secret") == 0
    monkeypatch.setenv(module.API_KEY, "secret,another")
    assert chat("Hi", url=server.url) == 0
    with pytest.raises(ServerError, match="wrong key"):
        chat("Hi", url=server.url, api_key="other")


def test_no_server_says_how_to_start_one():
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1: is it running\? .*python -m core serve"):
        chat("Hi", url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize("url", ["127.0.0.1:1/v1", "ftp://x/v1", "http://[x/v1", "http://x:99999/v1"])
def test_what_is_no_url_is_said_to_be_none(url):
    with pytest.raises(ServerError, match="--url"):
        chat("Hi", url=url)


def test_it_waits_while_the_server_loads(server, talk):
    server.not_ready = [{"phase": "loading", "percent": 42, "error": ""}, {"phase": "warming"}]
    reports = []
    talk.client.wait_until_ready(reports.append)
    assert [(report.phase, report.percent) for report in reports] == [("loading", 42), ("warming", 0)]
    server.not_ready = [{"phase": "loading", "percent": 43, "error": ""}]
    talk.session.ask("Hi")
    assert talk.answer()
    assert "the server is loading: 43 %" in notes_of(talk)
    server.not_ready = [{"phase": "failed", "percent": 0, "error": "out of memory"}]
    with pytest.raises(ServerError, match="is failed: out of memory"):
        talk.answer()


def test_a_refusal_is_shown_as_the_server_put_it(server, talk):
    talk.session.ask("Hi")
    for refusal, expected in (
        ((400, {"error": {"message": "temperature is -1"}}), "temperature is -1 (HTTP 400)"),
        ((502, b"<html>bad gateway</html>"), "<html>bad gateway</html> (HTTP 502)"),
        ((500, b"\xff" * 9999), "(HTTP 500)"),
    ):
        server.refusal = refusal
        with pytest.raises(ServerError, match=re.escape(expected)) as caught:
            talk.answer()
        assert caught.value.status == refusal[0]
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ([b'data: {"error": {"message": "a step failed"}}', b"data: [DONE]"], "a step failed"),
        ([], "broke off before the answer was complete"),
        ([b"data: {"], "does not speak OpenAI's API"),
        ([b'data: {"choices": 3}'], "does not speak OpenAI's API"),
        ([b'data: "\xff"'], "does not speak OpenAI's API"),
    ],
)
def test_what_came_before_a_failure_is_kept(server, talk, ending, message):
    server.ending = ending
    talk.session.ask("Hi")
    with pytest.raises(ServerError, match=message):
        talk.answer()
    assert talk.session.turns[-1] == {"role": "assistant", "content": TEXT}


def test_facts_and_warnings_follow_the_answer(talk):
    talk.session.ask("Hi")
    assert talk.answer()
    assert re.search(r"odd\s+max_tokens reached · 6 tokens · .*first after \d", notes_of(talk))


# --- the dialogue ----------------------------------------------------------------------------------


def run_dialogue(talk, *lines):
    """Type lines; an exception is raised instead of being typed.  At the end the input ends."""
    typed = iter([*lines, EOFError()])

    def read(_prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    Dialogue(talk, read).run()
    return list(typed)


def test_commands_do_what_they_say(server, talk, tmp_path):
    path = tmp_path / "talk.json"
    run_dialogue(
        talk,
        "/system Be brief.",
        "/set temperature=0.5",
        "first",
        "second",
        "/undo",
        "/retry",
        "third",
        f"/save {path}",
        "/new",
        "/undo",
        "/retry",
        "/set oops",
        "/save",
        "/nonsense",
        "/help",
        "",
        "/set",
        "fourth",
    )
    asked = [[turn["content"] for turn in body["messages"]] for body in server.bodies]
    assert asked == [
        ["Be brief.", "first"],
        ["Be brief.", "first", TEXT, "second"],
        ["Be brief.", "first"],
        ["Be brief.", "first", TEXT, "third"],
        ["Be brief.", "fourth"],
    ]
    assert all(body["temperature"] == 0.5 for body in server.bodies)
    assert len(json.loads(path.read_text("utf-8"))["messages"]) == 5
    notes = notes_of(talk)
    assert notes.count("nothing was said yet") == 2
    for text in ("'oops' is not key=value", "no command /nonsense", '{"temperature": 0.5}', "/retry  "):
        assert text in notes
    assert "name of a file" in notes


def test_errors_do_not_end_the_dialogue(server, talk):
    server.refusal = (400, {"error": {"message": "too long"}})
    run_dialogue(talk, "first", "second")
    assert notes_of(talk).count("error: too long (HTTP 400)") == 2
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "second"}]


def test_interrupts_quit_only_when_they_follow_one_another(server, talk):
    interrupt = KeyboardInterrupt()
    assert run_dialogue(talk, interrupt, "hello", interrupt, interrupt, "never")[0] == "never"
    assert [body["messages"][0]["content"] for body in server.bodies] == ["hello"]
    assert notes_of(talk).count("Ctrl-C again quits") == 2


def test_an_interrupt_cancels_the_answer_and_keeps_what_came(server, talk, monkeypatch):
    server.is_endless = True
    pieces = []

    class Writer(contextlib.AbstractContextManager):
        def __exit__(self, *_):
            pass

        def add(self, text):
            pieces.append(text)
            if len(pieces) == 10:
                raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_make_writer", Writer)
    left = run_dialogue(talk, "go", "/quit", "never")
    assert left[0] == "never"
    assert server.left.wait(5)
    assert talk.session.turns[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert "stopped" in notes_of(talk)
    pieces.clear()
    assert run_dialogue(talk, "go", KeyboardInterrupt(), "never")[0] == "never"


COMMAND = "import sys; from core.chat import chat; sys.exit(chat(url=sys.argv[1]))"


def test_in_a_real_terminal(server):
    server.is_endless = True
    master, slave = os.openpty()

    def take_terminal():
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        heed_interrupts()

    process = subprocess.Popen(  # noqa: S603  our own interpreter
        [sys.executable, "-c", COMMAND, server.url],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=take_terminal,  # noqa: PLW1509  no thread of ours holds a lock
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(slave)
    try:
        read_until(master, "> ")
        os.write(master, b"hello\n")
        read_until(master, "la la la")
        os.write(master, b"\x03")
        read_until(master, "Ctrl-C again quits")
        assert server.left.wait(5)
        os.write(master, b"\x03")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(terminal, text, timeout=15.0):
    seen = b""
    end = time.monotonic() + timeout
    while text not in seen.decode(errors="replace"):
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
