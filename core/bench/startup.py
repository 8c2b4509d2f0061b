"""`python -m core bench startup`: how long it takes from the command to the first token.

Each run is a server of its own, `python -m core serve`.  A cold run finds no compiled kernels: the
variables that say where compilers keep them point to an empty folder.  A warm run finds those of the run
before it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from core.bench.offline import PERCENTILES, adapt_config
from core.bench.progress import show_progress
from core.config import DEFAULT_ORIGIN
from core.errors import CytheraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.config import EngineConfig

CACHE_VARIABLES: Final = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "xdg",
}
"""Where compilers, drivers and cythera itself keep what they have made, by variable."""
NOT_FLAGS: Final = frozenset({"model", "host", "port"})
"""Settings that the measurement makes itself."""
POLL_SECONDS: Final = 0.01
STOP_SECONDS: Final = 60.0
TAIL: Final = 2000
"""Characters of a server's last words that an error quotes."""
PROMPT: Final = (5, 6, 7, 8)


@dataclass(slots=True)
class Startup:
    """One start.  Seconds since the process was started."""

    is_cold: bool
    port_open: float = 0.0
    ready: float = 0.0
    first_token: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds that each phase of `/readyz` took, as far as a client can see."""


class _Starting:
    """One server on its way up."""

    def __init__(self, config: EngineConfig, folder: Path, timeout: float, *, is_cold: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self._log = folder / "stderr.txt"
        self._folder = folder
        self._config = config.model_copy(
            update={"host": "127.0.0.1", "port": self._port, "api_key": ()}
        )
        self._timeout = timeout
        self._result = Startup(is_cold)

    def measure(self, caches: Path) -> Startup:
        """Start the server, wait for its first token, and end it."""
        config, flags = self._config, to_flags(self._config)
        address = ["--host", "127.0.0.1", "--port", str(self._port)]
        command = [sys.executable, "-m", "core", "serve", config.model, *flags, *address]
        own = {name: value for name, value in os.environ.items() if not name.startswith("CYTHERA_")}
        # What was downloaded is no compiled kernel.
        hub = Path(own.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
        own.setdefault("HF_HOME", str(hub))
        environ = own | {name: str(caches / folder) for name, folder in CACHE_VARIABLES.items()}
        with self._log.open("w", encoding="utf-8") as log:
            self._begin = time.perf_counter()
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_for_port()
            self._wait_until_ready()
            self._wait_for_token()
        finally:
            self._stop()
        return self._result

    def _passed(self) -> float:
        """Seconds since the start.

        :raises CytheraError: it takes too long, or the server has ended.
        """
        passed = time.perf_counter() - self._begin
        if (code := self._process.poll()) is not None:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
            raise CytheraError(f"the server ended with exit code {code}:\n{tail}")
        if passed > self._timeout:
            raise CytheraError(f"the server needs more than {self._timeout:g} s (--timeout)")
        return passed

    def _wait_for_port(self) -> None:
        while True:
            passed = self._passed()
            try:
                socket.create_connection(("127.0.0.1", self._port), 1.0).close()
            except OSError:
                time.sleep(POLL_SECONDS)
            else:
                self._result.port_open = passed
                return

    def _wait_until_ready(self) -> None:
        phase, since = "starting", 0.0
        while True:
            passed = self._passed()
            status, body = self._ask("GET", "/readyz")
            found = str(json.loads(body or b"{}").get("phase", phase))
            if found != phase:
                self._result.phases[phase] = passed - since
                phase, since = found, passed
            if status == http.HTTPStatus.OK:
                self._result.ready = passed
                return
            time.sleep(POLL_SECONDS)

    def _wait_for_token(self) -> None:
        request = {"prompt": list(PROMPT), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        status, body = self._ask("POST", "/v1/completions", json.dumps(request))
        if status != http.HTTPStatus.OK:
            text = body[:TAIL].decode(errors="replace")
            raise CytheraError(f"the first request was answered with {status}: {text}")
        self._result.first_token = self._passed()

    def _ask(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout)
        with closing(connection):
            try:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException):
                self._passed()  # says why, if the server has ended
                return 0, b""

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def to_flags(config: EngineConfig) -> list[str]:
    """Write what somebody has set as flags of `serve`; what is unset stays so, and keys are left out."""
    flags = []
    for name, value in config.to_dict().items():
        flag = "--" + name.replace("_", "-")
        if name == "plugin_settings":
            for plugin, settings in value.items():
                flags += [
                    word
                    for key, item in settings.items()
                    for word in ("--set", f"{plugin}.{key}={_toml(item)}")
                ]
        elif name in NOT_FLAGS or config.origin_of(name) == DEFAULT_ORIGIN or value is None:
            continue
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag}={','.join(value) if isinstance(value, list) else value}")
    return flags


def _toml(value: Any) -> str:
    """Write a setting of a plugin as TOML, which differs from JSON in its tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def measure(
    config: EngineConfig, *, num_cold: int, num_warm: int, timeout: float = 1800.0
) -> list[Startup]:
    """Start servers one after another, the cold ones first.

    Without a cold run, warm ones find the kernels of a first one that is not counted.

    :param timeout: seconds that one may take.
    :raises CytheraError: a server does not start.
    """
    config = adapt_config(config, load_format="dummy")
    results: list[Startup] = []
    with (
        tempfile.TemporaryDirectory(prefix="cythera-startup-") as folder,
        show_progress("starts", num_cold + num_warm) as advance,
    ):
        number_of_runs = num_cold + num_warm + (num_cold == 0)
        caches = Path(folder)
        for number in range(number_of_runs):
            is_cold = number < max(1, num_cold)
            own = Path(folder) / str(number)
            own.mkdir()
            caches = own / "caches" if is_cold else caches
            result = _Starting(config, own, timeout, is_cold=is_cold).measure(caches)
            if not is_cold or num_cold:
                results.append(result)
                advance()
    return results


