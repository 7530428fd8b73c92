"""Schema of `parity.yaml`, as in `conf.schema`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.models import whole
from conf.schema import TrackerConfig

PRECISIONS = ("float64", "float32", "bfloat16", "float16")
ALL = "all"


@dataclass(frozen=True)
class ParityConfig:
    """Root of `parity.yaml`: one battery for every case, precision and seed; each of the three is one value or a list of them.

    `case` names cases of `source` (all of them: "all") or says where another is, as in file.py:name. `dtype` is the precision that is compared
    beside float64; float64 leaves the rounding out. Empty `tiers` and `regimes` are all tiers, and those of the case. `history` is a folder:
    the reports below it, of this command or of `parity run --json`, are shown beside the new ones, the newest `history_files` of them.
    """

    case: Any = ALL
    dtype: Any = "float32"
    seed: Any = 0
    source: str = "parity_tests.specs:CASES"
    tiers: list[str] = field(default_factory=list)
    regimes: list[str] = field(default_factory=list)
    threads: int | None = 1
    jit: bool = True
    history: str | None = "runs"
    history_files: int = 50
    output_dir: str = "runs"
    run_dir: str | None = None
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        for name, kind, words in (("case", str, "names of cases"), ("dtype", str, "precisions"), ("seed", int, "whole numbers of at least 0")):
            values = listed(getattr(self, name))
            if not values or not all(isinstance(value, kind) and not isinstance(value, bool) and value != "" for value in values):
                raise ValueError(f"{name} must be one or several {words}, found {getattr(self, name)!r}")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must name each of its values once, found {values}")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seed must be one or several whole numbers of at least 0, found {self.seed!r}")
        unknown = [dtype for dtype in self.dtypes if dtype not in PRECISIONS]
        if unknown:
            raise ValueError(f"dtype must be of {', '.join(PRECISIONS)}, found {unknown[0]!r}")
        if ALL in self.cases and len(self.cases) > 1:
            raise ValueError(f"case must be {ALL!r} or names, not both, found {self.cases}")
        if ":" not in self.source:
            raise ValueError(f"source must be module:name or file.py:name, found {self.source!r}")
        whole(self, history_files=1)
        if self.threads is not None:
            whole(self, threads=1)

    @property
    def cases(self) -> list[str]:
        """Names of cases as a list."""
        return listed(self.case)

    @property
    def dtypes(self) -> list[str]:
        """Precisions as a list."""
        return listed(self.dtype)

    @property
    def seeds(self) -> list[int]:
        """Seeds as a list."""
        return listed(self.seed)


def listed(value: Any) -> list[Any]:
    """A value as a list of one; a list as it is."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
