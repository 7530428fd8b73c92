"""When a run ends: at its last step, or earlier, where validation no longer improves or the one batch of `debug=overfit_batch` is learnt.

Early stopping counts the validations in a row that were not `min_delta` below the best. Best and count are in every checkpoint, and the run
ends with a checkpoint, so that one that is resumed ends where it would have ended, and one that had ended stays so. A validation that is not
finite is recovery's business and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conf.schema import TrainConfig
from experiments.errors import RunError
from experiments.events import Events
from experiments.steps.base import StepResult

KIND = "early_stopping"


class Ending:
    """`last`: the number of the step after which the run ends, as far as is known."""

    def __init__(self, config: TrainConfig, events: Events, start: int, record: Mapping[str, Any] | None = None) -> None:
        """`start`: steps done before; `record` of the checkpoint that the run goes on from, if any."""
        record = {name: value for name, value in (record or {}).items() if value is not None}
        self._settings, self._debug, self._events = config.training.early_stopping, config.debug, events
        self.best: float | None = record.get("best")
        self._at, self._waited, self._loss = int(record.get("at", 0)), int(record.get("waited", 0)), float(record.get("loss", math.inf))
        self.last = config.training.last_step
        if self.early or self._learnt:
            self.last = min(self.last, start)

    @property
    def early(self) -> bool:
        """Whether validation has ended the run."""
        return self._settings.patience is not None and self._waited >= self._settings.patience

    @property
    def _learnt(self) -> bool:
        return self._debug.overfit_batch and self._loss < self._debug.target

    def record(self) -> dict[str, Any]:
        """What a checkpoint's description holds."""
        return {"best": self.best, "at": self._at, "waited": self._waited, "loss": self._loss if math.isfinite(self._loss) else None}

    def stepped(self, step: int, result: StepResult) -> None:
        """After a step of training."""
        if self._debug.overfit_batch and not result.skipped:
            self._loss = result.losses["cross_entropy"]
            if self._learnt:
                self.last = step
                said = f"learnt by heart: cross-entropy {self._loss:.4g} is below {self._debug.target:g} nats per token"
                self._events.add(step, "overfit_batch", said, level="notice")

    def validated(self, step: int, bits_per_byte: float) -> None:
        """After a validation. Where it ends the run, that is an event."""
        if self._settings.patience is None or not math.isfinite(bits_per_byte):
            return
        if self.best is None or bits_per_byte < self.best - self._settings.min_delta:
            self.best, self._at, self._waited = bits_per_byte, step, 0
            return
        self._waited += 1
        if self.early:
            self.last = step
            below = f"{self._settings.min_delta:g} bits per byte below" if self._settings.min_delta else "below"
            self._events.add(
                step, KIND, f"the last {self._waited} validations were not {below} the best, {self.best:.4f} at step {self._at}: the run ends here",
                level="notice", best=self.best, best_at=self._at, patience=self._settings.patience,
            )

    def check(self) -> None:
        """At the end of training. Raises RunError if a batch should have been learnt and was not."""
        if self._debug.overfit_batch and not self._learnt:
            raise RunError(
                f"debug.overfit_batch: the cross-entropy of the batch is {self._loss:.4g} nats per token after {self.last} steps, expected below "
                f"debug.target={self._debug.target:g}: what is trained cannot learn one batch by heart, or needs more training.steps"
            )
