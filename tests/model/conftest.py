"""Fixtures of the model tests: a dense attention, and checkpoints that are written once."""

from __future__ import annotations

import pytest
import torch

from core.model.decoder import make_decoder
from core.model.families import load_hf_config, read_model
from core.model.linear import PlainScheme
from core.model.weights import load_weights
from core.testing.checkpoints import make_checkpoint

CPU = torch.device("cpu")


class DenseAttention:
    """Attention over one sequence, which it keeps whole: `meta` is the position of the first token."""

    def __init__(self):
        self.cache = {}

    def allocate_cache(self, spec, /):
        self.cache.clear()

    def cache_bytes_per_block(self, spec, /):
        return 0

    def prepare(self, batch, /):
        return batch.starts[0]

    def forward(self, q, k, v, spec, meta, /):
        keys, values = self.cache.get(spec.layer, (k[:0], v[:0]))
        keys, values = torch.cat((keys[:meta], k)), torch.cat((values[:meta], v))
        self.cache[spec.layer] = keys, values
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q, keys) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = torch.arange(meta, meta + len(q))[:, None] - torch.arange(len(keys))
        hidden = (distance < 0) | (distance >= (spec.window or len(keys)))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, values)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Give the folder of a variant's checkpoint, written at its first use."""
    folders = {}

    def get(variant):
        if variant not in folders:
            folders[variant] = make_checkpoint(variant, tmp_path_factory.mktemp(variant))
        return folders[variant]

    return get


@pytest.fixture(scope="session")
def build():
    """Make an empty decoder from a spec."""

    def make(spec, *, dtype=torch.float32, device=CPU, max_len=128, scheme=None):
        return make_decoder(
            spec,
            scheme=scheme or PlainScheme(),
            attention=DenseAttention(),
            dtype=dtype,
            device=device,
            max_len=max_len,
        )

    return make


@pytest.fixture(scope="session")
def load(build):
    """Make and fill the decoder of a folder."""

    def make(path, **options):
        decoder = build(read_model(load_hf_config(path)), **options)
        load_weights(decoder, path, device=CPU)
        return decoder

    return make


@pytest.fixture(scope="session")
def run():
    """Compute the logits of one sequence, in chunks of the given lengths or at once."""

    @torch.inference_mode()
    def compute(decoder, tokens, chunks=None):
        hidden, start = [], 0
        for count in chunks or [len(tokens)]:
            positions = torch.arange(start, start + count)
            hidden.append(decoder(torch.tensor(tokens[start : start + count]), positions, start))
            start += count
        return decoder.logits(torch.cat(hidden))

    return compute
