"""Memory leaks: resident memory that keeps rising.

Resident memory also rises because buffers are first used, and then stays. So the samples are cut into thirds, the first of which is where a
process settles; a leak is a rise from the first third's median to the second's and again to the last's, the second rise at least half
the first, and more than the bound from the second to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments.monitors.findings import Finding
from experiments.monitors.memory import resident_bytes

KIND = "memory"
LEAST, MOST = 9, 300


def leaked(samples: Sequence[float], allowed: float) -> float | None:
    """Bytes by which memory rose from the second third of the samples to the last, if that is a leak of more than `allowed`; else None."""
    if len(samples) < LEAST:
        return None
    first, second, last = (float(np.median(part)) for part in np.array_split(np.asarray(samples, dtype=np.float64), 3))
    rise = last - second
    return rise if rise > allowed and second > first and rise > 0.5 * (second - first) else None


class LeakMonitor:
    """Resident memory at every look, the last 300 looks; older ones are thinned so that a slow leak still shows."""

    def __init__(self, megabytes: float) -> None:
        self._allowed = megabytes * 2**20
        self._samples: list[float] = []

    def look(self, resident: float | None = None) -> list[Finding]:
        """Take a sample, of this process unless one is given; one finding if memory leaks."""
        self._samples.append(float(resident_bytes() if resident is None else resident))
        if len(self._samples) > MOST:
            self._samples = self._samples[::2]
        rise = leaked(self._samples, self._allowed)
        if rise is None:
            return []
        message = f"memory keeps rising: {rise / 2**20:.0f} MB more than a third of the run ago, now {self._samples[-1] / 2**20:.0f} MB"
        return [Finding(KIND, "process", "warning", message)]


def check_leak(action: Callable[[], object], repeats: int, megabytes: float) -> float | None:
    """Megabytes by which repeating `action` made this process grow, if it leaks more than `megabytes`; else None."""
    samples = []
    for _ in range(max(repeats, LEAST)):
        action()
        samples.append(float(resident_bytes()))
    rise = leaked(samples, megabytes * 2**20)
    return None if rise is None else rise / 2**20
