"""Compiles Gluon kernels for Hopper where there is no GPU: what does not fit or is no program fails here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

HOPPER = GPUTarget("cuda", 90, 32)


def boxes(shape, layout):
    """Name the type of a descriptor of bf16 boxes."""
    return f"tensordesc<bf16{list(shape)},{layout!r}>"


def compile_for_hopper(kernel, types, constants, **options):
    """Compile.

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
    return compiled


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
