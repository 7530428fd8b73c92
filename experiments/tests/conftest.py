"""A folder of text that every test of a run can read, and pictures that cost nothing where no test looks at them."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.tests.undrawn import one_pixel


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(9):
        (folder / f"{index}.txt").write_text(f"The rain in Spain, number {index}, stays mainly in the plain.\n" * (5 + index))
    return folder


@pytest.fixture
def drawn() -> None:
    """Asked for by the tests that look at what a run draws."""


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made in every test, and drawn in those that ask for it and in fixtures of whole files."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", one_pixel)
