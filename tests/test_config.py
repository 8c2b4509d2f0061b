from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import (
    _BINARY,
    _BYTES,
    GROUPS,
    EngineConfig,
    flag_origin,
    load_config,
    parse_assignments,
    parse_size,
)
from core.errors import ConfigError


def problems(flags, **layers):
    with pytest.raises(ConfigError) as caught:
        load_config(flags, **layers)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "engine.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- layers and origins ----------------------------------------------------------------------------


def test_later_layers_win_and_every_value_knows_its_origin(tmp_path):
    path = write(tmp_path, "max_num_seqs = 1\nblock-size = 8\nseed = 3\n")
    environ = {"CYTHERA_MAX_NUM_SEQS": "2", "CYTHERA_BLOCK_SIZE": "32", "HOME": "/root"}
    config = load_config(
        {"model": "m", "max_num_seqs": "4"},
        config_file=path,
        environ=environ,
        origin=flag_origin,
    )
    assert (config.max_num_seqs, config.block_size, config.seed, config.max_n) == (4, 32, 3, 128)
    assert config.origin_of("max_num_seqs") == "flag --max-num-seqs"
    assert config.origin_of("block_size") == "environment CYTHERA_BLOCK_SIZE"
    assert config.origin_of("seed") == "engine.toml line 3"
    assert config.origin_of("max_n") == "default"
    assert config.origin_of("model") == "flag --model"
    with pytest.raises(KeyError):
        config.origin_of("no_such_setting")


LAYERS = ("file", "environment", "flag")


@given(st.sets(st.sampled_from(LAYERS)))
def test_the_topmost_layer_that_speaks_decides(tmp_path_factory, speaking):
    values = {"file": 11, "environment": 12, "flag": 13}
    path = write(tmp_path_factory.mktemp("layers"), "max_n = 11" if "file" in speaking else "# nothing")
    config = load_config(
        {"model": "m", "max_n": 13 if "flag" in speaking else None},
        config_file=path,
        environ={"CYTHERA_MAX_N": "12"} if "environment" in speaking else {},
        origin=flag_origin,
    )
    top = max(speaking, key=LAYERS.index, default=None)
    assert config.max_n == values.get(top, 128)
    assert config.origin_of("max_n").startswith({"file": "engine.toml", None: "default"}.get(top, top))


def test_keyword_arguments_are_called_arguments():
    assert load_config({"model": "m"}).origin_of("model") == "argument model"
    assert "(argument max_n)" in problems({"model": "m", "max_n": 0})


def test_the_environment_is_read_only_when_it_is_given(monkeypatch):
    monkeypatch.setenv("CYTHERA_MAX_NUM_SEQS", "3")
    assert load_config({"model": "m"}).max_num_seqs == 128


