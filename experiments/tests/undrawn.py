"""A stand-in for matplotlib's `Figure.savefig` in tests that do not look at what a run draws: half of three steps' time is the layout of curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def one_pixel(figure: Any, path: Path, **_: Any) -> None:
    """Write an empty SVG, or a picture of one pixel."""
    if Path(path).suffix == ".svg":
        Path(path).write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    else:
        Image.new("RGB", (1, 1)).save(path)