def to_dict(results: Sequence[Startup]) -> dict[str, Any]:
    """Plain data for a file of results."""
    runs = {name: [r for r in results if r.is_cold == cold] for name, cold in _KINDS}
    return {
        name: {**_figures(found), "runs": [asdict(r) for r in found]} for name, found in runs.items()
    }


_KINDS: Final = (("cold", True), ("warm", False))
_MOMENTS: Final = (("port open", "port_open"), ("ready", "ready"), ("first token", "first_token"))


def _figures(results: Sequence[Startup]) -> dict[str, Any]:
    if not results:
        return {}
    figures: dict[str, Any] = {}
    for _, name in _MOMENTS:
        values = [getattr(result, name) for result in results]
        figures[f"avg_{name}"] = float(np.mean(values))
        figures[f"{name}_percentiles"] = {str(p): float(np.percentile(values, p)) for p in PERCENTILES}
    return figures


def report(results: Sequence[Startup]) -> str:
    """Format a table of averages, and the phases."""
    return "\n".join(_lines(results))


def _lines(results: Sequence[Startup]) -> Iterator[str]:
    titles = [f"{title} s" for title, _ in _MOMENTS]
    yield f"{'start':<6} {'runs':>4} " + " ".join(f"{title:>14}" for title in titles)
    for kind, is_cold in _KINDS:
        found = [result for result in results if result.is_cold == is_cold]
        if not found:
            continue
        figures = _figures(found)
        values = " ".join(f"{figures[f'avg_{name}']:>14.2f}" for _, name in _MOMENTS)
        yield f"{kind:<6} {len(found):>4} {values}"
        names = dict.fromkeys(name for result in found for name in result.phases)
        parts = (f"{n} {np.mean([r.phases.get(n, 0.0) for r in found]):.2f}" for n in names)
        yield f"       of which: {', '.join(parts)}"
    yield "seconds since the process was started, on average"
