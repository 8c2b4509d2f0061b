"""The contract with plugins, as a golden file: it changes only together with `API_VERSION`.

Write the file anew, after raising `API_VERSION` in core/hookspecs.py:

    python tests/test_api_golden.py --write

Before a version is released its file may be rewritten under the same version:

    python tests/test_api_golden.py --write --unreleased
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
from pathlib import Path

import msgspec
import pytest

import core
from core import events, hookspecs, interfaces, registry, request, step

GOLDEN = Path(__file__).with_name("api.json")
COMMAND = "python tests/test_api_golden.py --write"


def describe_api():
    """Everything that a plugin can rely on, as plain data."""
    is_record = dataclasses.is_dataclass
    return {
        "version": "{}.{}".format(*hookspecs.API_VERSION),
        "names": core.__all__,
        "hooks": describe(describe_hook, is_hook, hookspecs),
        "protocols": describe(describe_protocol, is_protocol, interfaces, events),
        "records": describe(describe_dataclass, is_record, interfaces, step)
        | describe(describe_struct, is_struct, step),
        "events": describe(describe_struct, is_struct, events),
        "descriptors": describe(describe_dataclass, is_record, registry),
        "kinds": {kind: entry.__name__ for kind, entry in registry.KINDS.items()},
        "sampling_params": describe_struct(request.SamplingParams),
    }


def describe(describe_one, condition, *modules):
    """Describe what modules define themselves, in the order of the source."""
    return {
        name: describe_one(value)
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        if condition(value)
    }


def is_hook(value):
    return hasattr(value, f"{hookspecs.PROJECT_NAME}_spec")


def is_protocol(value):
    return isinstance(value, type) and getattr(value, "_is_protocol", False)


def is_struct(value):
    return isinstance(value, type) and issubclass(value, msgspec.Struct)


def describe_hook(spec):
    firstresult = " firstresult" if spec.cythera_spec["firstresult"] else ""
    return str(inspect.signature(spec)) + firstresult


def describe_protocol(cls):
    described = {name: str(annotation) for name, annotation in cls.__annotations__.items()}
    for name, member in vars(cls).items():
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
            described[name] = str(inspect.signature(member))
        elif isinstance(member, property):
            described[name] = f"property {inspect.signature(member.fget)}"
    for name in ("__init__", "__subclasshook__"):  # made by typing.Protocol
        described.pop(name, None)
    return described


def describe_dataclass(cls):
    return {
        field.name: described(field.type, field.default, field.default_factory, dataclasses.MISSING)
        for field in dataclasses.fields(cls)
    }


def describe_struct(cls):
    annotations = {
        name: text
        for base in cls.__mro__[::-1]
        for name, text in vars(base).get("__annotations__", {}).items()
    }
    return {
        field.name: described(
            annotations[field.name], field.default, field.default_factory, msgspec.NODEFAULT
        )
        for field in msgspec.structs.fields(cls)
    }


def described(annotation, default, factory, missing):
    if default is not missing:
        return f"{annotation} = {getattr(default, '__name__', None) or repr(default)}"
    return f"{annotation} = {factory.__name__}()" if factory is not missing else str(annotation)


def to_text(api):
    return json.dumps(api, indent=1, ensure_ascii=False) + "\n"


def difference(old, new):
    return "".join(
        difflib.unified_diff(
            to_text(old).splitlines(keepends=True),
            to_text(new).splitlines(keepends=True),
            "golden",
            "now",
            n=1,
        )
    )


def verdict(old, new):
    """Why the golden file and the API do not go together; empty when they do."""
    if old == new:
        return ""
    change = difference(old, new)
    if old["version"] == new["version"]:
        return (
            f"the plugin API changed, but is still called {new['version']}:\n{change}\n"
            f"Plugins rely on it.  Undo the change; or raise API_VERSION in core/hookspecs.py (the major "
            f"when something was removed or changed, else the minor), tell the changelog, and run\n"
            f"  {COMMAND}"
        )
    return f"tests/api.json describes API {old['version']}, not {new['version']}; run\n  {COMMAND}\n{change}"


def test_the_api_changes_only_with_its_version():
    problem = verdict(json.loads(GOLDEN.read_text(encoding="utf-8")), describe_api())
    if problem:
        pytest.fail(problem, pytrace=False)


def test_the_golden_file_is_written_as_this_test_writes_it():
    assert GOLDEN.read_text(encoding="utf-8") == to_text(json.loads(GOLDEN.read_text(encoding="utf-8")))


@pytest.mark.parametrize("section", [name for name in describe_api() if name != "version"])
def test_a_change_in_every_section_is_noticed(section):
    api = describe_api()
    assert api[section]
    changed = json.loads(to_text(api))
    name = next(iter(changed[section]))
    del changed[section][0 if section == "names" else name]
    problem = verdict(changed, api)
    assert COMMAND in problem
    assert f'"{name}"' in problem
    assert "API_VERSION" in problem
    changed["version"] = "0.9"
    assert "describes API 0.9" in verdict(changed, api)


def test_what_plugins_rely_on_is_in_the_description():
    api = describe_api()
    assert (
        api["hooks"]["core_make_executor"]
        == "(plan: 'Plan', rank: 'int') -> 'Executor | None' firstresult"
    )
    assert api["protocols"]["BlockAllocator"]["num_free"] == "property (self) -> 'int'"
    assert api["protocols"]["BlockAllocator"]["num_blocks"] == "int"
    assert api["protocols"]["EventHandler"]["__call__"] == "(self, batch: 'EventBatch', /) -> 'None'"
    assert api["events"]["RequestFinished"]["error"] == "str = ''"
    assert api["descriptors"]["AttentionEntry"]["default_block_size"] == "int = 16"
    assert api["sampling_params"]["temperature"] == "float = 1.0"


def main(arguments):
    api, same = describe_api(), False
    if GOLDEN.exists():
        old = json.loads(GOLDEN.read_text(encoding="utf-8"))
        same = old["version"] == api["version"] and old != api
    if same and "--unreleased" not in arguments:
        return verdict(old, api)
    if "--write" in arguments:
        GOLDEN.write_text(to_text(api), encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
