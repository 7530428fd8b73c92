"""Gradient pathology: three symptoms per parameter, one point each; the score of a look is the sum of its points.

    zeros      more than 90 % of the entries are exactly zero
    opposed    cosine with the gradient of the look before is below -0.5, at this look and the three before it
    vanishing  norm below 1e-7

Being opposed once is nothing: in a healthy run a fifth of all parameters are, at any look, most of them biases and norms with few entries.
A gradient that turns round time after time is one that oscillates. A parameter is scored once it has had a gradient at all: one that
nothing reads yet (the memory bank's query before the first write) has none, and is counted as silent. Above a score of 5 the look is an
alert. Bounds are those of `conf.schema.MonitorsConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from conf.schema import MonitorsConfig
from experiments.monitors.findings import Finding

KIND = "pathology"


@dataclass
class Look:
    """One look: symptom -> parameters that show it, and the parameters that never had a gradient."""

    symptoms: dict[str, list[str]] = field(default_factory=lambda: {"zeros": [], "opposed": [], "vanishing": []})
    silent: list[str] = field(default_factory=list)
    turned: int = 0  # parameters that are opposed at this look, however often before

    @property
    def score(self) -> int:
        """Number of pairs of a parameter and a symptom."""
        return sum(map(len, self.symptoms.values()))

    def statistics(self) -> dict[str, float]:
        """Flat, ready to be logged."""
        counts = {f"pathology/{symptom}": float(len(names)) for symptom, names in self.symptoms.items()}
        return counts | {"pathology/score": float(self.score), "pathology/silent": float(len(self.silent)), "pathology/turned": float(self.turned)}


class Pathology:
    """Looks at gradients; remembers the last one of every parameter that ever had one."""

    def __init__(self, config: MonitorsConfig, last: Mapping[str, np.ndarray] | None = None, turns: Mapping[str, int] | None = None) -> None:
        """`last` and `turns`: what `arrays` and `record` gave."""
        self._config, self._last = config, dict(last or {})
        self._turns = dict(turns or {})  # looks in a row at which a parameter was opposed

    def look(self, gradients: Mapping[str, np.ndarray]) -> Look:
        """The symptoms of these gradients. One with entries that are not finite says nothing here, and is passed over."""
        look, config = Look(), self._config
        for name, gradient in gradients.items():
            flat = np.asarray(gradient, dtype=np.float64).ravel()
            norm = float(np.linalg.norm(flat))
            if not math.isfinite(norm):
                continue
            if name not in self._last and norm == 0:
                look.silent.append(name)
                continue
            if (flat == 0).mean() > config.zero_share:
                look.symptoms["zeros"].append(name)
            if norm < config.vanishing:
                look.symptoms["vanishing"].append(name)
            opposed = name in self._last and cosine(flat, self._last[name]) < config.opposed
            self._turns[name] = self._turns.get(name, 0) + 1 if opposed else 0
            look.turned += opposed
            if self._turns[name] >= config.opposed_looks:
                look.symptoms["opposed"].append(name)
            self._last[name] = flat.astype(np.float32)
        return look

    def findings(self, look: Look) -> list[Finding]:
        """An alert if the score is above the bound."""
        if look.score <= self._config.alert:
            return []
        parts = "; ".join(f"{symptom}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for symptom, names in look.symptoms.items() if names)
        return [Finding(KIND, "gradient", "warning", f"gradient pathology score {look.score} is above {self._config.alert}: {parts}")]

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint: the last gradients, flat, float32."""
        return dict(self._last)

    def record(self) -> dict[str, int]:
        """For a checkpoint: looks in a row at which a parameter was opposed, where there were any."""
        return {name: turns for name, turns in self._turns.items() if turns}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors, zero where one of them is zero."""
    a, b = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 0 else 0.0
