"""A short run of the soak: many streams, leavers and invalid requests; see tests/soak_http.py."""

from __future__ import annotations

import anyio
import pytest
import soak_http


def test_every_request_is_accounted_for(tmp_path):
    soak_http.soak(soak_http.make_model(tmp_path / "model"), seconds=6, num_streams=200)


def test_what_goes_wrong_is_noticed(tmp_path, monkeypatch):
    """The detector's own test: blocks that are kept, and a terminal event that is lost."""
    from core.kv_cache import PagedKVCache  # noqa: PLC0415  planted fault

    model = soak_http.make_model(tmp_path / "model")
    count = iter(range(10**9))
    free = PagedKVCache.free
    monkeypatch.setattr(
        PagedKVCache, "free", lambda self, request: next(count) % 50 == 49 or free(self, request)
    )
    monkeypatch.setattr(soak_http, "settle", _settle_briefly)
    with pytest.raises(AssertionError, match="blocks in use at the end"):
        soak_http.soak(model, seconds=2, num_streams=20)


async def _settle_briefly(_service):
    await anyio.sleep(1.0)
