from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest

from core.testing.plugin import PluginConformance
from plugins.frontend.openai import NAME, OpenAISettings, core_check_plan, make_frontend


class TestPlugin(PluginConformance):
    module = "plugins.frontend.openai"
    preload = ()

    def test_import_is_cheap(self, footprint):
        assert "starlette" not in footprint["modules"]
        assert "torch" not in footprint["modules"]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["ping_interval", "write_timeout"])
def test_lengths_of_time_are_checked(name, value):
    plan = SimpleNamespace(settings={NAME: OpenAISettings(**{name: value})})
    (objection,) = core_check_plan(plan)
    assert name in objection
    assert not list(core_check_plan(SimpleNamespace(settings={NAME: OpenAISettings()})))


# --- documentation --------------------------------------------------------------------------------


@pytest.fixture
def frontend(client):
    return make_frontend(client.service)


def test_every_route_is_documented_and_nothing_else(frontend):
    routes = {
        (re.sub(r":path}", "}", route.path), method.lower())
        for route in frontend.routes
        for method in route.methods - {"HEAD"}
    }
    paths = frontend.openapi["paths"]
    assert routes == {(path, method) for path, methods in paths.items() for method in methods}
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_every_route_needs_a_key(frontend):
    assert frontend.open_paths == frozenset()


def test_references_lead_somewhere(frontend):
    schemas = frontend.openapi["components"]["schemas"]

    def walk(value):
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)

    refs = set(walk(frontend.openapi))
    assert refs == {f"#/components/schemas/{name}" for name in schemas}


def test_statuses_that_occur_are_documented(frontend):
    for path, methods in frontend.openapi["paths"].items():
        for operation in methods.values():
            statuses = set(operation["responses"])
            assert {"200", "401", "413", "431", "500"} <= statuses
            if path in ("/v1/chat/completions", "/v1/completions"):
                assert {"400", "404", "408", "429", "503"} <= statuses
                assert "text/event-stream" in operation["responses"]["200"]["content"]
