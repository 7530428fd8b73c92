"""What watches over a training run: monitors, recovery, checkpoints that may fail, the golden one. The loop calls it and goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import checkpoint, session, unfreeze
from experiments.data.batches import Batch
from experiments.ending import Ending
from experiments.errors import RunError
from experiments.events import Events
from experiments.monitors import weights
from experiments.monitors.findings import Finding
from experiments.monitors.watch import Watch
from experiments.recovery import Recovery
from experiments.session import Session
from experiments.steps.base import Gradients, StepResult
from experiments.trackers import Tracker


class Oversight:
    """Events, recovery and monitors of one run, restored from the checkpoint that it goes on from."""

    def __init__(self, state: Session, tracker: Tracker, console: Console, said: list[str]) -> None:
        """`said`: where warnings arrive that were shown already, a tracker's failure for one; they become lines of the log."""
        self._state, self._tracker, self._said = state, tracker, said
        before = state.before
        recovery = before.get("recovery", {})
        self.events = Events(state.folder, console, tracker, recovery.get("events"), writes=state.group.main)
        self.recovery = Recovery(state.config.recovery, self.events, recovery)
        self.ending = Ending(state.config, self.events, state.start, before.get("ending"))
        self.watch = Watch(state.config.monitors, before.get("monitors"), state.monitors)
        for note in state.notes:
            self.events.add(state.start, "checkpoint_passed_over", note, counted=False)
        if state.start:
            self.events.add(state.start, "resumed", f"went on from the checkpoint of step {state.start}", level="notice", counted=False)

    def step(self, batch: Batch, rates: Mapping[str, float], number: int, *, details: bool) -> tuple[StepResult, dict[str, float]]:
        """A step of training, guarded if recovery is on, and the learning rates that it was given. Raises RunError where the run cannot go on."""
        self.hear(number)
        state, enabled = self._state, self._state.config.recovery.enabled
        rates = self.recovery.rates(rates)
        dead = self.recovery.injected(number)
        result = state.step.step(batch, rates, details=details, guard=enabled, inject=partial(self._injection, dead, number) if dead else None)
        if enabled:
            self.recovery.after(result, number, partial(session.roll_back, state))
        else:
            _check(result, number)
        self.ending.stepped(number, result)
        return result, rates

    def hear(self, number: int) -> None:
        """Put the warnings that arrived into the log."""
        while self._said:
            self.events.note(number, "warning", self._said.pop(0))

    def look(self, result: StepResult, number: int) -> dict[str, float]:
        """Numbers of the monitors after a step with details; what they find is an event, and parameters that die are unfrozen if configured."""
        values, found = self.watch.look(result, self._state.step)
        self._report(found, number)
        dying = [finding.name for finding in found if finding.kind == weights.KIND]
        if dying:
            self._unfreeze(dying, number)
        return values

    def drift(self, number: int) -> dict[str, float]:
        """Numbers of the drift monitor; what it finds is an event."""
        values, found = self.watch.drift(self._state.step, self._state.held_out)
        self._report(found, number)
        return values

    def save(self, number: int, seconds: float, *, last: bool) -> Path | None:
        """Write a checkpoint. One that cannot be written is an event, and None; of the last one, RunError."""
        good = self.recovery.good
        try:
            saved = session.save(self._state, number, seconds, self._description(good))
        except RunError as error:
            if last or not self._state.config.recovery.enabled:
                raise
            self.events.add(number, "checkpoint_failed", str(error), counted=False)
            return None
        if good:
            self.recovery.checkpointed()
        return saved

    def settle(self, number: int, ids: np.ndarray) -> None:
        """Before the last checkpoint: where the last step did not go well and the model gives no finite loss on held-out `ids`, go back."""
        if not self._state.config.recovery.enabled or self.recovery.good:
            return
        nats, _ = self._state.step.evaluate(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), None)
        nats = self._state.group.share(lambda: nats)
        if not math.isfinite(nats):
            self.recovery.broken(number, f"the last step was skipped and held-out text has loss {nats}", partial(session.roll_back, self._state))

    def validated(self, number: int, bits_per_byte: float) -> None:
        """A validation during training that is not finite means that the present state is of no use: go back. Others may end the run."""
        self.ending.validated(number, bits_per_byte)
        if self._state.config.recovery.enabled and not math.isfinite(bits_per_byte):
            self.recovery.broken(number, f"validation is {bits_per_byte} bits per byte", partial(session.roll_back, self._state))

    def golden(self, number: int, seconds: float, bits_per_byte: float) -> None:
        """Keep the state as the golden one if its validation is better than that of the one on disk, whoever wrote that."""
        if not self._state.config.recovery.golden or not math.isfinite(bits_per_byte):
            return
        best = self._state.group.share(lambda: checkpoint.best(self._state.folder, self._state.config))
        if best is not None and best[1] <= bits_per_byte:
            return
        try:
            description = self._description(self.recovery.good) | {"validation": bits_per_byte}
            session.save(self._state, number, seconds, description, golden=True)
        except RunError as error:
            self.events.add(number, "checkpoint_failed", f"golden {error}", counted=False)

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of all this."""
        return {"events": dict(sorted(self.events.counts.items())), "rate_factor": self.recovery.factor, "stopped_early": self.ending.early}

    def _description(self, good: bool) -> dict[str, Any]:
        record = self.recovery.record() | {"events": self.events.counts}
        return {
            "tracker_id": self._tracker.run_id, "good": good, "recovery": record, "ending": self.ending.record(), "monitors": self.watch.record(),
            "arrays": self.watch.arrays(),
        }

    def _report(self, found: list[Finding], number: int) -> None:
        for finding in found:
            if finding.level != "notice":
                self.events.add(number, finding.kind, finding.message, level=finding.level, counted=finding.kind != "memory", name=finding.name)

    def _unfreeze(self, names: list[str], number: int) -> None:
        settings, step = self._state.config.recovery.unfreeze, self._state.step
        if settings.method == "soft_reset":
            names = unfreeze.soft_reset(step, number, settings.noise)
        elif settings.method == "selective_reinit":
            names = unfreeze.selective_reinit(step, names)
        elif settings.method == "gradient_injection":
            self.recovery.dying(names, number)
        if settings.method != "none":
            self.events.add(number, "unfreeze", f"{settings.method}: {', '.join(names)}", level="notice", names=names)

    def _injection(self, names: list[str], number: int, gradients: Gradients) -> Gradients:
        config = self._state.config
        return unfreeze.gradient_injection(gradients, names, config.recovery.unfreeze.injection, config.seed, number)


def _check(result: StepResult, step: int) -> None:
    if not math.isfinite(result.losses["loss"]) or not math.isfinite(result.gradient_norm):
        parts = ", ".join(f"{name} {value}" for name, value in result.losses.items())
        raise RunError(
            f"training: not finite at step {step}: {parts}, gradient norm {result.gradient_norm}; lower optimiser.rate or raise optimiser.warmup"
        )
