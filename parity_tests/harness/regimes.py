"""The inputs under which two implementations are compared.

A regime is a length, a batch size, a carried state, or a transformation of the inputs. Small inputs reach the epsilon of a norm, a large
offset reaches a variance computed in one pass, a one-hot input reaches single rows of a weight, a repeated token reaches a position or a
state. Transformations of floats are applied to the float inputs of the model and, layer by layer, to the reference's own recorded inputs
of each forced layer, so that they reach every layer of a model that reads integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import tree

AS_IS = "as is"
PLANTED = "one NaN"
FLOAT_TRANSFORMS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "x 1e-3": lambda x: x * 1e-3,
    "+ 100": lambda x: x + 100.0,
    "one-hot": lambda x: one_hot(x),
    PLANTED: lambda x: one_nan(x),
}


@dataclass(frozen=True)
class Regime:
    """One way to make inputs: `transform` is a key of FLOAT_TRANSFORMS or "repeated token"; `length` and `batch` None are the case's own."""

    name: str
    length: int | None = None
    batch: int | None = None
    carried: bool = False
    transform: str | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and self.transform not in (*FLOAT_TRANSFORMS, "repeated token"):
            known = ", ".join((*FLOAT_TRANSFORMS, "repeated token"))
            raise ValueError(f"transform of regime {self.name!r} must be one of {known}, found {self.transform!r}")
        for field in ("length", "batch"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field} of regime {self.name!r} must be a whole number of at least 1, found {value!r}")

    @property
    def on_floats(self) -> bool:
        """Whether the regime transforms float values, and so can be applied to the recorded inputs of a layer."""
        return self.transform in FLOAT_TRANSFORMS


STANDARD = (
    Regime(AS_IS),
    Regime("carried state", carried=True),
    *(Regime(name, transform=name) for name in FLOAT_TRANSFORMS if name != PLANTED),
    Regime("repeated token", transform="repeated token"),
    *(Regime(f"length {length}", length=length) for length in (1, 2, 63, 100)),
    *(Regime(f"batch {batch}", batch=batch) for batch in (1, 2, 3)),
)
# where a NaN spreads to depends on the order of the sums (0 x NaN in a masked product), so a case has to ask for it
BY_NAME = {regime.name: regime for regime in (*STANDARD, Regime(PLANTED, transform=PLANTED))}


def one_hot(array: np.ndarray) -> np.ndarray:
    """Zeros with a single one in every row of the last axis, at the row's number modulo its length; a scalar becomes 1."""
    if array.ndim == 0:
        return np.ones_like(array)
    rows = np.zeros((array.size // array.shape[-1], array.shape[-1]), array.dtype)
    rows[np.arange(len(rows)), np.arange(len(rows)) % array.shape[-1]] = 1.0
    return rows.reshape(array.shape)


def one_nan(array: np.ndarray) -> np.ndarray:
    """NaN in the middle of the first entry of the first axis, the other entries as they are."""
    spoiled = array.copy()
    spoiled[(0, *(size // 2 for size in array.shape[1:]))] = np.nan
    return spoiled


def transformed(regime: Regime, value: Any, time_axis: int = 1) -> Any:
    """A tree of NumPy arrays under the regime's transformation; integers are changed by "repeated token" only.

    `time_axis` is the axis along which "repeated token" repeats the first entry. Arrays without that axis are left as they are.
    """
    if regime.transform is None:
        return value

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        if regime.on_floats:
            return FLOAT_TRANSFORMS[regime.transform](leaf) if leaf.dtype.kind == "f" and leaf.ndim else leaf
        if leaf.ndim <= time_axis:
            return leaf
        return np.repeat(np.take(leaf, [0], axis=time_axis), leaf.shape[time_axis], axis=time_axis)

    return tree.map_leaves(change, value)


def chosen(names: Any) -> tuple[Regime, ...]:
    """The regimes of a case: None for the standard ones, otherwise Regime objects or standard names.

    Raises ValueError for an unknown name, two regimes of one name, or none at all.
    """
    if names is None:
        return STANDARD
    found = []
    for entry in names:
        if not isinstance(entry, Regime) and entry not in BY_NAME:
            raise ValueError(f"unknown regime {entry!r}, expected a Regime or one of {', '.join(BY_NAME)}")
        found.append(entry if isinstance(entry, Regime) else BY_NAME[entry])
    if not found:
        raise ValueError("a case needs at least one regime, found none")
    doubled = sorted({regime.name for regime in found if sum(other.name == regime.name for other in found) > 1})
    if doubled:
        raise ValueError(f"two regimes are named {doubled[0]!r}")
    return tuple(found)
