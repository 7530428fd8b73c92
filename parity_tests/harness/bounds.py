"""What is allowed, and why: a bound is a number with a reason, and one without a reason is refused.

A case lists its own bounds, most particular last; the defaults are those of the verdict. `on` is the quantity:

    forced, free, splits     relative L2 of every output and state leaf, float64
    gradients                relative L2 of every gradient, float64
    slope                    |least-squares slope - 1|, float64
    optimiser                relative L2 of every leaf and loss after the trajectory, float64
    float32, half            error in multiples of the reference's own error in that precision
    floor                    error that is always allowed, in multiples of eps x RMS of the output
    cosine                   least cosine of every leaf
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


class BoundError(ValueError):
    """A bound that is no bound: no reason, not a finite number, or on a quantity that does not exist."""


@dataclass(frozen=True)
class Bound:
    """`value` allowed for quantity `on` of outputs `leaf` at module paths `where` under regimes `regime` (shell patterns), because of `reason`.

    A leaf is an output by its place in the tree that the module gives, as reports name it (`"2.gate"`, and `""` for a single array); of gradients
    it is the parameter or input.

    Raises BoundError without a reason of at least two words, for a value that is not finite and positive, or an unknown quantity.
    """

    value: float
    reason: str
    on: str = "forced"
    where: str = "*"
    regime: str = "*"
    leaf: str = "*"

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or len(self.reason.split()) < 2:
            raise BoundError(f"a bound on {self.on} of {self.value!r} needs a reason, found {self.reason!r}")
        if self.on not in QUANTITIES:
            raise BoundError(f"a bound is on one of {', '.join(QUANTITIES)}, found {self.on!r}")
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value) or self.value < 0.0:
            raise BoundError(f"a bound on {self.on} must be a finite number of at least 0, found {self.value!r}")
        if self.on == "cosine" and not 0.0 < self.value <= 1.0:
            raise BoundError(f"a bound on cosine must lie in (0, 1], found {self.value!r}")

    def covers(self, on: str, where: str, regime: str, leaf: str = "") -> bool:
        """Whether this bound speaks of quantity `on` of `leaf` at module `where` under `regime`."""
        return self.on == on and all(fnmatchcase(*pair) for pair in ((where, self.where), (regime, self.regime), (leaf, self.leaf)))


QUANTITIES = ("forced", "free", "splits", "gradients", "slope", "optimiser", "float32", "half", "floor", "cosine")

DEFAULTS = (
    Bound(1e-9, "float64 rounding stays below 1e-11 in a clean port; a difference of meaning is above 1e-7", on="forced"),
    Bound(1e-9, "float64 rounding stays below 1e-11 in a clean port; a difference of meaning is above 1e-7", on="free"),
    Bound(1e-9, "a split changes the order of float64 sums only", on="splits"),
    Bound(1e-8, "float64 gradients lose one digit more than the forward pass", on="gradients"),
    Bound(1e-9, "a uniform scale is invisible to cosine; rounding has no slope", on="slope"),
    Bound(1e-9, "50 AdamW steps multiply float64 rounding by less than 1e5", on="optimiser"),
    Bound(16.0, "another order of the same float32 sums costs a small multiple of the reference's own error", on="float32"),
    Bound(2.0, "in half precision the rounding of the stored values dominates, which both sides share", on="half"),
    Bound(4.0, "a result that the reference happens to hit exactly may still differ by a few roundings", on="floor"),
    Bound(0.99, "the contract's rule; printed, and too weak to decide by itself", on="cosine"),
)


class Bounds:
    """The bounds of a case over the defaults; the last one that covers a place is the one that holds."""

    def __init__(self, own: Iterable[Bound] = ()) -> None:
        own = tuple(own)
        for bound in own:
            if not isinstance(bound, Bound):
                raise BoundError(f"a bound is a Bound(value, reason, on=...), found {bound!r}")
        self.all = DEFAULTS + own

    def find(self, on: str, where: str = "", regime: str = "as is", leaf: str = "") -> Bound:
        """The bound on quantity `on` of output `leaf` at module path `where` under `regime`."""
        return next(bound for bound in reversed(self.all) if bound.covers(on, where, regime, leaf))
