"""How well a text is predicted, and what quantizing changed about that, while layers go by one by one.

Two streams run beside the calibration: the text through the layers as they were, and through the
layers as they are written.  So neither model has to fit into memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from torch.nn import functional

from core.quant.layers import run, split_samples
from core.quant.report import Quality

if TYPE_CHECKING:
    import torch

    from core.model.decoder import Decoder
    from core.quant.samples import Samples

ROWS_AT_ONCE: Final = 256
"""Positions whose logits exist at the same time."""


class QualityProbe:
    """Compares a model with its quantized self on a text.

    :param name: of the text, for the report.
    """

    def __init__(self, samples: Samples, name: str) -> None:
        self._samples = samples
        self._name = name
        self._before = split_samples(samples.tokens)
        self._after = list(self._before)

    def advance_before(self, exact: Decoder) -> None:
        """Run a layer as it was read."""
        _advance(exact, self._before)

    def advance_after(self, quantized: Decoder) -> None:
        """Run the same layer as it is written."""
        _advance(quantized, self._after)

    def measure(self, last: Decoder) -> Quality:
        """Compute the result after all layers have run.

        :param last: the decoder of the last layer, which has the head.
        """
        device = next(last.parameters()).device
        first = self._samples.first_target
        tokens = split_samples(self._samples.tokens)
        losses, num_agreed = [0.0, 0.0], 0
        for targets, *pair in zip(tokens, self._before, self._after, strict=True):
            flat = targets[:, first:].flatten().to(device)
            hidden = [stream[:, first - 1 : -1].flatten(0, 1).to(device) for stream in pair]
            rows = zip(flat.split(ROWS_AT_ONCE), *(h.split(ROWS_AT_ONCE) for h in hidden), strict=True)
            for some, before, after in rows:
                logits = (last.logits(before).float(), last.logits(after).float())
                for index, scores in enumerate(logits):
                    losses[index] += float(functional.cross_entropy(scores, some, reduction="sum"))
                num_agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        count = self._samples.num_targets
        before, after = (math.exp(loss / count) for loss in losses)
        return Quality(self._name, count, before, after, num_agreed / count)


def _advance(decoder: Decoder, stream: list[torch.Tensor]) -> None:
    for index, chunk in enumerate(stream):
        stream[index] = run(decoder, chunk)
