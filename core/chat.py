"""A chat in the terminal: `python -m core chat`, a client of any server with OpenAI's routes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from cyclopts import Parameter

from core.errors import EXIT_INTERRUPTED, ConfigError, CytheraError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    import httpx
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import SegmentLines

T = TypeVar("T")

API_KEY: Final = "CYTHERA_API_KEY"
DEFAULT_URL: Final = "http://127.0.0.1:2242/v1"
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
CONNECT_TIMEOUT: Final = 5.0
READ_TIMEOUT: Final = 600.0
"""Seconds without a byte.  Servers may be silent while they compute a long prompt."""
POLL_INTERVAL: Final = 0.5
"""Seconds between two looks at a server that is not ready."""
LOST_PHASES: Final = ("draining", "failed", "stopped")
"""Phases of `/readyz` after which a server never becomes ready."""
MAX_ERROR: Final = 500
"""Characters of a server's error that are shown."""
CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What could steer a terminal, if the model says it."""
FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")


# --- the server ------------------------------------------------------------------------------------


class ServerError(CytheraError):
    """The server cannot be reached, refuses, or broke off; the message is for the user.

    :param status: of HTTP; 0 without an answer.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = ""


class _Failure(msgspec.Struct):
    error: _Error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class Chunk(msgspec.Struct):
    """A piece of a streamed answer, as far as a chat needs it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None
    warnings: list[str] = []

    @property
    def text(self) -> str:
        """What it adds to the answer."""
        return "".join(choice.delta.content or "" for choice in self.choices)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, in the last piece."""
        return self.choices[0].finish_reason if self.choices else None


class Progress(msgspec.Struct):
    """How far a server is that takes no requests yet: the body of `/readyz`."""

    phase: str = "starting"
    percent: float = 0
    error: str = ""


