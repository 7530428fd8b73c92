"""The numbers that a report shows, taken from the checks of a result: by layer, by regime, by gradient, by tier, and over earlier results.

Of several checks the worst stands for all: the one furthest above, or least below, what it is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .battery import Result
from .compare import Check
from .locate import RANK, first
from .report import worst

END, LAYER = ", end to end", ", layer"


def ratio(check: Check) -> float:
    """The value in multiples of what is allowed; inf where nothing is allowed and there is something."""
    if check.allowed > 0.0:
        return check.value / check.allowed
    return math.inf if check.value > 0.0 or math.isnan(check.value) else 0.0


@dataclass
class Layer:
    """One module: its worst check by tier, rounding by precision, and the extremes of slope, cosine and ulp (float64, forced and free)."""

    path: str
    order: int
    forced: Check | None = None
    free: Check | None = None
    rounding: dict[str, Check] = field(default_factory=dict)
    gradients: Check | None = None
    slope: float | None = None
    cosine: float | None = None
    ulp: float | None = None

    @property
    def wrong(self) -> str:
        """"itself" when the layer on the reference's own input does not hold, "downstream" when only the free run does not, else empty."""
        if not all(check.held for check in (self.forced, *self.rounding.values()) if check is not None):
            return "itself"
        return "" if self.free is None or self.free.held else "downstream"


def layers(result: Result) -> list[Layer]:
    """Every module that was compared, in run order, the whole model last."""
    groups: dict[str, list[Check]] = {}
    for check in result.checks:
        if check.tier in ("forced", "free", "rounding", "gradients"):
            groups.setdefault(check.where, []).append(check)
    found = []
    for path, checks in groups.items():
        tier = {name: [check for check in checks if check.tier == name] for name in ("forced", "free", "rounding", "gradients")}
        exact = [check.measure for check in (*tier["forced"], *tier["free"]) if check.measure is not None]
        found.append(Layer(
            path, result.order.get(path, len(result.order)), worst(tier["forced"]), worst(tier["free"]),
            {dtype: worst(c for c in tier["rounding"] if c.dtype == dtype) for dtype in dict.fromkeys(c.dtype for c in tier["rounding"])},
            worst(tier["gradients"]), _extreme(abs(m.slope - 1.0) for m in exact), _extreme((m.cosine for m in exact), least=True),
            _extreme(m.max_ulp for m in exact if not math.isnan(m.max_ulp)),
        ))
    return sorted(found, key=lambda layer: (layer.path == "", layer.order, layer.path))


def _extreme(values: Iterable[float], least: bool = False) -> float | None:
    given = list(values)
    if not given or any(map(math.isnan, given)):
        return math.nan if given else None
    return min(given) if least else max(given)


def regimes(result: Result) -> list[tuple[str, dict[str, Check]]]:
    """By regime, in the order in which they ran: the worst check of the forced and the free tier and of every lower precision."""
    found: dict[str, dict[str, list[Check]]] = {}
    for check in result.checks:
        if check.tier in ("forced", "free", "rounding"):
            column = check.dtype if check.tier == "rounding" else check.tier
            found.setdefault(check.regime.removesuffix(END), {}).setdefault(column, []).append(check)
    return [(name, {column: worst(checks) for column, checks in columns.items()}) for name, columns in found.items()]


@dataclass
class Gradient:
    """One parameter or input: the worst check of its gradient in layers by themselves and end to end."""

    name: str
    where: str
    parameter: bool
    layer: Check | None
    whole: Check | None

    @property
    def held(self) -> bool:
        """Whether both held."""
        return all(check.held for check in (self.layer, self.whole) if check is not None)


def gradients(result: Result) -> list[Gradient]:
    """Every gradient that was compared by name, those that did not hold first, then in run order, parameters before inputs."""
    groups: dict[tuple[bool, str, str], list[Check]] = {}
    for check in result.checks:
        if check.tier == "gradients" and check.leaf:
            parameter = not check.leaf.startswith(("args.", "kwargs.", "input", "state")) and check.leaf != "loss"
            groups.setdefault((parameter, check.leaf.rpartition(".")[0] if parameter else check.where, check.leaf), []).append(check)
    found = [
        Gradient(leaf, where, parameter, worst(c for c in checks if not c.regime.endswith(END)), worst(c for c in checks if c.regime.endswith(END)))
        for (parameter, where, leaf), checks in groups.items()
    ]
    last = len(result.order)
    return sorted(found, key=lambda item: (item.held, not item.parameter, item.where == "", result.order.get(item.where, last)))


@dataclass
class Failure:
    """Checks of one tier, module, precision and rule that did not hold: the worst, how many, under which regimes, at which leaves."""

    check: Check
    count: int
    regimes: list[str]
    leaves: list[str]


def failures(result: Result) -> list[Failure]:
    """What did not hold, the most telling first: layers by themselves before what is built on them, then in run order."""
    groups: dict[tuple, list[Check]] = {}
    for check in result.checks:
        if not check.held:
            groups.setdefault(_group(check), []).append(check)
    found = [Failure(worst(checks), len(checks), list(dict.fromkeys(check.regime for check in checks)),
                     list(dict.fromkeys(check.leaf for check in checks if check.leaf))) for checks in groups.values()]

    said = first(result.checks)  # what the sentence is about

    def place(item: Failure) -> tuple:
        check = item.check
        rank = RANK.index(check.tier) if check.tier in RANK else len(RANK)
        return (said is not None and not any(other is said for other in groups[_group(check)]), rank, all(END in name for name in item.regimes),
                check.order, check.rule == 10)

    return sorted(found, key=place)


def _group(check: Check) -> tuple:
    return (check.tier, check.where, check.dtype, check.rule, check.detail if math.isinf(check.value) else "")


def by_tier(result: Result) -> dict[str, Check]:
    """The worst check that is a number, by tier; rounding by precision as well ("rounding float32")."""
    groups: dict[str, list[Check]] = {}
    for check in result.checks:
        if check.measure is not None or check.allowed > 0.0:
            groups.setdefault(f"rounding {check.dtype}" if check.tier == "rounding" else check.tier, []).append(check)
    return {name: worst(checks) for name, checks in groups.items()}


def key(result: Result) -> tuple:
    """What makes two results runs of the same question: the case, its seed and its precisions."""
    return (result.case, result.meta.get("seed"), tuple(result.meta.get("dtypes", ())))


def histories(results: Sequence[Result]) -> list[list[Result]]:
    """Results of the same question together, oldest first (by their time; in the order given where they have none)."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return [sorted(group, key=lambda result: str(result.meta.get("time", ""))) for group in groups.values()]


def labels(results: Sequence[Result]) -> list[str]:
    """What to call results on one page: the name of the case, with seed and precisions where several results of a case differ in them."""
    found = []
    for result in results:
        same = [other for other in results if other.case == result.case]
        parts = [result.case]
        if len({str(other.meta.get("seed")) for other in same}) > 1:
            parts.append(f"seed {result.meta.get('seed')}")
        if len({str(other.meta.get("dtypes")) for other in same}) > 1:
            parts.append(" ".join(dtype for dtype in result.meta.get("dtypes", ()) if dtype != "float64") or "float64")
        found.append(", ".join(parts))
    return found
