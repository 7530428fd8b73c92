"""WaveCore in torch against its NNX port: every tier of every variant, and 50 steps with each row that they write."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import torch

from parity_tests.harness import Battery
from parity_tests.harness.compare import Check, Place, rounded
from parity_tests.harness.plugin import TierTest, parity_case
from parity_tests.harness.recording import Recording
from parity_tests.harness.regimes import BY_NAME
from parity_tests.specs_wavecore import CASES, DEFAULT, rolled, rollout

MODULES = {"encoder", "cms_read", "core", "core.wave", "cms_write", "decoder"}
LAYERS = ("conversion", "coverage", "forced", "free", "gradients")
# `parity run` has every tier of every case; the step of a selective wave, whose leaves are the rollout's, runs in test_mutations_wave
ROLLOUT, LINEAR_STEP = CASES[0], CASES[2]


@parity_case(ROLLOUT, tiers=(*LAYERS, "rounding", "splits", "optimiser", "effects"))
def test_rollout(parity: TierTest) -> None:
    every_module_is_forced(parity)
    if parity.tier == "rounding":
        assert_margin(Recording(ROLLOUT), [check for check in parity.result().checks if "end to end" in check.regime])


@parity_case(LINEAR_STEP, tiers=LAYERS)
def test_linear_step(parity: TierTest) -> None:
    every_module_is_forced(parity)


def every_module_is_forced(parity: TierTest) -> None:
    if parity.tier == "forced":
        assert {check.where for check in parity.result().checks} >= MODULES


def choice(module: Any, before: Any, after: Any) -> tuple[Any, ...]:
    """Of every level the row (B,) that a step wrote, -1 where its gate was closed, seen from the memory before and after."""
    found = []
    for old, new, decay in zip(module.memories(before)[0], module.memories(after)[0], module.config.cms_decays, strict=True):
        change = ((new - (1 - decay) * old) ** 2).sum(-1)  # (B, n), rounding where nothing was written
        is_open = (change > 1e-6).any(-1)
        found.append(change.argmax(-1) * is_open - 1 * ~is_open)
    return tuple(found)


def torch_steps(module: Any, inputs: dict[str, Any], state: Any) -> tuple[Any, ...]:
    outputs, rows = rolled(module, inputs, state), []
    state = module.init_state(inputs["x_obs"].shape[1]) if state is None else state
    for now in zip(*inputs.values(), strict=True):
        before, (_, state, _) = state, module.step(state, *now)
        rows.append(choice(module, before, state))
    return *outputs, [torch.stack(level) for level in zip(*rows, strict=True)]


def jax_steps(module: Any, inputs: dict[str, Any], state: Any) -> tuple[Any, ...]:
    def step(state: Any, now: tuple[Any, ...]) -> tuple[Any, Any]:
        _, after, _ = module.step(state, *now)
        return after, choice(module, state, after)

    begin = module.init_state(inputs["x_obs"].shape[1]) if state is None else state
    return *rolled(module, inputs, state), list(jax.lax.scan(step, begin, tuple(inputs.values()))[1])


def margin(recording: Recording) -> float:
    """How far any choice of the reference was from another one: of a gate from its threshold, of the least norm from the next one."""
    closest = np.inf
    for call in (call for regime in recording.regimes for call in recording.run(regime).calls):
        if call.path == "cms_write":
            for norms in call.args[5]:
                least, second = np.sort(norms, -1)[:, :2].T
                gap = np.where(second == 0.0, 1.0, (second - least) / np.where(second == 0.0, 1.0, second))  # empty rows tie, exactly
                closest = min(closest, gap.min())
        elif call.path.startswith("cms_write.gate"):
            closest = min(closest, np.abs(1 / (1 + np.exp(-call.outputs)) - DEFAULT.salience_threshold).min())
    return float(closest)


def assert_margin(recording: Recording, checks: list[Check]) -> None:
    """No choice lies nearer to another one than what a candidate inside the float32 band may err: 16 times the reference's worst own error."""
    assert margin(recording) > 16 * max(check.own_error for check in checks if check.own_error is not None) > 0


def test_fifty_steps_write_the_same_rows() -> None:
    case = dataclasses.replace(rollout("fifty steps", DEFAULT, ("carried state",), length=50), call=(torch_steps, jax_steps), seed=25)
    battery = Battery(case)
    free = battery.tier("free")
    assert free.held, free.sentence
    regime, recording = BY_NAME["carried state"], battery.recording
    oracle, own, found = recording.run(regime).outputs, recording.run(regime, "float32").outputs, battery.free_run(regime, "float32").outputs
    assert len(oracle[3]) == DEFAULT.num_levels and all({-1, *range(4)} < set(rows.ravel()) for rows in oracle[3])  # open, closed, many rows
    checks = rounded(Place("rounding", "", "50 steps", "float32"), oracle, own, found, battery.bounds)
    assert_margin(recording, checks)
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(oracle[3], own[3], found[3], strict=True))
    assert len(checks) > 20 and not [check for check in checks if not check.held]
