"""What a monitor finds, and which findings are new."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`kind` of monitor, `name` of what it looked at, `level` ("notice", "warning" or "error") and one line."""

    kind: str
    name: str
    level: str
    message: str


class Standing:
    """Findings that stand: one that is found again at the next look is not news, one that went away and came back is."""

    def __init__(self, standing: Iterable[str] = ()) -> None:
        self._standing = set(standing)

    def news(self, kinds: Iterable[str], found: Iterable[Finding]) -> list[Finding]:
        """Those of `found` that did not stand; findings of `kinds` that are no longer there stop standing."""
        found = list(found)
        names = {f"{finding.kind}:{finding.name}:{finding.level}": finding for finding in found}
        fresh = [finding for name, finding in names.items() if name not in self._standing]
        looked = tuple(f"{kind}:" for kind in kinds)
        self._standing = {name for name in self._standing if not name.startswith(looked)} | names.keys()
        return fresh

    def record(self) -> list[str]:
        """For a checkpoint."""
        return sorted(self._standing)
