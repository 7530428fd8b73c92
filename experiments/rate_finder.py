"""Learning-rate finder, `debug=find_rate`: the loss while the rate grows exponentially, and which rate that speaks for.

    rate_i = low (high / low)^(i / (steps - 1))          every group has its own factor on it, as in training
    s_i    = smoothed loss, (1 - smoothing^(i + 1)) s_i = (1 - smoothing) sum_j smoothing^(i - j) loss_j

The ramp ends where training diverges: at a loss, state or gradient that is not finite, or once s has risen above its least value by
the share `divergence` of what it had fallen by then (at least by a tenth of the first loss: noise at the start is no divergence). Two readings:

    steepest: the rate at which s falls fastest with log(rate), before its minimum (Smith 2017; fastai); it errs on the low side
    tenth:    a tenth of the rate at which it diverged, or of the last rate if it did not; it errs on the high side

The suggestion is their geometric mean where the first is below the second, else the second; where the loss never fell there is none.

Nothing of the model is kept: no checkpoint is written. RUN/rate_finder.json and RUN/rate_finder.png hold the curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from conf.debug_schema import RateFinderConfig
from conf.schema import OptimiserConfig, TrainConfig
from experiments import report, session
from experiments.errors import RunError
from experiments.folder import progress_bar
from experiments.lock import RunLock
from experiments.steps.groups import GROUPS

RESULT = "rate_finder.json"
_NOISE = 0.1  # share of the first loss that counts as a fall
_SLOPE = 5  # rates that a slope is taken over


@dataclass(frozen=True)
class Found:
    """What a ramp says. `diverged_at`: the rate at which it ended, None if it went through; the others are None where the loss never fell."""

    steepest: float | None
    tenth: float
    suggestion: float | None
    diverged_at: float | None


def run(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Ramp the rate up on the data and model of `config`, write curve and suggestion into `folder`, and return what was written.

    Raises RunError where the loss fell at no rate, and for what a run would refuse.
    """
    console = Console(soft_wrap=True)
    with RunLock(folder):
        state = session.prepare(config, folder)
        settings = config.rate_finder
        rates, losses = ramp(settings), []
        with progress_bar(console) as progress:
            bar = progress.add_task("rates", total=len(rates), figures="")
            for number, rate in enumerate(rates.tolist()):
                result = state.step.step(state.stream.batch(number), by_group(rate, config.optimiser), guard=True)
                losses.append(math.nan if result.skipped or result.zeroed else result.losses["loss"])
                progress.update(bar, completed=number + 1, figures=f"rate {rate:.2e}  loss {losses[-1]:.3f}")
                if diverged(losses, settings):
                    break
        found = read(rates[: len(losses)], losses, settings)
        smoothed = smooth(losses, settings.smoothing)
        result = {
            **asdict(found), "optimiser.rate": config.optimiser.rate, "backend": config.backend.name, "architecture": config.architecture,
            "rates": rates[: len(losses)].tolist(), "losses": losses, "smoothed": smoothed.tolist(),
        }
        temporary = folder / f".{RESULT}"
        temporary.write_text(json.dumps(report.finite(result), indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / RESULT)
        picture = report.save(figure(rates[: len(losses)], losses, smoothed, found), folder / "rate_finder")
    ended = f"diverged at {found.diverged_at:.3g}" if found.diverged_at else f"did not diverge up to {rates[-1]:.3g}"
    if found.suggestion is None:
        raise RunError(f"rate_finder: the loss fell at no rate from {rates[0]:.3g} to {rates[len(losses) - 1]:.3g} and {ended}; see {picture}")
    console.print(f"the loss fell fastest at {found.steepest:.3g} and {ended}, a tenth of which is {found.tenth:.3g}", highlight=False)
    console.print(f"suggestion: optimiser.rate={found.suggestion:.2g}, configured {config.optimiser.rate:g}", highlight=False)
    console.print(f"{folder / RESULT}, {picture}", highlight=False)
    return result


def ramp(settings: RateFinderConfig) -> np.ndarray:
    """The rates, each a constant factor above the one before."""
    return np.geomspace(settings.low, settings.high, settings.steps)


def by_group(rate: float, optimiser: OptimiserConfig) -> dict[str, float]:
    """The rate of every group."""
    return {group: rate * getattr(optimiser, group).rate for group in GROUPS}


def smooth(losses: Sequence[float], smoothing: float) -> np.ndarray:
    """Exponential mean without the bias of its start; NaN from the first loss that is not finite on."""
    values, mean = [], 0.0
    for number, loss in enumerate(losses, start=1):
        mean = smoothing * mean + (1 - smoothing) * loss
        values.append(mean / (1 - smoothing**number))
    return np.array(values)


def diverged(losses: Sequence[float], settings: RateFinderConfig) -> bool:
    """Whether the ramp ends with the last of `losses`."""
    if not math.isfinite(losses[-1]):
        return True
    smoothed = smooth(losses, settings.smoothing)
    least = float(smoothed.min())
    fallen = max(float(smoothed[0]) - least, _NOISE * float(smoothed[0]))
    return float(smoothed[-1]) > least + settings.divergence * fallen


def read(rates: np.ndarray, losses: Sequence[float], settings: RateFinderConfig) -> Found:
    """What a ramp that ended says. Raises RunError if its first loss was not finite."""
    if not math.isfinite(losses[0]):
        raise RunError(f"rate_finder.low: the loss is {losses[0]} at the lowest rate already, found low={settings.low}")
    ended = float(rates[-1]) if diverged(losses, settings) else None
    smoothed = smooth(losses, settings.smoothing)
    finite = int(np.isfinite(smoothed).sum())
    bottom = int(smoothed[:finite].argmin())
    steepest = None
    if bottom >= _SLOPE and smoothed[bottom] < (1 - _NOISE) * smoothed[0]:
        logarithms = np.log(rates[: bottom + 1])
        slopes = (smoothed[_SLOPE : bottom + 1] - smoothed[: bottom + 1 - _SLOPE]) / (logarithms[_SLOPE:] - logarithms[:-_SLOPE])
        steepest = float(rates[int(slopes.argmin()) + _SLOPE // 2])
    tenth = (ended or float(rates[-1])) / 10
    return Found(steepest, tenth, None if steepest is None else math.sqrt(min(steepest, tenth) * tenth), ended)


def figure(rates: np.ndarray, losses: Sequence[float], smoothed: np.ndarray, found: Found) -> Figure:
    """Loss by rate, with the two readings."""
    drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    axes.plot(rates, losses, linewidth=0.8, color="tab:gray", label="loss")
    axes.plot(rates, smoothed, linewidth=1.4, color="tab:blue", label="smoothed")
    for rate, style, label in ((found.steepest, "--", "falls fastest"), (found.tenth, ":", "a tenth of divergence")):
        if rate is not None:
            axes.axvline(rate, linestyle=style, linewidth=1, color="tab:red", label=f"{label}, {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawn
