"""Compiles what would be launched for cards that are not there, and tells what it would take of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

if TYPE_CHECKING:
    from collections.abc import Iterator


class Compiled(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    name: str
    shared_bytes: int


@contextmanager
def compiling_for(capability: tuple[int, int], monkeypatch) -> Iterator[list[Compiled]]:
    """Compile launches for a card instead of running them, each kernel once.

    :return: all that were compiled.
    """
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    backend = make_backend(target)
    compiled, seen = [], set()

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        key = (self.__name__, str(specialization), str(options))
        if key in seen:
            return
        seen.add(key)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        kind = GluonASTSource if self.is_gluon() else ASTSource
        source = kind(self, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        compiled.append(Compiled(self.__name__, kernel.metadata.shared))

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", compile_instead)
        yield compiled