def test_the_config_is_frozen():
    config = load_config({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        config.max_num_seqs = 3
    assert config.max_num_seqs == 128


def test_values_of_the_caller_are_copied():
    table = {"a.b": {"c": 1}}
    config = load_config({"model": "m", "plugin_settings": table})
    table["a.b"]["c"] = 2
    assert config.plugin_settings == {"a.b": {"c": 1}}


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "given_value", "expected"),
    [
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "BFloat16", "bfloat16"),
        ("dtype", torch.float64, "float64"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("device", "CPU", "cpu"),
        ("model", Path("a/b"), "a/b"),
        ("tokenizer", Path("a/b"), "a/b"),
        ("max_model_len", "32k", 32768),
        ("max_model_len", "1.5K", 1536),
        ("max_model_len", "auto", None),
        ("max_model_len", "-1", None),
        ("max_model_len", -1, None),
        ("max_num_batched_tokens", "8k", 8192),
        ("kv_cache_memory_bytes", "4GiB", 4 * 2**30),
        ("kv_cache_memory_bytes", "4 g", 4 * 2**30),
        ("kv_cache_memory_bytes", "1.5GB", 1_500_000_000),
        ("kv_cache_memory_bytes", "auto", None),
        ("block_size", "auto", None),
        ("block_size", "256", 256),
        ("enable_prefix_caching", "false", False),
        ("enforce_eager", "1", True),
        ("gpu_memory_utilization", "1", 1.0),
        ("quantization", "compressed-tensors", "compressed-tensors"),
        ("plugins", "a.b, c.d ,", ("a.b", "c.d")),
        ("plugins", ["a.b", "c.d,no:e.f"], ("a.b", "c.d", "no:e.f")),
        ("served_model_name", "mine", ("mine",)),
        ("log_level", "WARNING", "warning"),
    ],
)
def test_values_are_read_as_people_write_them(field, given_value, expected):
    config = load_config({"model": "m", field: given_value})
    assert getattr(config, field) == expected


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("max_num_seqs", 0, "must be greater than or equal to 1"),
        ("max_num_seqs", True, "must be a number, not true or false"),
        ("max_num_batched_tokens", True, "must be a number, not true or false"),
        ("max_num_batched_tokens", "12q", "must be a number, if need be with one of the units"),
        ("max_model_len", "1.3", "must be a whole number, but is 1.3"),
        ("max_model_len", 0, "must be greater than or equal to 1"),
        ("block_size", 24, "must be a power of two"),
        ("block_size", 512, "must be less than or equal to 256"),
        ("block_size", 0, "must be greater than or equal to 1"),
        ("gpu_memory_utilization", 0, "must be greater than 0"),
        ("gpu_memory_utilization", 1.01, "must be less than or equal to 1"),
        ("gpu_memory_utilization", math.nan, "must be"),
        ("max_logprobs", 21, "must be less than or equal to 20"),
        ("max_n", 129, "must be less than or equal to 128"),
        ("seed", -1, "must be greater than or equal to 0"),
        ("dtype", "int8", "must be 'auto', 'float16'"),
        ("dtype", 7, "must be 'auto'"),
        ("device", "tpu", "must be auto, cpu, cuda or cuda:N"),
        ("load_format", "pt", "must be 'auto', 'safetensors' or 'dummy'"),
        ("scheduler", "a.b", "must be a name, without its kind"),
        ("tokenizer", "", "should have at least 1 character"),
        ("plugins", 7, "must be a valid tuple"),
        ("plugins", ["a", 7], "must be a valid string"),
    ],
)
def test_a_bad_value_is_named_with_its_origin_and_its_limit(field, value, reason):
    text = problems({"model": "m", field: value})
    assert text.startswith(f"{field} = ")
    assert f"(argument {field})" in text
    assert reason in text


UNITS = st.sampled_from([(unit, factor) for unit, factor in _BYTES.items() if unit])


@given(st.integers(0, 10**12), UNITS, st.booleans(), st.sampled_from(["", " "]))
def test_sizes_multiply(number, unit, is_upper, space):
    suffix, factor = unit
    text = f"{number}{space}{suffix.upper() if is_upper else suffix}"
    assert parse_size(text, _BYTES) == number * factor


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text):
    is_number = text.strip()[:1].isdecimal() or text.strip()[:1] in {"+", "-"}
    try:
        assert isinstance(parse_size(text, _BINARY), int)
    except ValueError:
        return
    assert is_number


# --- contradictions and many problems --------------------------------------------------------------


def test_settings_that_contradict_each_other_name_both_numbers_and_both_knobs():
    text = problems(
        {"model": "m", "max_num_seqs": 4096}, environ={"CYTHERA_MAX_NUM_BATCHED_TOKENS": "1k"}
    )
    assert "max_num_batched_tokens = 1024 (environment CYTHERA_MAX_NUM_BATCHED_TOKENS)" in text
    assert "max_num_seqs = 4096 (argument max_num_seqs)" in text
    text = problems({"model": "m", "num_kv_blocks": 5, "kv_cache_memory_bytes": "1MiB"})
    assert "num_kv_blocks = 5" in text
    assert "kv_cache_memory_bytes = 1048576" in text


def test_budget_and_requests_may_be_equal():
    config = load_config({"model": "m", "max_num_seqs": 64, "max_num_batched_tokens": 64})
    assert config.max_num_batched_tokens == config.max_num_seqs == 64


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(tmp_path, "dtyp = 'half'\n[plugins.x]\ny = 1\n")
    text = problems(
        {"max_n": 0, "num_kv_blocks": 1, "kv_cache_memory_bytes": 1, "trust_remote_code": True},
        config_file=path,
        environ={"CYTHERA_BLOCK_SIZE": "3"},
    )
    assert text.startswith("7 problems in the configuration:\n")
    for part in (
        "dtyp (engine.toml line 1) is no setting; did you mean dtype?",
        "x.y (engine.toml line 3): must be a table of settings of a plugin",
        "trust_remote_code (argument trust_remote_code) is not offered",
        "model is required",
        "max_n = 0",
        "block_size = '3' (environment CYTHERA_BLOCK_SIZE): must be a power of two",
        "both fix the size of the KV cache",
    ):
        assert part in text


