"""`groundwave compare`: are the loss curves of two runs the same, up to what rounding alone does?

The band is measured, not assumed: run A again with its sums in another order (`data.permute_rows=true`) and take the largest
difference of the two losses up to each step. Training amplifies rounding exponentially until it saturates, so a difference counts
against the band as it is at that step, with two allowances. Two orders of summation are two draws of the same noise: a difference may be
`FACTOR` times the band. And noise that begins a few times larger is as large some steps earlier: the band may be read `LAG` steps
later (with the default run it grows tenfold in about five). A difference of meaning shows in the first steps, thousands of times
above the band there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import report
from experiments.errors import RunError
from experiments.folder import METRICS

LOSS = "train/loss"
FACTOR = 4.0
LAG = 10


@dataclass(frozen=True)
class Comparison:
    """Two curves over the steps that all runs logged. `worst_ratio`: largest ratio of difference to band, NaN without a band."""

    steps: int
    last_step: int
    largest_difference: float
    at_step: int
    largest_band: float
    worst_ratio: float
    within: bool | None


def losses(run: Path) -> dict[int, float]:
    """Training loss by step. Raises RunError for a folder without a run."""
    path = run / METRICS
    if not path.is_file():
        raise RunError(f"compare: {run} holds no {METRICS}, so it is no run")
    found = dict(zip(*report.curve(report.read_metrics(path), LOSS), strict=True))
    if not found:
        raise RunError(f"compare: {path} holds no {LOSS}")
    return found


def compare(a: dict[int, float], b: dict[int, float], band: Sequence[dict[int, float]] = (), factor: float = FACTOR) -> Comparison:
    """Compare `b` with `a` where `band` holds runs like `a` in another order of summation. Raises RunError if no step is in all of them."""
    steps = sorted(set(a).intersection(b, *band))
    if not steps:
        raise RunError("compare: no step was logged by all runs; use the same training.log_every")
    difference = np.array([abs(a[step] - b[step]) for step in steps])
    worst = int(difference.argmax())
    allowed = _later(np.maximum.accumulate(_band(a, band, steps)), steps) if band else np.zeros(len(steps))
    # The first steps of two orders may agree to the bit, but a loss is a float32 mean of a thousand terms: no less than four of its last places.
    least = 4 * np.spacing(np.array([a[step] for step in steps], dtype=np.float32)).astype(np.float64)
    ratio = float((difference / np.maximum(allowed, least)).max()) if band else float("nan")
    return Comparison(
        len(steps), steps[-1], float(difference[worst]), steps[worst], float(allowed.max()), ratio, ratio <= factor if band else None
    )


def _band(a: dict[int, float], band: Sequence[dict[int, float]], steps: Sequence[int]) -> np.ndarray:
    return np.max([[abs(a[step] - other[step]) for step in steps] for other in band], axis=0)


def _later(values: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The value up to `LAG` steps after each step."""
    return values[np.searchsorted(steps, np.asarray(steps) + LAG, side="right") - 1]


def figure(names: Sequence[str], a: dict[int, float], b: dict[int, float], band: Sequence[dict[int, float]]) -> Figure:
    """The two curves, and below them their difference with the band."""
    steps = sorted(set(a).intersection(b, *band))
    drawn = Figure(figsize=(7.2, 5.6), layout="constrained")
    upper, lower = drawn.subplots(2, 1, sharex=True)
    upper.plot(steps, [a[step] for step in steps], linewidth=1.4, label=names[0])
    upper.plot(steps, [b[step] for step in steps], linewidth=1.0, linestyle="--", label=names[1])
    upper.set_ylabel("training loss")
    upper.legend(frameon=False)
    if band:
        lower.fill_between(
            steps, 1e-12, np.maximum.accumulate(_band(a, band, steps)), step="post", alpha=0.25, label="band: the same run, sums in another order"
        )
    lower.plot(steps, np.maximum([abs(a[step] - b[step]) for step in steps], 1e-12), linewidth=0.8, label=f"|{names[0]} - {names[1]}|")
    lower.set_yscale("log")
    lower.set_ylim(bottom=1e-8)
    lower.set_xlabel("step")
    lower.set_ylabel("difference of the loss")
    lower.legend(frameon=False)
    return drawn


def main(arguments: Sequence[str]) -> int:
    """`groundwave compare RUN_A RUN_B [--band RUN_C ...] [--output FOLDER]`. Returns 0 within the band or without one, else 1."""
    parser = argparse.ArgumentParser(prog="groundwave compare", description="compare the loss curves of two runs")
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--band", type=Path, nargs="+", default=[], metavar="RUN_C", help="runs like RUN_A with data.permute_rows=true")
    parser.add_argument("--factor", type=float, default=FACTOR, help="times the band that a difference may be (default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where compare.json and compare.svg go (default: RUN_B)")
    chosen = parser.parse_args(arguments)
    first, second, band = losses(chosen.a), losses(chosen.b), [losses(run) for run in chosen.band]
    found = compare(first, second, band, chosen.factor)
    console = Console(soft_wrap=True)
    table = Table(title=f"Training loss, {found.steps} steps up to {found.last_step}")
    for name in ("largest difference", "at step", "largest in the band", "worst ratio to the band", "within"):
        table.add_column(name, justify="right")
    verdict = "no band" if found.within is None else f"yes, below {chosen.factor:g}" if found.within else f"NO, above {chosen.factor:g}"
    against = ("-", "-") if found.within is None else (f"{found.largest_band:.3e}", f"{found.worst_ratio:.2f}")
    table.add_row(f"{found.largest_difference:.3e}", str(found.at_step), *against, verdict)
    console.print(table)
    output = chosen.output or chosen.b
    try:
        output.mkdir(parents=True, exist_ok=True)
        report.save(figure([chosen.a.name, chosen.b.name], first, second, band), output / "compare")
        (output / "compare.json").write_text(json.dumps(report.finite(asdict(found)), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"compare: cannot write into {output}: {error.strerror or error}") from error
    console.print(f"{output / 'compare.svg'}", highlight=False)
    return 1 if found.within is False else 0
