"""Download the sources, and read the texts in them without unpacking or running anything of theirs."""

from __future__ import annotations

import io
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE: Final = Path(__file__).with_name("sources.toml")
DOWNLOAD_SECONDS: Final = 180
NUM_DOWNLOADS: Final = 3
TEXT_SUFFIXES: Final = (".py", ".rst", ".md", ".txt")
SUFFIXES: Final = {"wheel": ".whl", "sdist": ".tar.gz", "deb": ".deb"}


@dataclass(frozen=True, slots=True)
class Source:
    """A distribution to read.

    :param kind: `wheel`, `sdist`, `deb`, or `folder`.
    :param path: the archive or the folder; `None` until it has been fetched.
    """

    kind: str
    name: str
    licence: str
    path: Path | None = None

    @property
    def version(self) -> str:
        """What the name of the archive says; empty for a folder."""
        if self.path is None or self.kind == "folder":
            return ""
        stem = self.path.name.removesuffix(SUFFIXES[self.kind])
        match self.kind:
            case "deb":
                return unquote(stem.split("_")[1])
            case "wheel":
                return stem.split("-")[1]
            case _:
                return stem.rpartition("-")[2]


def load_table(path: Path = TABLE) -> list[Source]:
    """Return the sources that a table lists."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Source(kind, name, licence)
        for kind, licences in table.items()
        for licence, names in licences.items()
        for name in names.split()
    ]


def standard_library() -> Source:
    """Return the running Python's own library."""
    return Source(
        "folder", f"cpython-{platform.python_version()}", "PSF-2.0", Path(sysconfig.get_path("stdlib"))
    )


def fetch_all(sources: list[Source], cache: Path) -> list[Source]:
    """Download what the cache lacks; what cannot be had is named and left out."""
    with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
        found = list(pool.map(lambda source: _fetch(source, cache), sources))
    for source in found:
        if source.path is None:
            print(f"left out: {source.kind} {source.name} could not be downloaded", file=sys.stderr)
    return [source for source in found if source.path is not None]


def _fetch(source: Source, cache: Path) -> Source:
    folder = cache / source.kind
    folder.mkdir(parents=True, exist_ok=True)
    path = _find(source, folder)
    if path is None:
        try:
            subprocess.run(  # noqa: S603  names come from the table
                _command(source),
                cwd=folder,
                check=True,
                capture_output=True,
                timeout=DOWNLOAD_SECONDS,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired, FileNotFoundError):
            return source
        path = _find(source, folder)
    return Source(source.kind, source.name, source.licence, path)


def _command(source: Source) -> list[str]:
    if source.kind == "deb":
        return ["apt-get", "download", "-q", source.name]
    option = "--only-binary" if source.kind == "wheel" else "--no-binary"
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", option, ":all:", source.name]


def _find(source: Source, folder: Path) -> Path | None:
    start = re.compile(re.escape(_canonical(source.name)) + r"-v?\d")
    names = sorted(folder.glob(f"*{SUFFIXES[source.kind]}"))
    return next((path for path in names if start.match(_canonical(path.name))), None)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_texts(source: Source) -> Iterator[tuple[str, str]]:
    """Yield path and text of every file that looks like Python code or documentation."""
    for path, data in _read_files(source):
        try:
            yield path, data.decode()
        except UnicodeDecodeError:
            continue


def _read_files(source: Source) -> Iterator[tuple[str, bytes]]:
    if source.path is None:
        raise ValueError(f"{source.name}: not fetched")
    match source.kind:
        case "folder":
            for path in sorted(source.path.rglob("*")):
                if path.suffix in TEXT_SUFFIXES and path.is_file():
                    yield str(path.relative_to(source.path)), path.read_bytes()
        case "wheel":
            with zipfile.ZipFile(source.path) as archive:
                for name in archive.namelist():
                    if name.endswith(TEXT_SUFFIXES):
                        yield name, archive.read(name)
        case "sdist":
            with tarfile.open(source.path) as archive:
                yield from _read_tar(archive)
        case "deb":
            command = ["dpkg-deb", "--fsys-tarfile", str(source.path)]
            data = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603  our own file
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                yield from _read_tar(archive)
        case _:
            raise ValueError(f"{source.name}: unknown kind {source.kind!r}")


def _read_tar(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and member.name.endswith(TEXT_SUFFIXES):
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()
