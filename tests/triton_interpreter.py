"""Makes Triton's interpreter usable with current numpy, and several times as fast.

For modules that run in a process of their own, with TRITON_INTERPRET=1 from the start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

kernels_running = []


def run_interpreted(path, *options):
    """Run the tests of a file in a process whose Triton interprets, as that is decided on import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["-W", "ignore::RuntimeWarning", str(path)]  # of numpy: integers that wrap around, NaN
    done = subprocess.run(  # noqa: S603  the arguments are ours
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def patch():
    """Patch the interpreter of this process, once."""
    from triton.language import standard  # noqa: PLC0415  only where it is to interpret
    from triton.runtime import interpreter  # noqa: PLC0415  as above

    patch_tensor = interpreter._patch_lang_tensor
    patch_language = interpreter._patch_lang

    def patch_tensor_and_index(tensor, scope):
        """Let arrays of one element be numbers, as numpy before 2.4 did."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_language_once(function):
        """Patch for a kernel alone, with all that its helpers and those of Triton need.

        Triton patches anew for each call of a helper, which takes most of the time, and never takes
        that back, so that each call is slower than the one before.
        """
        if kernels_running:
            return interpreter._LangPatchScope()
        kernels_running.append(function)
        scopes = [patch_language(function), patch_language(standard.max.fn)]
        restore = scopes[0].restore

        def restore_all():
            scopes[1].restore()
            restore()
            kernels_running.clear()

        scopes[0].restore = restore_all
        return scopes[0]

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_lang = patch_language_once
    # A third of the time.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
