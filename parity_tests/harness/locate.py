"""Where they part: the first failed check in run order, as one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .compare import RULES, Check
from .explain import Diagnosis

# a layer on the reference's own input says most about where; what is built on it says less
RANK = ("conversion", "coverage", "forced", "free", "voting", "rounding", "gradients", "splits", "optimiser", "effects", "observability")


def number(value: float) -> str:
    """A number as reports print it: two digits, exact zero and infinities spelled."""
    if math.isnan(value):
        return "nan"
    if value == 0.0 or math.isinf(value):
        return "0" if value == 0.0 else ("inf" if value > 0 else "-inf")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if abs(int(exponent)) > 2 else f"{value:.3g}"


def first(checks: Sequence[Check]) -> Check | None:
    """The failed check that says where to look: most telling tier first, layers before whole models, then the earliest in run order."""
    wrong = [(place, check) for place, check in enumerate(checks) if not check.held]
    if not wrong:
        return None

    def key(item: tuple[int, Check]) -> tuple:
        place, check = item
        whole = "end to end" in check.regime
        rank = RANK.index(check.tier) if check.tier in RANK else len(RANK)
        return (check.quantity != "determinism", rank, whole, check.order, check.rule == 10, place)

    return min(wrong, key=key)[1]


def handed(checks: Sequence[Check]) -> bool:
    """Whether the layer that is first to part in a free run is right by itself: what it was handed is wrong.

    Every module but the model itself is compared by itself, so it is the model's own code between its modules that is wrong then.
    """
    check = first(checks)
    if check is None or check.tier != "free" or not check.where:
        return False
    alone = [item for item in checks if item.tier == "forced" and item.where == check.where]
    return bool(alone) and all(item.held for item in alone)


def place(checks: Sequence[Check]) -> str:
    """Path of the module in which they part, "" for the model itself."""
    check = first(checks)
    return "" if check is None or handed(checks) else check.where


def sentence(checks: Sequence[Check], input_errors: Mapping[str, float], diagnosis: Diagnosis | None = None) -> str:
    """"parts at PATH: relative L2 3.1e-2 (allowed 1e-12) on an input that agrees to 4e-16; looks like: ...", or "" when everything held."""
    check = first(checks)
    if check is None:
        return ""
    where = check.where or "the whole model"
    leaf = f" ({check.leaf})" if check.leaf else ""
    under = f"{check.dtype}, {check.tier}, {check.regime}"
    failed_rules = sorted({item.rule for item in checks if not item.held})
    rules = f"rule{'s' * (len(failed_rules) > 1)} {', '.join(f'{rule} {RULES[rule]}' for rule in failed_rules)}"
    looks = "" if diagnosis is None else f"; {diagnosis}"
    odd = next((item.detail.partition(":")[0] for item in checks if item.tier == "voting" and not item.held and item.quantity == "votes"), None)
    looks += "" if odd is None or check.tier == "voting" else f"; {odd}"
    if check.detail and check.quantity != "slope - 1":
        return f"parts at {where}{leaf}: {check.detail}{looks} [{under}; {rules}]"
    allowed = "needed" if check.quantity == "cosine" else "allowed"
    text = f"parts at {where}{leaf}: {check.quantity} {number(check.value)} ({allowed} {number(check.allowed)})"
    if check.tier in ("forced", "free", "rounding") and check.where:
        error = input_errors.get(check.where)
        text += " on the reference's own input" if error is None else f" on an input that agrees to {number(error)}"
    if handed(checks):
        text += ", and is right by itself: what the model hands it is wrong"
    return f"{text}{looks} [{under}; {rules}]"
