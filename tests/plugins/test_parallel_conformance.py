"""The built-in strategies divide and join as strategies must."""

from __future__ import annotations

from core.testing.parallel import PipelineParallelConformance, TensorParallelConformance
from plugins.parallel import pp, tp

(TP,) = tp.core_register_parallel()
(PP,) = pp.core_register_parallel()


class TestTensorParallel(TensorParallelConformance):
    entry = TP


class TestPipelineParallel(PipelineParallelConformance):
    entry = PP
