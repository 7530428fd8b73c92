"""Recovery: what a run does by itself about a step that went wrong.

    loss, state or gradient norm not finite   the step is skipped (parameters, optimiser, bank, carried states as before), rate x 0.5
    gradient of one parameter not finite      that gradient is zeroed, the entries are counted, the parameter is named
    loss exploding                            back to the newest of the last 5 good states, rate x 0.7

Data go on in every case, so that step numbers never go back. A loss explodes when it is above 3 times max(median of the last 50 losses, one
nat): the median falls with training and one odd batch does not move it, as it would a mean; below one nat a ratio says little, since an
overfitted model has losses near zero. Three skipped steps in a row count as an explosion: parameters that give NaN are not cured by
waiting.

Good states are the run's own checkpoints whose step went well, and before the first of them the initial state. On disk, because they are
there anyway, survive a kill (a resumed run goes back to the same one) and take no memory. One that was gone back to in vain is not tried
again until a newer one is there. Rate factor, running losses and counts of events are in every checkpoint, and come back with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from conf.schema import RecoveryConfig
from experiments.errors import RunError
from experiments.events import Events
from experiments.steps.base import StepResult

# Steps whose good states were tried in vain -> the step gone back to and its recovery record.
RollBack = Callable[[Collection[int]], tuple[int, Mapping[str, Any]]]


class Recovery:
    """Judges steps and acts on what is wrong with them. `factor` multiplies every learning rate."""

    def __init__(self, config: RecoveryConfig, events: Events, record: Mapping[str, Any] | None = None) -> None:
        """`record` of a checkpoint, if the run goes on from one."""
        self._config, self._events = config, events
        record = record or {}
        self.factor = float(record.get("factor", 1.0))
        self._losses = [float(loss) for loss in record.get("losses", ())]
        self._skipped = int(record.get("skipped", 0))
        self.good = False  # whether the last step went well, so that the state after it is worth going back to
        self._tried = {int(step) for step in record.get("tried", ())}
        self._dead = {str(name): int(until) for name, until in record.get("dead", {}).items()}

    def record(self) -> dict[str, Any]:
        """What a checkpoint's description holds; JSON keeps every float exactly. With a good state, none has been tried in vain."""
        tried = [] if self.good else sorted(self._tried)
        return {"factor": self.factor, "losses": self._losses, "skipped": self._skipped, "tried": tried, "dead": self._dead}

    def rates(self, rates: Mapping[str, float]) -> dict[str, float]:
        """The schedule's learning rates times the factor."""
        return {group: rate * self.factor for group, rate in rates.items()}

    def limit(self) -> float | None:
        """The loss above which the next step has exploded; None while too few losses are known."""
        if len(self._losses) < self._config.minimum:
            return None
        return self._config.explosion * max(float(np.median(self._losses)), 1.0)

    def after(self, result: StepResult, step: int, roll_back: RollBack) -> None:
        """Act on what a guarded step did. Raises RunError when the rate is down to the floor."""
        if result.zeroed:
            named = ", ".join(f"{name} ({count})" for name, count in result.zeroed.items())
            self._events.add(step, "nonfinite_gradient", f"gradient zeroed where entries were not finite: {named}", parameters=result.zeroed)
        loss, limit = result.losses["loss"], self.limit()
        self.good = not result.skipped and (limit is None or loss <= limit)
        if result.skipped:
            self._lower(self._config.skip_factor)
            self._skipped += 1
            self._events.add(
                step, "nonfinite_loss", f"{result.skipped}: step skipped, rate x {self._config.skip_factor:g} (now x {self.factor:.4g})",
                losses=result.losses, factor=self.factor,
            )
            if self._skipped >= self._config.patience:
                self._back(step, f"{self._skipped} steps in a row were skipped", loss, roll_back)
        elif not self.good:
            self._back(step, f"loss {loss:.4g} is above {limit:.4g}", loss, roll_back)
        else:
            self._skipped = 0
            self._losses = [*self._losses, loss][-self._config.window :]
        if self.factor < self._config.floor:
            raise RunError(
                f"training: gave up at step {step}: the rate is down to {self.factor:.3g} of the configured one after "
                f"{', '.join(f'{count} x {kind}' for kind, count in sorted(self._events.counts.items()))}; "
                "lower optimiser.rate or raise optimiser.warmup"
            )

    def checkpointed(self) -> None:
        """A good state was written: those that were tried in vain before it count again."""
        self._tried.clear()

    def broken(self, step: int, why: str, roll_back: RollBack) -> None:
        """Go back, because what was measured between two steps says that the present state is of no use."""
        self.good = False
        self._back(step, why, math.nan, roll_back)

    def dying(self, names: Collection[str], step: int) -> None:
        """Inject gradients into the parameters `names` from the next step on."""
        self._dead |= dict.fromkeys(sorted(names), step + self._config.unfreeze.steps)

    def injected(self, step: int) -> list[str]:
        """Parameters that get a gradient put in at `step`."""
        self._dead = {name: until for name, until in self._dead.items() if step <= until}
        return sorted(self._dead)

    def _lower(self, by: float) -> None:
        self.factor *= by

    def _back(self, step: int, why: str, loss: float, roll_back: RollBack) -> None:
        self._lower(self._config.rollback_factor)
        reached, record = roll_back(self._tried)
        self._tried.add(reached)
        self._skipped = 0
        self._losses = [float(each) for each in record.get("losses", ())]
        place = f"the state after step {reached}" if reached else "the initial state"
        self._events.add(
            step, "explosion", f"{why}: back to {place}, rate x {self._config.rollback_factor:g} (now x {self.factor:.4g})",
            loss=loss, back_to=reached, factor=self.factor,
        )
