"""A folder of text that every test of a run can read."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(9):
        (folder / f"{index}.txt").write_text(f"The rain in Spain, number {index}, stays mainly in the plain.\n" * (5 + index))
    return folder
