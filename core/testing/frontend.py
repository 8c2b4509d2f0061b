"""Conformance of front ends and servers: what clients are offered, and what carries it to them.

Subclass `FrontendConformance` in a test module and give it the descriptor::

    class TestAcmeApi(FrontendConformance):
        entry = acme_api.ENTRY
        plugin_settings = {"frontend.acme": AcmeSettings()}

or `ServerConformance`, whose tests open a port of this machine and speak HTTP to it.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import anyio
import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from core.config import EngineConfig
from core.errors import PluginError, first_cause
from core.interfaces import Frontend, Server, missing_members
from core.status import Phase, Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from core.events import Event, Subscription
    from core.registry import FrontendEntry, ServerEntry

KEY: Final = "sk-of-the-test"
PATIENCE: Final = 30.0
"""Seconds after which a test gives up; nothing should come near it."""
SECRET: Final = "what nobody outside may read"  # noqa: S105  no password
HTTP_METHODS: Final = frozenset({"get", "put", "post", "delete", "options", "patch", "trace"})


class StandInService(SimpleNamespace):
    """What front ends and servers may ask of a service before the first request.

    :param settings: bound settings by plugin name.
    :param config: settings of the engine, over the usual ones.
    """

    def __init__(self, settings: Mapping[str, Any], **config: Any) -> None:
        super().__init__(
            settings=dict(settings),
            config=EngineConfig(model="tiny", **config),
            status=Status(Phase.READY),
            model_names=("tiny",),
            created=1_700_000_000,
            num_open=0,
            num_running=0,
            num_waiting=0,
            seconds_without_progress=0.0,
            subscriptions=[],
        )

    def subscribe(self, subscription: Subscription) -> None:
        """Note who wants events."""
        self.subscriptions.append(subscription)

    def want(self, *_types: type[Event]) -> None:
        """Do nothing: no events come."""


class FrontendConformance:
    """The tests; subclass it and set `entry`."""

    entry: ClassVar[FrontendEntry | None] = None
    plugin_settings: ClassVar[Mapping[str, Any]] = {}
    """Bound settings by plugin name: what `service.settings` holds."""
    undocumented: ClassVar[frozenset[str]] = frozenset()
    """Paths that are left out of `openapi` on purpose, such as those of pages and their files."""

    # --- what subclasses may change ----------------------------------------------------------------

    def make_service(self) -> Any:
        """Make what the factory is given."""
        return StandInService(self.plugin_settings)

    def make_frontend(self) -> Frontend:
        """Build the front end."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry")
        frontend = self.entry.factory(self.make_service())
        assert isinstance(frontend, Frontend), f"the factory returns {frontend!r}, no Frontend"
        return frontend

    def operations(self, frontend: Frontend) -> list[tuple[str, str]]:
        """List method and path of everything that can be asked, as OpenAPI spells them.

        Of Starlette's routes; override it for another server's.
        """
        return [
            (method.lower(), re.sub(r":\w+}", "}", route.path))
            for route in frontend.routes
            for method in sorted(route.methods or ())
            if method != "HEAD"
        ]

    # --- the laws ----------------------------------------------------------------------------------

    def test_routes_are_distinct(self) -> None:
        """Each path begins with a slash, and no method of it is offered twice."""
        operations = self.operations(self.make_frontend())
        assert operations, "there are no routes"
        odd = [path for _, path in operations if not path.startswith("/")]
        assert not odd, f"paths without a slash at the start: {odd}"
        twice = [operation for operation, count in Counter(operations).items() if count > 1]
        assert not twice, f"offered twice: {twice}"

    def test_open_paths_are_paths(self) -> None:
        """Of a route each, without parameters: they are compared character for character."""
        frontend = self.make_frontend()
        paths = {path for _, path in self.operations(frontend)}
        odd = sorted(path for path in frontend.open_paths if path not in paths or "{" in path)
        assert not odd, f"open_paths holds {odd}, which are no plain paths of routes"

    def test_every_route_is_documented(self) -> None:
        """And nothing else, with a summary and the answer to a good request."""
        frontend = self.make_frontend()
        documented = dict(documented_operations(frontend.openapi))
        offered = {item for item in self.operations(frontend) if item[1] not in self.undocumented}
        missing, extra = sorted(offered - documented.keys()), sorted(documented.keys() - offered)
        assert not missing, f"openapi does not describe {missing}"
        assert not extra, f"openapi describes {extra}, which are not offered"
        for operation, details in documented.items():
            what = " ".join(operation)
            assert details.get("summary"), f"{what} has no summary"
            good = [status for status in details.get("responses", {}) if status.startswith("2")]
            assert good, f"{what} describes no good answer"

    def test_references_lead_somewhere(self) -> None:
        """Within the front end's own components."""
        openapi = self.make_frontend().openapi
        for reference in find_references(openapi):
            found: Any = openapi
            for part in reference.removeprefix("#/").split("/"):
                found = found.get(part) if isinstance(found, dict) else None
            assert found is not None, f"{reference} leads nowhere"

    def test_the_description_is_plain(self) -> None:
        """It is sent as JSON, and is the same each time."""
        texts = [json.dumps(self.make_frontend().openapi, sort_keys=True) for _ in range(2)]
        assert texts[0] == texts[1], "two calls give two descriptions"