def test_a_contradiction_with_a_bad_value_is_not_made_up():
    text = problems({"model": "m", "max_num_batched_tokens": "many", "max_num_seqs": 4096})
    assert "max_num_batched_tokens = 'many'" in text
    assert "is less than" not in text


def test_a_model_is_required_unless_nothing_is_to_be_run():
    assert "model is required" in problems({})
    assert "model is required" in problems({"model": ""})
    assert load_config({}, need_model=False).model == ""


def test_names_that_look_like_nothing_get_no_suggestion():
    assert problems({"model": "m", "zzz": 1}) == "zzz (argument zzz) is no setting"


# --- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '[plugins]\nenable = ["a.b"]\n\n[plugins."parallel.tp"]\nsize = 2\n',
        '[plugins]\nenable = "a.b"\n\n[plugins.parallel.tp]\nsize = 2\n',
        '[plugins]\nenable = ["a.b"]\n\nparallel.tp.size = 2\n',
        'plugins = ["a.b"]\n\n\n[plugin_settings."parallel.tp"]\nsize = 2\n',
    ],
)
def test_plugins_are_chosen_and_set_up_in_the_file(tmp_path, text):
    config = load_config({"model": "m"}, config_file=write(tmp_path, text))
    assert config.plugins == ("a.b",)
    assert config.plugin_settings == {"parallel.tp": {"size": 2}}
    line = next(
        n for n, row in enumerate(text.splitlines(), 1) if "enable" in row or "plugins =" in row
    )
    assert config.origin_of("plugins") == f"engine.toml line {line}"
    size_line = next(n for n, row in enumerate(text.splitlines(), 1) if "size" in row)
    assert config.origin_of("parallel.tp.size") == f"engine.toml line {size_line}"


def test_a_value_inside_a_line_is_at_least_in_the_file(tmp_path):
    path = write(tmp_path, 'plugins = {"parallel.tp" = {size = 2}}\n')
    config = load_config({"model": "m"}, config_file=path)
    assert config.origin_of("parallel.tp.size") == "engine.toml"


def test_settings_of_plugins_are_merged_over_the_layers(tmp_path):
    path = write(tmp_path, '[plugins."a.b"]\nx = 1\ny = 1\n[plugins."a.b".deep]\np = 1\nq = 1\n')
    config = load_config(
        {"model": "m", "plugin_settings": parse_assignments(["a.b.y=3", "a.b.deep.q=3"])},
        config_file=path,
        environ={"CYTHERA_PLUGIN_SETTINGS": '{"a.b": {"x": 2, "y": 2}, "c.d": {"z": 2}}'},
        origin=flag_origin,
    )
    assert config.plugin_settings == {
        "a.b": {"x": 2, "y": 3, "deep": {"p": 1, "q": 3}},
        "c.d": {"z": 2},
    }
    assert config.origin_of("a.b.x") == "environment CYTHERA_PLUGIN_SETTINGS"
    assert config.origin_of("a.b.y") == "flag --set a.b.y"


@pytest.mark.parametrize("value", ["{", "[1]", "7"])
def test_settings_of_plugins_must_be_tables(value):
    text = problems({"model": "m"}, environ={"CYTHERA_PLUGIN_SETTINGS": value})
    assert text == "plugin_settings (environment CYTHERA_PLUGIN_SETTINGS): must be a table of tables"


def test_settings_of_plugins_are_plain_data():
    text = problems({"model": "m", "plugin_settings": {"a.b": {"c": {1, 2}}}})
    assert text.startswith("a.b.c = ")
    assert "(argument plugin_settings['a.b.c'])" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"max_n = ", "Invalid value"),
        (b"max_n = '\xff'", "can't decode"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, reason):
    path = tmp_path / "engine.toml"
    if content is not None:
        path.write_bytes(content)
    text = problems({"model": "m"}, config_file=path)
    assert text.startswith(f"config file {path} cannot be read: ")
    assert reason in text


# --- the environment -------------------------------------------------------------------------------


def test_unknown_variables_with_our_prefix_are_errors():
    text = problems({"model": "m"}, environ={"CYTHERA_MAX_NUM_SEQ": "3"})
    expected = "max_num_seq (environment CYTHERA_MAX_NUM_SEQ) is no setting; did you mean max_num_seqs?"
    assert text == expected


def test_variables_that_are_not_ours_are_let_be():
    environ = {
        "MAX_N": "1",
        "CYTHERA_MAX_N": "",
        "CYTHERA_TRACEBACK": "1",
        "CYTHERA_SERVICE_HOST": "10.0.0.1",
        "CYTHERA_SERVICE_PORT_HTTP": "8000",
        "CYTHERA_PORT": "tcp://10.0.0.1:8000",
        "CYTHERA_ENGINE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert (
        load_config({"model": "m"}, environ=environ).to_dict() == load_config({"model": "m"}).to_dict()
    )
    assert load_config({"model": "m"}, environ={"CYTHERA_PORT": "8000"}).port == 8000


