"""The kit for front ends and servers catches the mistakes that are made in them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import anyio
import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from core.errors import PluginError
from core.interfaces import Frontend
from core.registry import FrontendEntry, ServerEntry
from core.testing import frontend as kit_module
from core.testing.frontend import FrontendConformance, ServerConformance, StandInService
from plugins.server import http
from plugins.server.http.app import HttpServer

# --- front ends ------------------------------------------------------------------------------------


async def answer(_request):
    return PlainTextResponse("fine")


SCHEMAS = {"schemas": {"A": {"type": "object"}}}
GOOD = {"200": {"description": "fine", "content": {"x": {"$ref": "#/components/schemas/A"}}}}
OPENAPI = {"paths": {"/a/{id}": {"get": {"summary": "A", "responses": GOOD}}}, "components": SCHEMAS}
COUNTER = itertools.count()


def describe(**changes):
    return {"paths": {"/a/{id}": {"get": OPENAPI["paths"]["/a/{id}"]["get"] | changes}}} | {
        "components": SCHEMAS
    }


def make_frontend(**changes):
    routes = [Route("/a/{id:path}", answer), Route("/page", answer)]
    return Frontend(
        **{"routes": routes, "open_paths": frozenset({"/page"}), "openapi": OPENAPI} | changes
    )


class FrontendKit(FrontendConformance):
    __test__ = False
    undocumented = frozenset({"/page"})

    def __init__(self, make=make_frontend):
        self.entry = FrontendEntry(name="x", factory=lambda service: make())


ROUTES = "test_routes_are_distinct"
OPEN = "test_open_paths_are_paths"
DOCUMENTED = "test_every_route_is_documented"
REFERENCES = "test_references_lead_somewhere"
PLAIN = "test_the_description_is_plain"


@pytest.mark.parametrize(
    ("changes", "law", "message"),
    [
        ({"routes": []}, ROUTES, "there are no routes"),
        ({"routes": [Route("/a", answer), Route("/a", answer)]}, ROUTES, "offered twice"),
        ({"open_paths": frozenset({"/b"})}, OPEN, "'/b'"),
        ({"open_paths": frozenset({"/a/{id}"})}, OPEN, "no plain paths"),
        ({"openapi": {}}, DOCUMENTED, "does not describe .*a/{id}"),
        ({"routes": [Route("/page", answer)]}, DOCUMENTED, "which are not offered"),
        ({"openapi": describe(summary="")}, DOCUMENTED, "no summary"),
        ({"openapi": describe(responses={"400": {}})}, DOCUMENTED, "no good answer"),
        ({"openapi": OPENAPI | {"components": {}}}, REFERENCES, "leads nowhere"),
    ],
)
def test_a_wrong_front_end_is_caught(changes, law, message):
    with pytest.raises(AssertionError, match=message):
        getattr(FrontendKit(lambda: make_frontend(**changes)), law)()


def test_a_description_that_changes_is_caught():
    kit = FrontendKit(lambda: make_frontend(openapi={"info": next(COUNTER)}))
    with pytest.raises(AssertionError, match="two descriptions"):
        getattr(kit, PLAIN)()


def test_what_is_no_front_end_is_caught():
    with pytest.raises(AssertionError, match="no Frontend"):
        FrontendKit(lambda: [Route("/a", answer)]).make_frontend()


@pytest.mark.parametrize("law", [ROUTES, OPEN, DOCUMENTED, REFERENCES, PLAIN])
def test_a_right_front_end_passes(law):
    getattr(FrontendKit(), law)()


# --- servers ---------------------------------------------------------------------------------------


def make_right(service, frontends):
    return HttpServer.of(service, frontends)


def forget_keys(service, frontends):
    service.config = SimpleNamespace(api_key=())
    return make_right(service, frontends)


def open_everything(service, frontends):
    paths = [route.path for part in frontends for route in part.routes]
    return make_right(service, [replace(part, open_paths=frozenset(paths)) for part in frontends])


def drop_descriptions(service, frontends):
    return make_right(service, [replace(part, openapi={}) for part in frontends])


def pass_over_contradictions(service, frontends):
    try:
        return make_right(service, frontends)
    except PluginError:
        return make_right(service, [])


def change_routes(change):
    """Make a server that does something else with what a route does."""

    def make(service, frontends):
        def wrap(route):
            async def changed(request):
                return await change(route.endpoint, request)

            return Route(route.path, changed)

        wrapped = [replace(part, routes=[wrap(r) for r in part.routes]) for part in frontends]
        return make_right(service, wrapped)

    return make


async def tell_errors(endpoint, request):
    try:
        return await endpoint(request)
    except Exception as error:  # noqa: BLE001
        return PlainTextResponse(str(error), 500)


async def hide_errors(endpoint, request):
    try:
        return await endpoint(request)
    except Exception:  # noqa: BLE001
        return PlainTextResponse("fine")


async def collect_streams(endpoint, request):
    response = await endpoint(request)
    if not hasattr(response, "body_iterator"):
        return response
    return Response(b"".join([part.encode() async for part in response.body_iterator]))


def change_stop(change):
    """Make a server that stops otherwise."""

    class Server:
        def __init__(self, service, frontends):
            self.right = make_right(service, frontends)

        async def serve(self, sock, stop, grace, /):
            await change(self.right, sock, stop, grace)

    return Server


async def cut_off(server, sock, stop, _grace):
    await server.serve(sock, stop, 0.0)


async def never_stop(server, sock, _stop, grace):
    await server.serve(sock, anyio.Event(), grace)


async def wait_for_ever(server, sock, stop, _grace):
    await server.serve(sock, stop, 3600.0)


class ServerKit(ServerConformance):
    __test__ = False
    plugin_settings = {http.NAME: http.HttpSettings()}  # noqa: RUF012

    def __init__(self, make=make_right):
        self.entry = ServerEntry(name="x", factory=make)


SERVED = "test_routes_are_served"
STREAMS = "test_streams_come_bit_by_bit"
KEYS = "test_keys_are_asked_for"
DESCRIPTION = "test_the_description_is_served"
ERRORS = "test_errors_stay_inside"
FINISHES = "test_stopping_finishes_what_is_open"
GRACE = "test_stopping_does_not_wait_for_ever"
IDLE = "test_an_idle_server_stops"
REFUSES = "test_contradictions_are_refused"


@pytest.mark.parametrize(
    ("make", "law", "message"),
    [
        (forget_keys, KEYS, "/closed .*not 401"),
        (open_everything, KEYS, "/closed .*not 401"),
        (drop_descriptions, DESCRIPTION, "/closed is described as"),
        (change_routes(tell_errors), ERRORS, "is sent to the client"),
        (change_routes(hide_errors), ERRORS, "an error in a route is answered with"),
        (change_stop(cut_off), FINISHES, "Server disconnected|was cut off|closed"),
        (pass_over_contradictions, REFUSES, "DID NOT RAISE"),
        (lambda *given: make_right(given[0], []), SERVED, "/open"),
    ],
)
def test_a_wrong_server_is_caught(make, law, message):
    kinds = (AssertionError, pytest.fail.Exception, httpx.TransportError)
    with pytest.raises(kinds, match=message):
        getattr(ServerKit(make), law)()


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (change_routes(collect_streams), STREAMS),
        (change_stop(never_stop), IDLE),
        (change_stop(wait_for_ever), GRACE),
    ],
)
def test_a_server_that_never_gets_there_is_given_up(make, law, monkeypatch):
    monkeypatch.setattr(kit_module, "PATIENCE", 1.0)
    with pytest.raises(TimeoutError):
        getattr(ServerKit(make), law)()


@pytest.mark.parametrize(
    "law", [SERVED, STREAMS, KEYS, DESCRIPTION, ERRORS, FINISHES, GRACE, IDLE, REFUSES]
)
def test_a_right_server_passes(law):
    getattr(ServerKit(), law)()


def test_methods_that_do_not_fit_the_protocol_are_caught():
    class NoGrace:
        async def serve(self, sock):
            pass

    with pytest.raises(AssertionError, match="serve"):
        ServerKit(lambda *given: NoGrace()).test_fulfils_the_protocol()


def test_what_is_missing_is_named():
    with pytest.raises(NotImplementedError, match="entry"):
        FrontendConformance().make_frontend()
    with pytest.raises(NotImplementedError, match="entry"):
        ServerConformance().make_server([])


def test_the_service_notes_subscribers():
    service = StandInService({"x": 1}, api_key=("k",))
    service.subscribe("one")
    assert (service.subscriptions, service.settings, service.config.api_key) == (
        ["one"],
        {"x": 1},
        ("k",),
    )
