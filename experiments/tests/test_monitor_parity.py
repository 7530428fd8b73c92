"""The same run on torch and on JAX, in float64: every number that the monitors and the validation take agrees to 1e-6 relative."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import runtime
from experiments import schedule
from experiments.monitors.drift import measure_drift
from experiments.monitors.watch import Watch
from experiments.steps import make
from experiments.tasks import validate
from experiments.tests import tiny

STEPS, EVERY = 30, 10


def looks(backend: str) -> tuple[list[dict[str, float]], list[str]]:
    """Numbers of every look and of the drift monitor after `STEPS` steps, and what they found; a state norm counts as high above 1."""
    settings = tiny.config(backend)
    monitors = replace(settings.monitors, state_low=0.2, state_high=1.0, state_warn=1.0, drift_tokens=33, drift_chunk=11)
    settings = replace(settings, model=replace(settings.model, depth=1), monitors=monitors)
    step = make(runtime.build("grounded_mamba", settings.model, backend, dtype="float64", seed=settings.seed), settings)
    watch, stream, numbers, found = Watch(settings.monitors), tiny.stream(settings), [], []
    for number in range(1, STEPS + 1):
        rates = schedule.rates(number, settings.training.steps, settings.optimiser)
        details = number % EVERY == 0
        result = step.step(stream.batch(number - 1), rates, details=details, guard=True)
        if details:
            values, new = watch.look(result, step)
            gates = {f"gate/{layer}": float(value) for layer, value in enumerate(result.gate)}
            numbers.append(values | gates | result.losses | {"gradient/norm": result.gradient_norm})
            found += [finding.message for finding in new if finding.kind != "memory"]
    text = np.random.default_rng(5).integers(97, 123, size=(3, 45))
    drift = measure_drift(step, text[0], 33, 11)
    kept, coherence = validate.windows(step, text, 11, 2)
    assert drift is not None and kept is not None and set(coherence) == {"ssm", "wkv"}
    nearness = {f"{kind}/{name}": getattr(each, name) for kind, each in coherence.items() for name in ("own", "other")}
    return [*numbers, drift.statistics(), nearness | {"carried": kept.carried, "fresh": kept.fresh, "gain": kept.gain.value}], found


def test_monitors_of_both_frameworks_agree() -> None:
    """An entry's mean over a parameter may cancel to nothing: differences below 1e-12 of numbers of order one are not counted."""
    (torch_looks, torch_found), (jax_looks, jax_found) = looks("torch"), looks("jax")
    assert len(torch_looks) == STEPS // EVERY + 2 and len(torch_looks[0]) > 100 and torch_found
    for first, second in zip(torch_looks, jax_looks, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), name
    assert torch_found == jax_found
