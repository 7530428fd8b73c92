"""Dying weights: a parameter whose root mean square has fallen below a hundredth of the greatest that it has had in this run.

Weight decay alone shrinks what gets no gradient; a layer that collapses, or one whose memory was overwritten with zeros, falls at once.
A parameter that has been zero from the start (the memory gate) has not died. The bound is that of `conf.schema.MonitorsConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from conf.schema import MonitorsConfig
from experiments.monitors.findings import Finding

KIND = "weights"


class DyingWeights:
    """Looks at parameters; remembers the greatest RMS of each."""

    def __init__(self, config: MonitorsConfig, greatest: Mapping[str, float] | None = None) -> None:
        self._config, self._greatest = config, dict(greatest or {})
        self._share: dict[str, float] = {}

    def look(self, arrays: Mapping[str, np.ndarray], names: Iterable[str]) -> list[Finding]:
        """One finding for each of `names` that is dying."""
        found = []
        for name in names:
            value = np.asarray(arrays[name], dtype=np.float64)
            rms = float(np.sqrt((value * value).mean()))
            greatest = max(rms, self._greatest.get(name, 0.0))
            self._greatest[name] = greatest
            self._share[name] = rms / greatest if greatest > 0 else 1.0
            if self._share[name] < self._config.dying:
                found.append(Finding(KIND, name, "warning", f"weights of {name} are dying: RMS {rms:.3g}, it has been {greatest:.3g}"))
        return found

    def statistics(self) -> dict[str, float]:
        """The smallest share of its greatest RMS that a parameter has left."""
        return {"weights/least_share": min(self._share.values())} if self._share else {}

    def record(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(self._greatest)