class ChatClient:
    """Speaks to one server.

    :param url: where its `/chat/completions` is, such as `http://127.0.0.1:2242/v1`.
    :param api_key: sent as a bearer token unless empty.
    :raises ServerError: the URL is none.
    """

    def __init__(self, url: str = DEFAULT_URL, api_key: str = "") -> None:
        import httpx  # noqa: PLC0415  slow to import, and not needed for --help

        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            is_local = httpx.URL(url).host in LOOPBACK  # what is here needs no proxy
            self._http = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
                trust_env=not is_local,
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ServerError(f"--url {url!r} or the API key cannot be used: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def model_names(self) -> list[str]:
        """Ask for the models that are served, also by a server that is still loading.

        :raises ServerError: it does not say.
        """
        with self._open("GET", f"{self.url}/models") as response:
            _check(response)
            return [model.id for model in _decode(response.read(), _Models).data]

    def progress(self) -> Progress | None:
        """Look how far the server is; `None` if it is ready, or does not tell such things.

        :raises ServerError: it cannot be reached.
        """
        with self._open("GET", f"{self.url.removesuffix('/v1')}/readyz") as response:
            if response.status_code != 503:
                return None
            with contextlib.suppress(ServerError):
                return _decode(response.read(), Progress)
            return Progress()

    def wait_until_ready(self, report: Callable[[Progress], None]) -> None:
        """Wait while the server loads.

        :param report: hears how far it is, again and again.
        :raises ServerError: it cannot be reached, or will never be ready.
        """
        while (progress := self.progress()) is not None:
            if progress.phase in LOST_PHASES:
                reason = f": {progress.error}" if progress.error else ""
                raise ServerError(f"the server at {self.url} is {progress.phase}{reason}", status=503)
            report(progress)
            time.sleep(POLL_INTERVAL)

    def stream(self, body: Mapping[str, Any]) -> Generator[Chunk]:
        """Stream the answer to one chat completion; closing the generator cancels it.

        :raises ServerError: it was refused, or failed half-way.
        """
        content = json.dumps(body).encode()  # escapes what is no Unicode, as terminals can send it
        with self._open("POST", f"{self.url}/chat/completions", content) as response:
            _check(response)
            for data in read_events(response.iter_bytes()):
                if data == b"[DONE]":
                    return
                chunk = _decode(data, Chunk)
                if chunk.error is not None:
                    raise ServerError(chunk.error.message[:MAX_ERROR], status=response.status_code)
                yield chunk
        raise ServerError("the server broke off before the answer was complete")

    @contextlib.contextmanager
    def _open(self, method: str, url: str, content: bytes | None = None) -> Iterator[httpx.Response]:
        import httpx  # noqa: PLC0415  as above

        headers = {"content-type": "application/json"} if content else {}
        try:
            with self._http.stream(method, url, content=content, headers=headers) as response:
                yield response
        except httpx.ConnectError as error:
            raise ServerError(
                f"no server answers at {self.url}: is it running? "
                "start one with python -m core serve MODEL, or name another with --url"
            ) from error
        except httpx.UnsupportedProtocol as error:
            raise ServerError(f"--url {self.url} must begin with http:// or https://") from error
        except httpx.TimeoutException as error:
            raise ServerError(f"the server at {self.url} was silent for too long") from error
        except httpx.HTTPError as error:
            raise ServerError(f"the connection to {self.url} broke off: {error}") from error


def read_events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the data of server-sent events, which OpenAI's API sends in one line each.

    Lines end in line feeds only: `str.splitlines` would also cut at characters that JSON may hold.

    :param chunks: the body, cut anywhere.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ServerError(f"the server does not speak OpenAI's API: {error}") from error


def _check(response: httpx.Response) -> None:
    """Raise what the server says is wrong."""
    if response.status_code == 200:
        return
    text = response.read()
    try:
        message = msgspec.json.decode(text, type=_Failure).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        message = text.decode(errors="replace").strip() or response.reason_phrase
    message = f"{message[:MAX_ERROR]} (HTTP {response.status_code})"
    if response.status_code == 401:
        message += f"; give the server's key with --api-key or {API_KEY}"
    raise ServerError(message, status=response.status_code)


# --- the conversation ------------------------------------------------------------------------------


@dataclass(slots=True)
class Session:
    """What was said, and the settings that the next answer is asked for with."""

    model: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the request, such as `temperature`; what is missing is the server's choice."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """Messages of user and assistant in turn; the last may be a question without an answer."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system prompt first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def ask(self, text: str) -> None:
        """Add a question; one before it that got no answer is forgotten, as roles take turns."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to the last question."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back_answer(self) -> bool:
        """Forget the last answer, to ask for another one; whether there is a question then."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was any."""
        had_question = self.take_back_answer()
        if had_question:
            self.turns.pop()
        return had_question

    def set(self, assignment: str) -> None:
        """Take `key=value`, the value as JSON if it is that and as text otherwise; none unsets.

        :raises ValueError: it is no assignment.
        """
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not key or not equals:
            raise ValueError(f"{assignment!r} is not key=value, such as temperature=0.7")
        if not text:
            self.settings.pop(key, None)
            return
        try:
            self.settings[key] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            self.settings[key] = text

    def body(self) -> dict[str, Any]:
        """Make the request for the next answer."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **self.settings, "messages": self.messages, **stream}

    def save(self, path: Path) -> None:
        """Write the conversation into a new file: JSON if it is called `.json`, else Markdown.

        :raises OSError: the file exists, or cannot be written.
        """
        if path.suffix == ".json":
            saved = {"model": self.model, "settings": self.settings, "messages": self.messages}
            text = json.dumps(saved, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"## {turn['role']}\n\n{turn['content']}\n" for turn in self.messages)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)


@dataclass(slots=True)
class Answer:
    """What has come of one answer, and how fast."""

    text: str = ""
    ending: str = ""
    """`stop` or `length` from the server; `interrupted` if the user did not want more."""
    num_tokens: int = 0
    """As the server counted; 0 if it did not."""
    warnings: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0

    def add(self, chunk: Chunk) -> None:
        """Take the next piece."""
        if chunk.text:
            self.text += chunk.text
            self.last = time.monotonic()
            if self.first is None:
                self.first = self.last
        self.ending = chunk.finish_reason or self.ending
        self.num_tokens = chunk.usage.completion_tokens if chunk.usage else self.num_tokens
        self.warnings += chunk.warnings

    def describe(self) -> str:
        """Say what is known: ending, tokens, tokens per second after the first, time to the first."""
        facts = {"length": ["max_tokens reached"], "interrupted": ["stopped"]}.get(self.ending, [])
        if self.num_tokens:
            facts.append(f"{self.num_tokens} token{'s' if self.num_tokens > 1 else ''}")
        if self.first is not None:
            if self.num_tokens > 1 and self.last > self.first:
                facts.append(f"{(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s")
            facts.append(f"first after {self.first - self.begin:.2f} s")
        return " · ".join(facts)


# --- the terminal ----------------------------------------------------------------------------------


class PlainWriter:
    """Writes text as it comes, for pipes and files."""

    def __init__(self) -> None:
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._text and not self._text.endswith("\n"):
            self.add("\n")

    def add(self, text: str) -> None:
        """Write more of the answer; `text` may be empty."""
        if not text:
            return
        sys.stdout.write(text)
        sys.stdout.flush()
        self._text = text


class MarkdownWriter:
    """Renders Markdown as it comes: finished blocks for good, the last one again with every piece."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live  # noqa: PLC0415  not needed for --help

        self._console = console
        self._text = ""
        self._live = Live(self, console=console, transient=True, refresh_per_second=12)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        text, self._text = self._text, ""
        self._live.stop()
        self._print(text)

    def __rich_console__(self, console: Console, _options: ConsoleOptions) -> RenderResult:
        """Show the end of the last block: a terminal cannot redraw more than it shows."""
        yield self._render(self._text, max_lines=console.height - 1)

    def add(self, text: str) -> None:
        """Render more of the answer."""
        finished, self._text = split_finished(self._text + CONTROL_CHARACTERS.sub("", text))
        self._print(finished)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(self._render(text))
            self._console.print()

    def _render(self, text: str, max_lines: int = 0) -> SegmentLines:
        """Render blocks without the blank lines that some kinds have around them.

        :param max_lines: keep that many from the end; 0 keeps all.
        """
        from rich.markdown import Markdown  # noqa: PLC0415  as above
        from rich.segment import SegmentLines  # noqa: PLC0415

        lines = self._console.render_lines(Markdown(text), pad=False)
        filled = [i for i, line in enumerate(lines) if any(part.text.strip() for part in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        return SegmentLines(lines[-max_lines:], new_lines=True)


def split_finished(text: str) -> tuple[str, str]:
    """Cut Markdown before its last block: what comes may still change that one, and no other.

    A block ends where a line without indent follows a blank one, outside of fenced code.
    """
    end = position = 0
    fence = ""
    is_after_blank = False
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if fence:
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                fence = ""
        else:
            if is_after_blank and stripped and not line[0].isspace():
                end = position
            opening = FENCE.match(line)
            fence = opening[1] if opening else ""
        is_after_blank = not stripped
        position += len(line)
    return text[:end], text[end:]


class Chat:
    """Asks the server and shows what it answers.

    :param output: where answers go.
    :param notes: where everything else goes.
    """

    def __init__(self, client: ChatClient, session: Session, output: Console, notes: Console) -> None:
        self.client = client
        self.session = session
        self._output = output
        self._notes = notes

    def answer(self) -> bool:
        """Get the answer to the last question; whether it was not interrupted.

        Ctrl-C cancels it.  What has come until then, or until the server failed, is kept.

        :raises ServerError: the server did not answer, or not to the end.
        """
        answer = Answer()
        try:
            self._wait()
            answer.begin = time.monotonic()
            stream = contextlib.closing(self.client.stream(self.session.body()))
            with self._make_writer() as writer, stream as chunks:
                for chunk in chunks:
                    answer.add(chunk)
                    writer.add(chunk.text)
        except KeyboardInterrupt:
            answer.ending = "interrupted"
        finally:
            if answer.text:
                self.session.answer(answer.text)
        for warning in answer.warnings:
            self.note(warning)
        if self._notes.is_terminal:
            self.note(answer.describe())
        return answer.ending != "interrupted"

    def note(self, text: str) -> None:
        """Say something that is no part of the answer."""
        self._notes.print(CONTROL_CHARACTERS.sub("", text), style="dim")

    def _make_writer(self) -> PlainWriter | MarkdownWriter:
        return MarkdownWriter(self._output) if self._output.is_terminal else PlainWriter()

    def _wait(self) -> None:
        status = self._notes.status("")

        def report(progress: Progress) -> None:
            detail = progress.error or f"{progress.percent:.0f} %"
            status.update(f"the server is {progress.phase}: {detail}")
            status.start()

        try:
            self.client.wait_until_ready(report)
        finally:
            status.stop()


class Dialogue:
    """The loop that reads questions and commands from a terminal."""

    def __init__(self, chat: Chat, read: Callable[[str], str] = input) -> None:
        self._chat = chat
        self._session = chat.session
        self._read = read
        self._num_interrupts = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/system": self._system,
            "/set": self._set,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Read until `/quit`, the end of the input, or Ctrl-C twice in a row."""
        self._chat.note(
            f"{self._session.model} at {self._chat.client.url}; /help says what else there is"
        )
        while self._num_interrupts < 2:
            try:
                line = self._read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._interrupt()
                continue
            self._num_interrupts = 0
            if line == "/quit":
                return
            if line:
                self._take(line)

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/"):
                self._chat.note(f"there is no command {name}; /help lists them")
            else:
                self._session.ask(line)
                self._answer()
        except (CytheraError, OSError, ValueError) as error:
            self._chat.note(f"error: {error}")

    def _answer(self) -> None:
        if not self._chat.answer():
            self._interrupt()

    def _interrupt(self) -> None:
        self._num_interrupts += 1
        if self._num_interrupts < 2:
            self._chat.note("Ctrl-C again quits")

    def _new(self, _: str) -> None:
        """Begin anew; the system prompt and the settings stay."""
        self._session.turns.clear()

    def _system(self, text: str) -> None:
        """TEXT is the system prompt from now on; without TEXT there is none."""
        self._session.system = text

    def _set(self, assignment: str) -> None:
        """KEY=VALUE is sent along, such as temperature=0.7; KEY= is not; alone shows what is."""
        if assignment:
            self._session.set(assignment)
        else:
            self._chat.note(json.dumps(self._session.settings, ensure_ascii=False))

    def _undo(self, _: str) -> None:
        """Forget the last question and its answer."""
        if not self._session.undo():
            self._chat.note("nothing was said yet")

    def _retry(self, _: str) -> None:
        """Forget the last answer and ask for another one."""
        if self._session.take_back_answer():
            self._answer()
        else:
            self._chat.note("nothing was said yet")

    def _save(self, name: str) -> None:
        """Write the conversation into the new FILE: JSON if it is called .json, else Markdown."""
        if not name:
            raise ValueError("/save needs the name of a file")
        self._session.save(Path(name).expanduser())
        self._chat.note(f"saved as {name}")

    def _help(self, _: str) -> None:
        """Show this."""
        for name, command in self._commands.items():
            self._chat.note(f"{name:8} {command.__doc__}")
        self._chat.note("/quit    Leave; so do Ctrl-D, and Ctrl-C twice.  Once, it stops an answer.")


# --- the command -----------------------------------------------------------------------------------


def run(
    client: ChatClient,
    prompt: str | None,
    *,
    model: str | None = None,
    system: str = "",
    settings: Mapping[str, Any],
) -> int:
    """Answer one prompt, or talk until the user leaves.

    :param prompt: `None` takes what standard input holds, or talks if it is a terminal.
    :param model: `None` takes the first that the server names.
    :param settings: fields of the request.
    :return: the exit code.
    :raises ConfigError: there is nothing to answer.
    :raises ServerError: the server does not answer; while talking, that is only shown.
    """
    from rich.console import Console  # noqa: PLC0415  not needed for --help

    is_dialogue = prompt is None and sys.stdin.isatty()
    if prompt is None and not is_dialogue:
        prompt = sys.stdin.buffer.read().decode(errors="replace")
    if prompt is not None and not prompt.strip():
        raise ConfigError("there is nothing to answer: give a PROMPT, or text on standard input")
    session = Session(model or _first_model(client), system, dict(settings))
    output = Console(markup=False, highlight=False, emoji=False)
    notes = Console(stderr=True, markup=False, highlight=False, emoji=False)
    chat = Chat(client, session, output, notes)
    if prompt is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415  gives input() editing and history
        Dialogue(chat).run()
        return 0
    session.ask(prompt)
    return 0 if chat.answer() else EXIT_INTERRUPTED


def _first_model(client: ChatClient) -> str:
    names = client.model_names()
    if not names:
        raise ServerError(f"the server at {client.url} names no model; name one with --model")
    return names[0]


def chat(
    prompt: str | None = None,
    /,
    *,
    url: Annotated[str, Parameter(help="Server to talk to, with the /v1.")] = DEFAULT_URL,
    model: Annotated[
        str | None, Parameter(help="Model to ask for; unset: the first that the server names.")
    ] = None,
    system: Annotated[str, Parameter(help="System prompt.", show_default=False)] = "",
    api_key: Annotated[
        str | None, Parameter(help=f"Key that the server wants; unset: {API_KEY}, if that is set.")
    ] = None,
    temperature: Annotated[float | None, Parameter(help="0 always takes the likeliest token.")] = None,
    top_p: Annotated[float | None, Parameter(help="Share of probability to draw from.")] = None,
    max_tokens: Annotated[int | None, Parameter(help="Most tokens of one answer.")] = None,
    seed: Annotated[int | None, Parameter(help="Draws the same answer again.")] = None,
) -> int:
    """Talk to a model that a server serves.

    With a prompt, or with text on standard input, writes the one answer and ends.

    :param prompt: Question to answer; without it, and at a terminal, the conversation begins.
    """
    if api_key is None:
        api_key = os.environ.get(API_KEY, "").partition(",")[0]  # of several, any one opens the server
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    settings = {name: value for name, value in given.items() if value is not None}
    with ChatClient(url, api_key) as client:
        return run(client, prompt, model=model, system=system, settings=settings)