class ServerConformance:
    """The tests; subclass it and set `entry`."""

    entry: ClassVar[ServerEntry | None] = None
    plugin_settings: ClassVar[Mapping[str, Any]] = {}
    """Bound settings by plugin name: what `service.settings` holds."""

    # --- what subclasses may change ----------------------------------------------------------------

    def make_routes(
        self, handlers: Mapping[str, Callable[[Request], Awaitable[Response]]]
    ) -> list[Any]:
        """Make routes as the server takes them; by default those of Starlette.

        :param handlers: by path.
        """
        return [Route(path, handler) for path, handler in handlers.items()]

    def make_server(self, frontends: Sequence[Frontend], **config: Any) -> Server:
        """Build the server."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry")
        server: Server = self.entry.factory(StandInService(self.plugin_settings, **config), frontends)
        return server

    # --- machinery -----------------------------------------------------------------------------------

    def run(
        self,
        law: Callable[[_Offer, _Client], Awaitable[None]],
        *,
        grace: float = PATIENCE,
        **config: Any,
    ) -> None:
        """Serve the usual front end and try a law on it.

        :param grace: seconds that open requests get once the server is stopped.
        :param config: settings of the engine.
        """

        async def attempt() -> None:
            offer = _Offer()
            frontend = Frontend(
                routes=self.make_routes(offer.handlers()),
                open_paths=frozenset({"/open"}),
                openapi={"paths": {"/closed": {"get": {"responses": {"200": {"description": "a"}}}}}},
            )
            server = self.make_server([frontend], **config)
            with anyio.fail_after(PATIENCE):
                async with serve_on_port(server, grace=grace) as client:
                    await law(offer, client)

        try:
            anyio.run(attempt)
        except BaseExceptionGroup as group:  # what went wrong, without the tasks that it was in
            raise first_cause(group) from None

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The service calls what the Protocol names, as the Protocol says."""
        problems = missing_members(self.make_server([]), Server)
        assert not problems, "; ".join(problems)

    def test_routes_are_served(self) -> None:
        """What is there, what is not, and what is there for another method."""

        async def law(_offer: _Offer, client: _Client) -> None:
            for path in ("/open", "/closed"):
                answer = await client.get(path)
                assert (answer.status_code, answer.text) == (200, path), f"{path}: {answer!r}"
            for method, path, status in (("GET", "/nothing", 404), ("POST", "/open", 405)):
                answer = await client.http.request(method, path)
                assert answer.status_code == status, f"{method} {path}: {answer!r}, not {status}"

        self.run(law)

    def test_streams_come_bit_by_bit(self) -> None:
        """What a route has sent arrives before it sends the rest."""

        async def law(offer: _Offer, client: _Client) -> None:
            async with client.http.stream("GET", "/stream") as answer:
                parts = answer.aiter_text()
                assert await anext(parts) == "first", "the stream begins with something else"
                offer.release.set()
                assert "".join([part async for part in parts]) == "last", "the stream does not end"

        self.run(law)

    def test_keys_are_asked_for(self) -> None:
        """Of every route but the open ones, once there is a key; of unknown paths as well."""

        async def law(_offer: _Offer, client: _Client) -> None:
            wrong = {"authorization": f"Bearer {KEY}x"}
            right = {"authorization": f"Bearer {KEY}"}
            for path, headers, status in (
                ("/open", {}, 200),
                ("/closed", {}, 401),
                ("/closed", wrong, 401),
                ("/closed", {"authorization": f"Basic {KEY}"}, 401),
                ("/closed", right, 200),
                ("/open/", {}, 401),
                ("/open/../closed", {}, 401),
                ("/nothing", {}, 401),
                ("/openapi.json", {}, 401),
            ):
                answer = await client.get(path, headers)
                assert answer.status_code == status, f"{path} with {headers}: {answer!r}, not {status}"

        self.run(law, api_key=(KEY,))

    def test_the_description_is_served(self) -> None:
        """What front ends say of themselves is at `/openapi.json`."""

        async def law(_offer: _Offer, client: _Client) -> None:
            answer = await client.get("/openapi.json")
            document = answer.json()
            assert "openapi" in document, f"no OpenAPI document: {list(document)}"
            described = document["paths"].get("/closed", {}).get("get", {}).get("responses", {})
            assert described.get("200") == {"description": "a"}, f"/closed is described as {described}"

        self.run(law)

    def test_errors_stay_inside(self) -> None:
        """A route that raises is a 500 without the error's text, and nobody else's problem."""

        async def law(_offer: _Offer, client: _Client) -> None:
            answer = await client.get("/broken")
            assert answer.status_code == 500, f"an error in a route is answered with {answer!r}"
            assert SECRET not in answer.text, "the text of an error is sent to the client"
            assert (await client.get("/open")).status_code == 200, "after an error nothing is served"

        self.run(law)

    def test_a_client_that_leaves_is_noticed(self) -> None:
        """A stream that nobody reads any more ends."""

        async def law(offer: _Offer, client: _Client) -> None:
            async with client.http.stream("GET", "/endless") as answer:
                await anext(answer.aiter_text())
            await client.http.aclose()
            await offer.is_left.wait()

        self.run(law)

    def test_stopping_finishes_what_is_open(self) -> None:
        """And nothing else: `serve` returns then, and the port is closed."""

        async def law(offer: _Offer, client: _Client) -> None:
            answers: list[httpx.Response] = []

            async def ask() -> None:
                answers.append(await client.get("/slow"))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await offer.is_begun.wait()
                client.stop.set()
                await anyio.sleep(0.05)
                offer.release.set()
            await client.is_stopped.wait()
            assert [answer.text for answer in answers] == ["/slow"], "an open request was cut off"
            with pytest.raises(httpx.TransportError):
                await client.get("/open")

        self.run(law)

    def test_stopping_does_not_wait_for_ever(self) -> None:
        """A request that does not end within the grace is cut off."""

        async def law(offer: _Offer, client: _Client) -> None:

            async def ask() -> None:
                with contextlib.suppress(httpx.TransportError):
                    await client.get("/slow")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await offer.is_begun.wait()
                client.stop.set()
                await client.is_stopped.wait()

        self.run(law, grace=0.1)

    def test_an_idle_server_stops(self) -> None:
        """Whether it has served something or not."""

        async def law(_offer: _Offer, client: _Client) -> None:
            client.stop.set()
            await client.is_stopped.wait()

        self.run(law)

    def test_contradictions_are_refused(self) -> None:
        """Two front ends that offer the same, and open paths that are none."""
        for frontends in (
            [self._lone("/a"), self._lone("/a")],
            [self._lone("/a", open_paths=frozenset({"/b"}))],
        ):
            with pytest.raises(PluginError):
                self.make_server(frontends)

    def _lone(self, path: str, **fields: Any) -> Frontend:
        return Frontend(routes=self.make_routes({path: _Offer().answer}), **fields)


