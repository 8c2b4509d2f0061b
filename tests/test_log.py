from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from core.log import _LibraryHandler, configure_for_library, configure_logging


@pytest.fixture(autouse=True)
def _restore():
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _LibraryHandler)]:
        root.removeHandler(handler)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def log_lines(level, format_, stream=None):
    stream = stream or io.StringIO()
    configure_logging(level, format_, stream)
    log = structlog.get_logger("core.somewhere")
    log.debug("deep", n=1)
    log.info("seen", n=2, what=["x"])
    log.error("bad", n=3)
    logging.getLogger("somebody").info("chatter")
    logging.getLogger("somebody").warning("careful %d", 4)
    return stream.getvalue()


def test_json_is_one_object_a_line():
    lines = [json.loads(line) for line in log_lines("info", "json").splitlines()]
    assert [line["event"] for line in lines] == ["seen", "bad", "careful 4"]
    assert [line["level"] for line in lines] == ["info", "error", "warning"]
    assert [line["logger"] for line in lines] == ["core.somewhere", "core.somewhere", "somebody"]
    assert lines[0]["what"] == ["x"]
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_an_exception_stays_on_its_line_and_shows_no_local_variables():
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    prompt = ["what", "a", "client", "sent"]
    try:
        int(prompt[0][:0])
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("somebody").exception("failed too")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "ValueError: invalid literal" in json.loads(line)["exception"]
        assert "client', 'sent" not in line


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("debug", ["deep", "seen", "bad", "careful 4"]),
        ("warning", ["bad", "careful 4"]),
        ("error", ["bad"]),
        ("critical", []),
    ],
)
def test_level(level, events):
    assert [json.loads(line)["event"] for line in log_lines(level, "json").splitlines()] == events


def test_auto_is_pretty_on_a_terminal_and_json_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in log_lines("info", "auto", Terminal())
    assert json.loads(log_lines("info", "auto").splitlines()[0])


@pytest.mark.parametrize(
    ("variable", "value", "stream"),
    [("NO_COLOR", "1", Terminal), ("TERM", "dumb", Terminal), ("TERM", "xterm", io.StringIO)],
)
def test_colours_only_where_they_are_wanted(monkeypatch, variable, value, stream):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    text = log_lines("info", "pretty", stream())
    assert "\x1b[" not in text
    assert "seen" in text
    assert "n=2" in text
    assert "core.somewhere" in text


def test_pretty_values_cannot_start_a_line_of_their_own():
    stream = io.StringIO()
    configure_logging("info", "pretty", stream)
    structlog.get_logger().info("refused", request_id="x\n11-24 [error] forged\x1b[2J")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_pretty_exceptions_come_after_the_line():
    stream = io.StringIO()
    configure_logging("info", "pretty", stream)
    try:
        {}["gone"]
    except KeyError:
        structlog.get_logger().exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert rest[-1] == "KeyError: 'gone'"


def test_the_newest_call_counts_for_loggers_made_before():
    first, second = io.StringIO(), io.StringIO()
    log = structlog.get_logger("early")
    configure_logging("info", "json", first)
    log.info("one")
    configure_logging("info", "json", second)
    log.info("two")
    logging.getLogger("somebody").warning("three")
    assert [json.loads(line)["event"] for line in first.getvalue().splitlines()] == ["one"]
    assert [json.loads(line)["event"] for line in second.getvalue().splitlines()] == ["two", "three"]


def test_handlers_of_others_are_let_be():
    mine = logging.NullHandler()
    logging.getLogger().addHandler(mine)
    try:
        configure_logging("info", "json", io.StringIO())
        configure_logging("info", "json", io.StringIO())
        handlers = logging.getLogger().handlers
        assert mine in handlers
        assert sum(isinstance(handler, _LibraryHandler) for handler in handlers) == 1
    finally:
        logging.getLogger().removeHandler(mine)


def test_context_of_the_process_is_in_every_line():
    with structlog.contextvars.bound_contextvars(rank=3):
        lines = log_lines("info", "json").splitlines()
    assert {json.loads(line)["rank"] for line in lines} == {3}


def test_standard_error_is_looked_up_when_a_line_is_written(capsys):
    configure_logging("info", "json")
    with capsys.disabled():
        pass  # swaps sys.stderr back and forth
    structlog.get_logger().info("here")
    logging.getLogger("somebody").warning("too")
    captured = capsys.readouterr()
    assert [json.loads(line)["event"] for line in captured.err.splitlines()] == ["here", "too"]
    assert captured.out == ""


def test_a_program_that_has_set_up_structlog_keeps_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr("core.log.configure_logging", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(structlog, "is_configured", lambda: True)
    configure_for_library("info", "auto")
    assert calls == []
    monkeypatch.setattr(structlog, "is_configured", lambda: False)
    configure_for_library("debug", "json")
    assert calls == [("debug", "json")]
