"""Settings of an engine: frozen, checked as a whole, and each knows where its value came from.

Four layers, later ones win: defaults, a TOML file, the environment (`CYTHERA_MAX_NUM_SEQS=64`), and
flags or keyword arguments.  `EngineConfig` is the one place that names a setting: the command line,
its help, the environment and the file are all read off its fields.

In a file, settings are top-level keys; plugins are chosen and set up in one table:

    max_num_seqs = 64
    [plugins]
    enable = ["quant.awq", "no:observe.prometheus"]
    [plugins."parallel.tp"]
    size = 2
"""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    Origin = Callable[[str, str], str]
    """Names a field, or a setting of a plugin if that is not empty, for people."""

SECRETS: Final = ("api_key", "cluster_key")
"""Settings that are never written anywhere."""
ENGINE_SECRETS: Final = ("cluster_key",)
"""Those that the engine's own process is told."""
ENV_PREFIX: Final = "CYTHERA_"
DEFAULT_ORIGIN: Final = "default"
GROUPS: Final = ("Model", "Memory", "Scheduling", "Parallelism", "Server", "Plugins", "Logging")
"""Groups of settings, in the order in which help shows them."""


# --- reading values --------------------------------------------------------------------------------

_BINARY: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BYTES: Final = (
    _BINARY
    | {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    | {f"{prefix}ib": size for prefix, size in _BINARY.items() if prefix}
)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_DTYPE_ALIASES: Final = {"half": "float16", "float": "float32", "double": "float64"}


def parse_size(text: str, units: Mapping[str, int]) -> int:
    """Read a whole number with an optional unit, such as `32k` or `1.5 GiB`.

    :param units: factor by lower-case suffix.
    :raises ValueError: the text is no number, the unit is unknown, or the result is not whole.
    """
    match = re.fullmatch(r"\s*([+-]?\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"must be a number, if need be with one of the units {known}")
    value = Fraction(match[1]) * units[match[2].lower()]
    if value.denominator != 1:
        raise ValueError(f"must be a whole number, but is {float(value)}")
    return int(value)


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")  # noqa: TRY004  for pydantic
    return value


def _read_tokens(value: Any) -> Any:
    return parse_size(value, _BINARY) if isinstance(value, str) else _reject_bool(value)


def _read_bytes(value: Any) -> Any:
    return parse_size(value, _BYTES) if isinstance(value, str) else _reject_bool(value)


def _read_optional(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("auto", "none") else value


def _read_model_len(value: Any) -> Any:
    value = _read_optional(value)
    return None if value is None or str(value).strip() == "-1" else _read_tokens(value)


def _read_word(value: Any) -> Any:
    """Take `torch.float32`, `torch.device("cpu")` and upper case for the words they stand for."""
    is_torch = type(value).__module__ == "torch"
    if not is_torch and not isinstance(value, str):
        return value
    return str(value).strip().removeprefix("torch.").lower()


def _read_dtype(value: Any) -> Any:
    word = _read_word(value)
    return _DTYPE_ALIASES.get(word, word) if isinstance(word, str) else word


def _read_path(value: Any) -> Any:
    return str(value) if hasattr(value, "__fspath__") else value


def _read_names(value: Any) -> Any:
    """Split `"a,b"` and `["a", "b,c"]` alike."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        return value
    return tuple(filter(None, (word.strip() for item in value for word in item.split(","))))


def _check_power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("must be a power of two")
    return value


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _check_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w-]*", value):
        raise ValueError("must be a name, without its kind: letters, digits, - and _")
    return value


_NUMBER: Final = BeforeValidator(_reject_bool)
_TOKENS: Final = BeforeValidator(_read_tokens)
_WORD: Final = BeforeValidator(_read_word)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[Positive, _NUMBER]
Tokens = Annotated[Positive, _TOKENS]
Bytes = Annotated[Positive, BeforeValidator(_read_bytes)]
OptionalTokens = Annotated[Tokens | None, BeforeValidator(_read_optional)]
Seconds = Annotated[float, Field(gt=0, lt=math.inf), _NUMBER]
OptionalSeconds = Annotated[Seconds | None, BeforeValidator(_read_optional)]
BlockSize = Annotated[int, Field(ge=1, le=256), AfterValidator(_check_power_of_two), _TOKENS]
Text = Annotated[str, Field(min_length=1), BeforeValidator(_read_path)]
Name = Annotated[str, AfterValidator(_check_name)]
Names = Annotated[tuple[str, ...], BeforeValidator(_read_names)]


def _field(group: str, description: str, default: Any, short: str = "") -> Any:
    return Field(default, description=description, json_schema_extra={"group": group, "short": short})


# --- the settings ----------------------------------------------------------------------------------


class EngineConfig(BaseModel):
    """All settings of one engine.  Make one with `load_config`, which knows where values come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    model: Annotated[str, BeforeValidator(_read_path)] = _field(
        "Model", "Folder of a checkpoint, or the id of one on the hub.", ""
    )
    tokenizer: Text | None = _field(
        "Model", "Folder or id of the tokenizer; unset: the model's own.", None
    )
    revision: Text | None = _field("Model", "Branch, tag or commit of the model on the hub.", None)
    served_model_name: Names = _field(
        "Model", "Names that clients call the model by, the first one in responses; unset: MODEL.", ()
    )
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32", "float64"], BeforeValidator(_read_dtype)
    ] = _field(
        "Model", "Type of weights and activations; also half and float. auto: the checkpoint's.", "auto"
    )
    device: Annotated[str, AfterValidator(_check_device), _WORD] = _field(
        "Model", "auto, cpu, cuda or cuda:N. auto: a GPU if there is one.", "auto"
    )
    load_format: Annotated[Literal["auto", "safetensors", "dummy"], _WORD] = _field(
        "Model", "dummy fills random weights without reading any.", "auto"
    )
    quantization: Annotated[Name | None, _WORD] = _field(
        "Model", "Quantizer of the weights; unset: what the checkpoint states.", None, "-q"
    )
    max_model_len: Annotated[Tokens | None, BeforeValidator(_read_model_len)] = _field(
        "Model",
        "Longest sequence in tokens, such as 32k (32768). auto or -1: what the model and memory allow.",
        None,
    )
    generation_config: Annotated[Literal["auto", "none"], _WORD] = _field(
        "Model", "Default sampling parameters. auto: the checkpoint's; none: neutral ones.", "auto"
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), _NUMBER] = _field(
        "Model", "Seed of requests that bring none, and of dummy weights.", 0
    )
    max_n: Annotated[int, Field(ge=1, le=128), _NUMBER] = _field(
        "Server", "Most completions (n) that a request may ask for.", 128
    )
    max_logprobs: Annotated[int, Field(ge=0, le=20), _NUMBER] = _field(
        "Server", "Most alternatives per token (logprobs) that a request may ask for.", 20
    )

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), _NUMBER] = _field(
        "Memory", "Share of the device's memory for weights, activations and KV cache together.", 0.92
    )
    kv_cache_memory_bytes: Annotated[Bytes | None, BeforeValidator(_read_optional)] = _field(
        "Memory", "Size of the KV cache, such as 4GiB; takes the place of the share.", None
    )
    num_kv_blocks: OptionalTokens = _field(
        "Memory", "Size of the KV cache in usable blocks; takes the place of the share.", None
    )
    block_size: Annotated[BlockSize | None, BeforeValidator(_read_optional)] = _field(
        "Memory", "Tokens per KV block, a power of two; unset: the attention backend's favourite.", None
    )
    kv_cache_dtype: Annotated[Name, _WORD] = _field(
        "Memory", "Type of cached keys and values. auto: the same as dtype.", "auto"
    )
    cpu_offload_gb: Annotated[float, Field(ge=0, lt=math.inf), _NUMBER] = _field(
        "Memory",
        "GiB of decoder layers that each rank keeps in the host's memory and copies when they run.",
        0.0,
    )
    enable_prefix_caching: bool = _field(
        "Memory", "Keep the KV of finished requests for others with the same beginning.", True
    )
    enforce_eager: bool = _field("Memory", "Never capture CUDA graphs, which take memory.", False)

    max_num_seqs: Count = _field("Scheduling", "Most requests that run at the same time.", 128)
    max_num_batched_tokens: Tokens = _field("Scheduling", "Token budget of one step.", 2048)
    long_prefill_token_threshold: Annotated[int, Field(ge=0), _TOKENS] = _field(
        "Scheduling", "Most prompt tokens of one request in a step; 0: the budget alone decides.", 0
    )
    scheduling_policy: Annotated[Literal["fcfs", "priority"], _WORD] = _field(
        "Scheduling", "fcfs: in order of arrival. priority: lower numbers first.", "fcfs"
    )
    max_in_flight: OptionalTokens = _field(
        "Scheduling", "Steps submitted before the first result is awaited; unset: the executor's.", None
    )

    tensor_parallel_size: Count = _field(
        "Parallelism", "Ranks that share each layer; enables parallel.tp.", 1, "-tp"
    )
    pipeline_parallel_size: Count = _field(
        "Parallelism", "Stages that the layers are divided into; enables parallel.pp.", 1, "-pp"
    )

    distributed_executor_backend: Annotated[Name, _WORD] = _field(
        "Parallelism", "Who starts the ranks: mp, or ray, which enables parallel.ray.", "mp"
    )
    nnodes: Count = _field("Parallelism", "Machines that the ranks are spread over.", 1, "-n")
    node_rank: Annotated[int, Field(ge=0), _NUMBER] = _field(
        "Parallelism", "Number of this machine; 0 runs the engine and serves, others join it.", 0, "-r"
    )
    master_addr: Text = _field(
        "Parallelism", "Address of machine 0 that the others can reach.", "127.0.0.1"
    )
    master_port: Annotated[int, Field(ge=1, le=65535), _NUMBER] = _field(
        "Parallelism", "Port of machine 0 that the others join at.", 29501
    )
    cluster_key: Text | None = _field(
        "Parallelism", "Secret that machines must share to join; better in the environment.", None
    )
    join_timeout: Seconds = _field(
        "Parallelism", "Seconds that machines have to find one another.", 300.0
    )
    rank_timeout: Seconds = _field(
        "Parallelism", "Seconds after which a rank that does not answer is given up.", 10.0
    )
    step_timeout: Seconds = _field(
        "Parallelism", "Seconds that a step of several ranks may take.", 120.0
    )

    host: Text = _field(
        "Server",
        "Address to listen on; only 127.0.0.1 and ::1 cannot be reached from elsewhere.",
        "127.0.0.1",
    )
    port: Annotated[int, Field(ge=0, le=65535), _NUMBER] = _field(
        "Server", "Port to listen on; 0 takes any that is free.", 2242
    )
    api_key: Names = _field(
        "Server", "Keys that clients must send one of; unset: nobody needs one.", ()
    )
    insecure: bool = _field(
        "Server", "Listen on an address that others can reach without any key.", False
    )
    chat_template: Text | None = _field(
        "Server", "File of a chat template; unset: the one that comes with the tokenizer.", None
    )
    chat_template_timeout: Seconds = _field(
        "Server", "Seconds that a chat template may take to render one conversation.", 2.0
    )
    max_num_queued_reqs: Count = _field(
        "Server", "Most sequences that may wait for a row; more are answered with 429.", 1024
    )
    max_num_queued_tokens: Tokens = _field(
        "Server", "Most prompt tokens that may wait; one request alone may always.", 2**20
    )
    request_timeout: OptionalSeconds = _field(
        "Server", "Seconds that a request may take in all; unset: as long as it needs.", None
    )
    queue_timeout: OptionalSeconds = _field(
        "Server", "Seconds that a request may wait for its row; unset: no limit.", None
    )
    shutdown_timeout: Annotated[float, Field(ge=0, lt=math.inf), _NUMBER] = _field(
        "Server", "Seconds that open requests get to finish after SIGTERM.", 30.0
    )

    plugins: Names = _field(
        "Plugins", "Plugins, in the order of their calls: kind.name, py:module, no:kind.name.", ()
    )
    plugin_settings: dict[str, dict[str, JsonValue]] = _field("Plugins", "Settings of plugins.", {})
    attention_backend: Name = _field(
        "Plugins", "Attention backend by name; enables attention.NAME.", "auto"
    )
    scheduler: Name = _field("Plugins", "Scheduler by name.", "default")
    kv_cache: Name = _field("Plugins", "Manager of block tables and prefix reuse by name.", "paged")
    executor: Name = _field("Plugins", "Executor by name. auto: the first that can serve.", "auto")
    sampler: Name = _field("Plugins", "Sampler by name. auto: the best that can serve.", "auto")
    server: Name = _field("Plugins", "Server by name.", "http")

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], _WORD] = _field(
        "Logging", "Least severe messages to show.", "info"
    )
    enable_log_requests: bool = _field("Logging", "Log a line for each request that ends.", False)
    disable_log_stats: bool = _field("Logging", "Log no lines of statistics.", False)
    log_format: Annotated[Literal["auto", "pretty", "json"], _WORD] = _field(
        "Logging", "auto: pretty on a terminal, one JSON object a line elsewhere.", "auto"
    )

    def with_defaults(self, values: Mapping[str, Any], origin: str) -> EngineConfig:
        """Set what nobody has set.

        :param origin: where those values come from, as `origin_of` will say.
        """
        unset = {key: value for key, value in values.items() if self.origin_of(key) == DEFAULT_ORIGIN}
        copy = self.model_copy(update=unset)
        copy._origins = {**self._origins, **dict.fromkeys(unset, origin)}  # noqa: SLF001  of this class
        return copy

    def origin_of(self, setting: str) -> str:
        """Say where a value came from: `default`, `engine.toml line 3`, `flag --max-num-seqs`.

        :param setting: name of a field, or `plugin.key` for a setting of a plugin.
        :raises KeyError: there is no such setting.
        """
        if setting in type(self).model_fields:
            return self._origins.get(setting, DEFAULT_ORIGIN)
        return self._origins[setting]

    def to_dict(self, *, secrets: Collection[str] = ()) -> dict[str, Any]:
        """Plain data for JSON, without origins; `load_config` takes it back.

        :param secrets: those of `SECRETS` that are not left out.
        """
        return self.model_dump(mode="json", exclude=set(SECRETS) - set(secrets))

    @property
    def origins(self) -> dict[str, str]:
        """Where each value that is no default came from, by setting."""
        return dict(self._origins)

    def to_toml(self, *, with_origins: bool = False) -> str:
        """Write a config file that means the same, with a comment per setting for its origin."""
        names = [name for name in type(self).model_fields if name not in ("plugins", "plugin_settings")]
        lines = [self._toml_line(name, getattr(self, name), name, with_origins) for name in names]
        lines += ["", "[plugins]", self._toml_line("enable", self.plugins, "plugins", with_origins)]
        for plugin, settings in self.plugin_settings.items():
            lines += ["", f"[plugins.{_toml(plugin)}]"]
            lines += [
                self._toml_line(
                    key if _BARE_KEY.fullmatch(key) else _toml(key),
                    value,
                    f"{plugin}.{key}",
                    with_origins,
                )
                for key, value in settings.items()
            ]
        return "\n".join(lines) + "\n"

    def _toml_line(self, key: str, value: Any, setting: str, with_origins: bool) -> str:
        line = f"# {key} is unset" if value is None else f"{key} = {_toml(value)}"
        if key in SECRETS and value:
            line = f"# {key} is set, and not shown"
        return f"{line:<48}  # {self.origin_of(setting)}" if with_origins else line

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> EngineConfig:
        context = info.context or {}
        self._origins.update(context.get("origins", {}))
        known_bad = context.get("known_bad", frozenset())
        problems = [text for names, text in self._contradictions() if known_bad.isdisjoint(names)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Find settings that are fine alone but not together: their names, and a sentence."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            names = ("max_num_batched_tokens", "max_num_seqs")
            budget, seqs = map(self._quote, names)
            why = "every running request needs a token in each step"
            yield names, f"{budget} is less than {seqs}, but {why}; raise the first or lower the second"
        if self.num_kv_blocks is not None and self.kv_cache_memory_bytes is not None:
            names = ("num_kv_blocks", "kv_cache_memory_bytes")
            blocks, size = map(self._quote, names)
            yield names, f"{blocks} and {size} both fix the size of the KV cache; drop one"

    def _quote(self, name: str) -> str:
        return f"{name} = {getattr(self, name)!r} ({self.origin_of(name)})"


def _toml(value: Any) -> str:
    """Write a value in TOML; what JSON calls null has no counterpart and is left out."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value if item is not None)}]"
    if isinstance(value, dict):
        items = (f"{_toml(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
        return f"{{{', '.join(items)}}}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


# --- layers ----------------------------------------------------------------------------------------

_NOT_OFFERED: Final = {
    "trust_remote_code": "code that comes with a checkpoint is never run; a plugin can add a family",
    "enable_chunked_prefill": "prompts are always computed in chunks of max_num_batched_tokens",
    "swap_space": "preempted requests are computed again, nothing is swapped",
}
_NOT_SETTINGS: Final = frozenset({"TRACEBACK"})
"""Variables with our prefix that are read elsewhere."""
_SERVICE_LINK: Final = re.compile(
    r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""Variables that Kubernetes sets in every pod beside a service called `cythera…`."""


def argument_origin(field: str, setting: str = "") -> str:
    """Name a keyword argument in messages."""
    return f"argument {field}[{setting!r}]" if setting else f"argument {field}"


def flag_origin(field: str, setting: str = "") -> str:
    """Name a flag of the command line in messages."""
    return f"flag --set {setting}" if setting else f"flag --{field.replace('_', '-')}"


def load_config(
    flags: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    origin: Origin = argument_origin,
    need_model: bool = True,
) -> EngineConfig:
    """Put the layers on top of one another and check the result.

    :param flags: the topmost layer, by field; a `None` leaves the setting to the layers below.
    :param config_file: a TOML file.
    :param environ: where `CYTHERA_*` variables are looked up; `None` reads none.
    :param origin: what messages call a field of `flags`, or one setting of a plugin in it.
    :param need_model: whether it is an error that no layer names a model.
    :raises ConfigError: lists every problem, each with its origin.
    """
    layers = _Layers()
    if config_file is not None:
        layers.read_file(config_file)
    layers.read_environment(environ or {})
    for field, value in flags.items():
        if value is not None:
            layers.put(field, value, origin)
    return layers.build(need_model=need_model)


def restore_config(values: Mapping[str, Any], origins: Mapping[str, str]) -> EngineConfig:
    """Make the config again that `to_dict` and `origins` were taken from, in another process.

    :raises pydantic.ValidationError: they were not taken from a config of this version.
    """
    return EngineConfig.model_validate(values, context={"origins": origins})


class _Layers:
    """Collects values from below to above, with their origins, and problems instead of exceptions."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def read_file(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"config file {path} cannot be read: {reason}") from error

        def origin(field: str, setting: str = "") -> str:
            return f"{path.name}{_find_line(text, field, setting)}"

        plugins = table.get("plugins")
        if isinstance(plugins, dict):
            del table["plugins"]
            if "enable" in plugins:
                enabled = plugins.pop("enable")
                self.put("plugins", enabled, lambda *_: origin("", "plugins.enable"))
            self._put_plugins(_flattened(plugins), origin)
        for key, value in table.items():
            self.put(key, value, origin)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        for variable, value in sorted(environ.items()):
            key = variable.removeprefix(ENV_PREFIX)
            is_ours = key != variable and value and key not in _NOT_SETTINGS
            if is_ours and not _is_service_link(key, value):
                self.put(key.lower(), value, lambda *_, name=variable: f"environment {name}")

    def put(self, key: str, value: Any, origin: Origin) -> None:
        """Lay one value over what lies below; settings of plugins are merged."""
        field = key.replace("-", "_")
        if field not in EngineConfig.model_fields:
            self.problems.append(_unknown(field, origin(key, "")))
        elif field == "plugin_settings":
            self._put_plugins(value, origin)
        else:
            self.values[field] = value
            self.origins[field] = origin(key, "")

    def _put_plugins(self, settings: Any, origin: Origin) -> None:
        if isinstance(settings, str):  # as in the environment
            settings = _read_json(settings)
        if not isinstance(settings, Mapping):
            place = origin("plugin_settings", "")
            self.problems.append(f"plugin_settings ({place}): must be a table of tables")
            return
        merged = self.values.setdefault("plugin_settings", {})
        for plugin, table in settings.items():
            if not isinstance(table, Mapping):
                place = origin("plugin_settings", plugin)
                self.problems.append(f"{plugin} ({place}): must be a table of settings of a plugin")
                continue
            merged[plugin] = _merged(merged.get(plugin, {}), table)
            for key in table:
                setting = f"{plugin}.{key}"
                self.origins[setting] = origin("plugin_settings", setting)

    def build(self, *, need_model: bool) -> EngineConfig:
        if need_model and not self.values.get("model"):
            self.problems.append(
                f"model is required: name a checkpoint as the first argument, with {ENV_PREFIX}MODEL, or "
                f"as model = … in the config file"
            )
        config = self._validate(frozenset())
        if config is None or self.problems:
            raise ConfigError(_joined(self.problems))
        return config

    def _validate(self, known_bad: frozenset[str]) -> EngineConfig | None:
        values = {name: value for name, value in self.values.items() if name not in known_bad}
        context = {"origins": self.origins, "known_bad": known_bad}
        try:
            return EngineConfig.model_validate(values, context=context)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        self.problems += [line for details in errors for line in self._describe(details)]
        bad = frozenset(str(details["loc"][0]) for details in errors if details["loc"])
        if bad:  # pydantic compares fields only when each alone is good
            self._validate(bad)
        return None

    def _describe(self, details: Mapping[str, Any]) -> list[str]:
        message = details["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if not details["loc"]:
            return str(message).splitlines()
        field, *path = map(str, details["loc"])
        if field == "plugin_settings":
            setting, value = ".".join(path[:2]), details["input"]
        else:
            setting, value = field, self.values[field]
        return [f"{setting} = {reprlib.repr(value)} ({self.origins[setting]}): {message}"]


def _is_service_link(key: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(key)) or (key.endswith("PORT") and "://" in value)


def _unknown(field: str, place: str) -> str:
    if field in _NOT_OFFERED:
        return f"{field} ({place}) is not offered: {_NOT_OFFERED[field]}"
    near = difflib.get_close_matches(field, EngineConfig.model_fields, n=1)
    return f"{field} ({place}) is no setting" + (f"; did you mean {near[0]}?" if near else "")


def _joined(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  - {line}" for line in problems)
    return f"{len(problems)} problems in the configuration:{lines}"


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _flattened(table: Mapping[str, Any]) -> dict[str, Any]:
    """Read `[plugins.parallel.tp]`, which TOML takes for nested tables, as `[plugins."parallel.tp"]`."""
    result = {}
    for name, value in table.items():
        is_kind = "." not in name and ":" not in name and isinstance(value, dict)
        result.update(
            {f"{name}.{key}": item for key, item in value.items()} if is_kind else {name: value}
        )
    return result


def _find_line(text: str, field: str, setting: str) -> str:
    """Find where a file sets a field, or a setting of a plugin; empty if it is not on a line of its own."""
    wanted = f"plugins.{setting}" if field == "plugin_settings" else setting or field
    header = ""
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"[\"'\s]", "", line)
        if match := re.match(r"\[([^\[\]]+)\]", bare):
            header = match[1].replace("plugin_settings.", "plugins.", 1) + "."
        elif f"{header}{bare}".startswith(f"{wanted}="):
            return f" line {number}"
    return ""


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(old, value)
        else:
            result[key] = value
    return result


# --- assignments -----------------------------------------------------------------------------------


def parse_assignments(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read the values of `--set`: `plugin.key=value`, the value in TOML or else as it is.

    :return: settings by plugin, as `plugin_settings` takes them.
    :raises ConfigError: lists every item that is no such assignment.
    """
    settings: dict[str, dict[str, Any]] = {}
    problems = []
    for item in items:
        name, is_assignment, text = item.partition("=")
        plugin, path = _split_setting(name.strip())
        if not is_assignment or not path or not all((*plugin.split("."), *path)):
            problems.append(f"--set {item}: must be plugin.key=value, such as parallel.tp.size=2")
            continue
        value: Any = _parse_value(text.strip())
        for key in reversed(path):
            value = {key: value}
        settings[plugin] = _merged(settings.get(plugin, {}), value)
    if problems:
        raise ConfigError(_joined(problems))
    return settings


def _split_setting(name: str) -> tuple[str, list[str]]:
    """Split `parallel.tp.size` into plugin and path; only the last part of `py:a.b.c` is the path."""
    parts = name.split(".")
    num_head = len(parts) - 1 if name.startswith("py:") else 2
    return ".".join(parts[:num_head]), parts[num_head:]


def _parse_value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
        json.dumps(table)  # dates are TOML, but not plain data
    except (ValueError, TypeError):
        return text
    return table["value"] if len(table) == 1 else text
