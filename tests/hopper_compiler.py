"""Compiles Gluon kernels for Hopper where there is no GPU: what does not fit or is no program fails here."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

HOPPER = GPUTarget("cuda", 90, 32)


def boxes(shape, layout):
    """Name the type of a descriptor of bf16 boxes."""
    return f"tensordesc<bf16{list(shape)},{layout!r}>"


def compile_for_hopper(kernel, types, constants, **options):
    """Compile, and return the shared memory that one program takes, in bytes.

    :param types: of the arguments that are no constants, by name; pointers count as aligned.
    """
    names = kernel.arg_names
    places = {name: (names.index(name),) for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = GluonASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[n]: [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": 4, **options})
    assert b"ELF" in compiled.asm["cubin"][:4]
    return compiled.metadata.shared
