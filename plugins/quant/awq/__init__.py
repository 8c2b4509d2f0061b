"""AWQ weights."""

from __future__ import annotations

core_api = "1.0"
