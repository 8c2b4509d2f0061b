"""The small model that comes with cythera: `demo` in place of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "demo"
FOLDER: Final = Path(__file__).with_name("model")


def find_model(model: str) -> str:
    """Turn `demo` into the folder of the bundled model, unless there is a folder of that name here."""
    if model == NAME and not Path(NAME).is_dir():
        return str(FOLDER)
    return model
