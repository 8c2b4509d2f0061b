"""The real FlashInfer on a GPU.  Skipped without either; the first run compiles kernels for many minutes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from core.testing.attention import AttentionConformance
from plugins.attention import flashinfer as plugin

if TYPE_CHECKING:
    from core.testing.attention import Case

(ENTRY,) = plugin.core_register_attention()

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs flashinfer"),
    pytest.mark.timeout(3600),
]


class TestFlashInferOnCuda(AttentionConformance):
    entry = ENTRY
    device = "cuda"
    dtypes = ("bfloat16",)
    head_dims = (64, 128)
    block_sizes = (64, 16)
    settings = settings(AttentionConformance.settings, max_examples=10)

    def cases(self, **fixed: Any) -> st.SearchStrategy[Case]:
        """Few kinds of layers, as each wants kernels of its own."""
        return super().cases(**({"softcap": st.sampled_from([None, 20.0])} | fixed))
