"""Compiles what would be launched for cards that are not here: what does not fit or is no program fails."""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[triton.compiler.CompiledKernel]]:
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
        assert b"ELF" in kernel.asm["cubin"][:4]
        compiled.append(kernel)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JITFunction, "run", compile_instead)
        yield compiled


def names_of(compiled: list[triton.compiler.CompiledKernel]) -> set[str]:
    """Return the names of kernels."""
    return {kernel.metadata.name for kernel in compiled}


def most_shared_bytes(compiled: list[triton.compiler.CompiledKernel]) -> int:
    """Return the shared memory that the greediest kernel takes."""
    return max(kernel.metadata.shared for kernel in compiled)


def disassemble(compiled):
    """List the instructions, in order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ;", text)


def matrices_in_flight(instructions):
    """Count, at each arrival at a barrier, loads of matrices whose result nobody has asked for yet."""
    counts, waiting = [], set()
    for instruction in instructions:
        loaded = re.match(r"(?:@!?U?P\d )?LDSM\S* (R\d+),", instruction)
        if loaded:
            waiting.add(loaded[1])
            continue
        waiting -= set(re.findall(r"\bR\d+\b", instruction.partition(",")[2]))
        if "SYNCS.ARRIVE" in instruction:
            counts.append(len(waiting))
    return counts
