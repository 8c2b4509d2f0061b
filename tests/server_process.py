"""`python -m core serve` as its users run it: a process with a port, an output and an end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import psutil


def heed_interrupts():
    """Have a new process end with SIGINT: what shells start in the background ignores it, children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class ServerProcess:
    """A server on a free port; stopped by leaving the `with` block."""

    def __init__(self, *arguments, folder, env=None, port=None):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = port or probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.error_file = folder / f"stderr-{self.port}.txt"
        command = [
            sys.executable,
            "-m",
            "core",
            "serve",
            *map(str, arguments),
            "--port",
            str(self.port),
        ]
        with self.error_file.open("w") as stderr:
            self.process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                preexec_fn=heed_interrupts,  # noqa: PLW1509  it takes no lock
            )
        self.started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in psutil.Process(self.process.pid).children() if self.is_alive else ():
            process.kill()
        self.process.kill()
        self.process.wait()

    @property
    def is_alive(self):
        return self.process.poll() is None

    @property
    def errors(self):
        return self.error_file.read_text()

    @property
    def engine(self):
        """The engine's process."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def wait_until_listening(self):
        while self.is_alive and time.monotonic() < self.started + 60:
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
            except OSError:
                time.sleep(0.02)
            else:
                return self
        raise AssertionError(self.errors)

    def wait_until_ready(self):
        self.wait_until_listening()
        while self.is_alive and time.monotonic() < self.started + 100:
            if self.get("/readyz")[0] == 200:
                return self
            time.sleep(0.05)
        raise AssertionError(self.errors)

    def get(self, path, body=None, headers=None):
        """Status, headers and body of one exchange."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, headers or {})  # noqa: S310  of our own server
        try:
            with urlopen(request, timeout=60) as response:  # noqa: S310
                return response.status, response.headers, response.read()
        except OSError as error:
            if not hasattr(error, "code"):
                raise
            with error:
                return error.code, error.headers, error.read()

    def open_stream(self, **body):
        """Send one streaming request; returns a binary file of the response."""
        data = json.dumps({"prompt": "Hello", "stream": True, "ignore_eos": True, **body}).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), 60)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
        sock.sendall((head + "Connection: close\r\n\r\n").encode() + data)
        file = sock.makefile("rb")
        sock.close()  # the file holds it open
        return file

    @staticmethod
    def wait_for_token(stream):
        """Read a stream up to its first event."""
        while b"data: " not in stream.readline():
            pass
