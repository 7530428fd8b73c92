"""What a tier compiles, begun before it is needed: while one tier compares, the programs of the next are compiled beside it.

Each function traces the programs of the tier of its name and leaves the compiling to other threads; what has begun already is not begun again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .candidate import COMPILED
from .recording import Forced, Recording, Skip
from .regimes import Regime

if TYPE_CHECKING:
    from .battery import Battery


def forced(battery: Battery) -> None:
    """Every layer under every regime, float64; a function has none."""
    if battery.recording.kind == "callable":
        return
    for layers in _all_forced(battery.recording, battery.recording.regimes):
        battery.candidate.start_calls(layers, "float64")


def free(battery: Battery) -> None:
    """The model under every regime, float64."""
    battery.start_free()


def rounding(battery: Battery) -> None:
    """The model and its layers in every lower precision."""
    for dtype in battery.case.dtypes:
        if dtype != "float64":
            for layers in _all_forced(battery.recording.within(dtype), rounded_regimes(battery.recording, dtype)):
                battery.candidate.start_calls(layers, dtype)
            battery.start_free(dtype)


def gradients(battery: Battery) -> None:
    """Gradients of the model and of its layers under the plain regimes."""
    recording, candidate, seed = battery.recording, battery.candidate, battery.case.seed
    for regime in recording.plain():
        candidate.start("float64", "gradients", lambda regime=regime: ((recording.inputs(regime), battery.states(regime), seed), {}))
        for layer in recording.forced(regime):
            if candidate.path(layer.path) is not None:
                candidate.start("float64", "call_gradients", lambda layer=layer: ((*candidate.arguments(layer), seed), {}))


def splits(battery: Battery) -> None:
    """The model on the parts of every split."""
    if battery.case.states is None:
        return
    inputs, along, length = split_inputs(battery)
    own, axis = battery.states(battery.recording.plain()[1]), battery.case.states.axis
    for cut in range(1, length):
        part = {name: np.take(value, np.arange(cut), axis=axis) if name in along else value for name, value in inputs.items()}
        battery.candidate.start("float64", "run", lambda part=part: ((part, own), {"tap": False}))


def optimiser(battery: Battery) -> None:
    """One step of training."""
    trajectory = battery.candidate.trajectory
    if battery.case.trajectory is not None and trajectory is not None:
        battery.candidate.start("float64", "train", lambda: ((battery.batches(), trajectory, battery.case.seed), {}))


STARTS: Mapping[str, Callable[[Battery], None]] = {
    "forced": forced, "free": free, "rounding": rounding, "gradients": gradients, "splits": splits, "optimiser": optimiser,
}


def begin(battery: Battery, names: Iterable[str]) -> None:
    """Begin with the tiers of these names; what cannot be begun is met again, and reported, by the tier itself."""
    for name in names if battery.candidate is not None and battery.candidate.kind in COMPILED else ():
        with contextlib.suppress(Exception):
            STARTS.get(name, lambda _: None)(battery)


def rounded_regimes(recording: Recording, dtype: str) -> list[Regime]:
    """The regimes under which layers are rounded by themselves: a shorter sequence or a smaller batch adds no rounding."""
    longest = max((regime.length or 0 for regime in recording.regimes), default=0)
    return [regime for regime in recording.regimes if (regime.length or longest) == longest and regime.batch is None and not drowned(regime, dtype)]


def drowned(regime: Regime, dtype: str) -> bool:
    """Whether a regime adds an offset that a half precision cannot hold beside what it is added to: near 100 the steps of bfloat16 are 0.5 and
    those of float16 1/16. What a layer then computes from differences is rounding on both sides, and neither error measures the other."""
    return regime.transform == "+ 100" and dtype in ("bfloat16", "float16")


def split_inputs(battery: Battery) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """The inputs that are split, the names of those that have time steps, and the number of these."""
    case = battery.case
    inputs = battery.recording.grid(case.draw(case.seed, length=case.states.split_length if case.accepts("length") else None))
    along = case.along(inputs)
    return inputs, along, inputs[along[0]].shape[case.states.axis]


def _all_forced(recording: Recording, regimes: Iterable[Regime]) -> Iterator[list[Forced]]:
    for regime in regimes:
        with contextlib.suppress(Skip):
            yield recording.forced(regime)