# --- assignments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("parallel.tp.size=2", {"parallel.tp": {"size": 2}}),
        ("a.b.c=true", {"a.b": {"c": True}}),
        ("a.b.c=1.5", {"a.b": {"c": 1.5}}),
        ("a.b.c=[1, 2]", {"a.b": {"c": [1, 2]}}),
        ("a.b.c='x'", {"a.b": {"c": "x"}}),
        ("a.b.c=/a path/x=y", {"a.b": {"c": "/a path/x=y"}}),
        ("a.b.c=", {"a.b": {"c": ""}}),
        ("a.b.c=2024-01-01", {"a.b": {"c": "2024-01-01"}}),
        ("a.b.c=1\nd = 2", {"a.b": {"c": "1\nd = 2"}}),
        ("a.b.c.d=1", {"a.b": {"c": {"d": 1}}}),
        ("py:my.package.size=1", {"py:my.package": {"size": 1}}),
    ],
)
def test_assignments(item, expected):
    assert parse_assignments([item]) == expected


def test_assignments_add_up_and_the_last_wins():
    items = ["a.b.c=1", "a.b.d=2", "a.b.c=3", "a.c.c=4"]
    assert parse_assignments(items) == {"a.b": {"c": 3, "d": 2}, "a.c": {"c": 4}}


@pytest.mark.parametrize(
    "item", ["a.b.c", "a.b=1", "max_n=1", "=1", "a..c=1", ".b.c=1", "py:m=1", "a.b.=1"]
)
def test_what_is_no_assignment_is_refused(item):
    with pytest.raises(ConfigError, match=r"must be plugin\.key=value"):
        parse_assignments([item, "a.b.c=1"])


def test_all_bad_assignments_are_reported_at_once():
    with pytest.raises(ConfigError, match="2 problems"):
        parse_assignments(["x", "a.b.c=1", "y"])


# --- writing it down -------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
PLAIN = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.fixed_dictionaries(
    {"model": st.text(st.characters(exclude_categories=["Cs"]), min_size=1)},
    optional={
        "max_num_seqs": st.integers(1, 2048),
        "max_model_len": st.none() | st.integers(1, 10**9),
        "block_size": st.sampled_from([1, 2, 16, 256]),
        "gpu_memory_utilization": st.floats(0.01, 1),
        "enforce_eager": st.booleans(),
        "dtype": st.sampled_from(["auto", "bfloat16"]),
        "plugins": st.lists(st.from_regex(r"[a-z]+\.[a-z]+", fullmatch=True)),
        "plugin_settings": st.dictionaries(
            st.from_regex(r"[a-z]{1,5}\.[a-z]{1,5}", fullmatch=True),
            st.dictionaries(
                NAMES | st.text(st.characters(exclude_categories=["Cs"])), PLAIN, max_size=3
            ),
            max_size=3,
        ),
    },
)


@settings(max_examples=40)
@given(CONFIGS, st.booleans())
def test_the_written_file_means_the_same(tmp_path_factory, flags, with_origins):
    config = load_config(flags)
    text = config.to_toml(with_origins=with_origins)
    path = write(tmp_path_factory.mktemp("toml"), text)
    assert load_config({}, config_file=path).to_dict() == config.to_dict()


@settings(max_examples=40)
@given(CONFIGS)
def test_plain_data_goes_round(flags):
    config = load_config(flags)
    assert load_config(config.to_dict()).to_dict() == config.to_dict()


def test_origins_are_comments_of_the_file():
    text = load_config({"model": "m"}).to_toml(with_origins=True)
    assert tomllib.loads(text)["model"] == "m"
    assert text.startswith('model = "m"  ')
    assert "# argument model\n" in text
    assert "# block_size is unset" in text


# --- the fields themselves -------------------------------------------------------------------------


def test_every_setting_is_described_and_grouped():
    for name, field in EngineConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert field.json_schema_extra["group"] in GROUPS, name


def test_every_default_is_legal():
    defaults = {name: field.default for name, field in EngineConfig.model_fields.items()}
    assert load_config({**defaults, "model": "m"}).to_dict() == load_config({"model": "m"}).to_dict()


def test_config_does_not_import_torch():
    code = "import core.config, sys; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=False).returncode == 0  # noqa: S603  ours
