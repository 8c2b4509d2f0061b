"""Writes a starting package from the templates of its kind."""

from __future__ import annotations

import difflib
import keyword
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING, Final

import core
from core.errors import ConfigError
from core.hookspecs import API_VERSION, PROJECT_NAME
from core.pluginhost import discover
from core.scaffold.kinds import STARTERS, Starter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

MAX_NAME_LENGTH: Final = 32
RESERVED: Final = frozenset({"auto", "none", "default", "paged", "single", "mp", "http"})
"""Names of parts that the core brings, and words that settings read as something else."""
SUFFIX: Final = ".tmpl"
SHARED: Final = "every_kind"
"""The folder of the templates that all kinds have."""


@dataclass(frozen=True, slots=True)
class NewPackage:
    """A starting package, and all that it is called."""

    kind: str
    name: str
    """Of the part, as settings name it: `acme`."""

    @property
    def starter(self) -> Starter:
        """What the kind has to say."""
        return STARTERS[self.kind]

    @property
    def plugin(self) -> str:
        """The name that `--plugins` takes: `attention.acme`."""
        return f"{self.starter.prefix or self.kind}.{self.name}"

    @property
    def module(self) -> str:
        """The import package: `cythera_acme`."""
        return f"{PROJECT_NAME}_{self.name}"

    @property
    def distribution(self) -> str:
        """The name that pip takes: `cythera-acme`."""
        return self.module.replace("_", "-")

    @property
    def use(self) -> str:
        """A command that uses the plugin."""
        return "python -m core " + self._fill(self.starter.use)

    def next_commands(self, folder: Path) -> tuple[str, ...]:
        """List what to type once the package is there."""
        return (
            f'cd {shlex.quote(str(folder))} && python -m pip install -e ".[dev]"',
            "python -m pytest",
            self.use,
        )

    def files(self) -> Iterator[tuple[PurePosixPath, str]]:
        """Fill in the templates: path within the package's folder, and content."""
        templates = resources.files(__package__) / "templates"
        for folder in (SHARED, self.kind):
            for template in sorted((templates / folder).iterdir(), key=lambda file: file.name):
                yield self._place(template, is_shared=folder == SHARED), self._render(template)
        yield PurePosixPath(self.module, "py.typed"), ""

    def _place(self, template: Traversable, *, is_shared: bool) -> PurePosixPath:
        name = template.name.removesuffix(SUFFIX)
        if is_shared:
            return PurePosixPath("." + name if name == "gitignore" else name)
        if name.startswith("test_"):
            return PurePosixPath("tests", f"test_{self.name}.py")
        return PurePosixPath(self.module, name)

    def _render(self, template: Traversable) -> str:
        text = Template(template.read_text(encoding="utf-8"))
        return text.substitute(
            api=".".join(map(str, API_VERSION)),
            distribution=self.distribution,
            first=self._fill(self.starter.first),
            kind=self.kind,
            module=self.module,
            name=self.name,
            plugin=self.plugin,
            summary=self.starter.summary,
            use=self.use,
            version=core.__version__,
        )

    def _fill(self, text: str) -> str:
        return text.format(name=self.name, plugin=self.plugin)


def make_package(kind: str, name: str, parent: Path) -> tuple[NewPackage, Path]:
    """Write a starting package.

    :param kind: a key of `STARTERS`.
    :param name: of the plugin, with or without `cythera-` before it.
    :param parent: folder in which a new one is made, called as the distribution.
    :return: the package, and its folder.
    :raises ConfigError: the kind or the name will not do, or the folder cannot be made.
    """
    package = NewPackage(_check_kind(kind), _check_name(name))
    _check_free(package)
    folder = parent / package.distribution
    try:
        folder.mkdir(parents=True)
        for path, text in package.files():
            target = folder / path
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(
            f"{folder} exists already; choose another NAME, or another folder with --out"
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror} (--out)") from error
    return package, folder


def _check_kind(kind: str) -> str:
    if kind in STARTERS:
        return kind
    near = difflib.get_close_matches(kind, STARTERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"KIND {kind!r} is none of {', '.join(STARTERS)}{hint}")


def _check_name(name: str) -> str:
    """Spell a name as Python does, without what every distribution's name begins with."""
    bare = re.sub(r"[-_.]+", "_", name).lower().removeprefix(f"{PROJECT_NAME}_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]|[a-z]", bare):
        raise ConfigError(
            f"NAME {name!r} must consist of letters, digits and single - between them, and begin with a "
            f"letter: my-plugin"
        )
    if len(bare) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"NAME {name!r} has {len(bare)} characters; at most {MAX_NAME_LENGTH} will do"
        )
    if bare in RESERVED or keyword.iskeyword(bare):
        raise ConfigError(f"NAME {name!r} means something else already; choose another one")
    return bare


def _check_free(package: NewPackage) -> None:
    taken = discover().get(package.plugin)
    if taken is not None:
        raise ConfigError(f"{package.plugin} is a plugin of {taken.owner} already; choose another NAME")