class _Offer:
    """Routes that behave as their paths say."""

    def __init__(self) -> None:
        self.release = anyio.Event()
        self.is_begun = anyio.Event()
        self.is_left = anyio.Event()

    def handlers(self) -> dict[str, Callable[[Request], Awaitable[Response]]]:
        return {
            "/open": self.answer,
            "/closed": self.answer,
            "/slow": self.answer_slowly,
            "/stream": self.stream,
            "/endless": self.stream_without_end,
            "/broken": self.fail,
        }

    async def answer(self, request: Request) -> Response:
        return PlainTextResponse(request.url.path)

    async def answer_slowly(self, request: Request) -> Response:
        self.is_begun.set()
        await self.release.wait()
        return PlainTextResponse(request.url.path)

    async def stream(self, _request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield "first"
            await self.release.wait()
            yield "last"

        return StreamingResponse(parts())

    async def stream_without_end(self, _request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            try:
                while True:
                    yield "again"
                    await anyio.sleep(0.01)
            finally:
                self.is_left.set()

        return StreamingResponse(parts())

    async def fail(self, _request: Request) -> Response:
        raise RuntimeError(SECRET)


class _Client:
    """A client of a running server, and the means to stop it."""

    def __init__(self, port: int) -> None:
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False
        )
        self.stop = anyio.Event()
        self.is_stopped = anyio.Event()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        # httpx would tidy up the path before it is sent.
        url = self.http.base_url.copy_with(raw_path=path.encode())
        return await self.http.get(url, headers=dict(headers or {}))


@contextlib.asynccontextmanager
async def serve_on_port(server: Server, *, grace: float) -> AsyncIterator[_Client]:
    """Serve on a free port of this machine; stop at the end."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    client = _Client(sock.getsockname()[1])

    async def serve() -> None:
        await server.serve(sock, client.stop, grace)
        sock.close()
        client.is_stopped.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        async with client.http:
            yield client
        client.stop.set()


# --- descriptions ------------------------------------------------------------------------------------


def documented_operations(openapi: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """List what a description describes: (method, path) and the details."""
    for path, item in openapi.get("paths", {}).items():
        for method, details in item.items():
            if method in HTTP_METHODS:
                yield (method, path), details


def find_references(value: Any) -> Iterator[str]:
    """Find every `$ref` in a description."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from find_references(item)
    elif isinstance(value, list):
        for item in value:
            yield from find_references(item)
