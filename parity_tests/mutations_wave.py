"""Porting bugs for WaveCore, one at a time: on a single step with a plain memory, on a rollout with the lazy one, on the linear wave.

FEW run with the tests, RUNS are all of them with `--all-mutations`, UNSEEN_RUNS were written before the harness was shown any of them and
are reported apart. `mutants_wave` has the bugs inside the modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from parity_tests import mutants_wave as mutants
from parity_tests.harness import Case, Trajectory
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters import nnx_injectors_more as more
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.mutate import Injector
from parity_tests.specs_wavecore import DEFAULT, LINEAR, STATE3, rollout, step

# test_wavecore trains and rounds: what is left out here would compile the same layers once more
STEP = dataclasses.replace(step("wavecore_step", STATE3, batch=5), dtypes=("float64",), trajectory=None)
LINEAR_STEP = dataclasses.replace(step("wavecore_linear_step", LINEAR, batch=3, regimes=("as is",)), dtypes=("float64",), trajectory=None)
# the first slot is written whatever the gate, which a NaN would close
SPOILT = dataclasses.replace(LINEAR_STEP, name="wavecore_linear_nan", regimes=("as is", "one NaN"))
TRAINED = dataclasses.replace(LINEAR_STEP, name="wavecore_linear_training", trajectory=Trajectory(steps=6))
ROLLOUT = dataclasses.replace(rollout("wavecore", DEFAULT, ("as is", "carried state")), dtypes=("float64",), trajectory=None)


def inside(bug: str, path: str, mutant: Callable[[str | None], Callable]) -> Injector:
    return Injector(bug, path, patches=(Patch(path, mutant(bug)),))


def misread(name: str, path: str, **fields: Any) -> Injector:
    """A module that was ported with another value of some fields of its config."""
    def prepare(module: Any) -> None:
        config = dataclasses.replace(module.config)
        for field, value in fields.items():
            object.__setattr__(config, field, value)
        module.config = config

    return Injector(name, path, patches=(Patch(path, prepare=prepare),))


EPSILONS = tuple(bugs.epsilon(path, value=1e-5) for path in ("encoder.obs_norm", "cms_read.query_norm", "core.particle_norm", "decoder.hidden_norm"))
ON_A_STEP = (
    inside("states taken before clipping", "core", mutants.core),
    inside("carry reshaped in the other order", "core.wave", mutants.wave),
    inside("dt without its minimum", "core.wave.ssm", mutants.ssm),
    inside("old row not decayed", "cms_write", mutants.write),
    inside("last slot of a tie", "cms_write", mutants.write),
    inside("old row without gradient", "cms_write", mutants.write),
    EPSILONS[1],
    bugs.transposed("core.wave.ssm.b_proj"),
    bugs.stale_state("core", argument=2, output=2),
)
ON_A_ROLLOUT = (
    inside("row written without the scale", "cms_write", mutants.write_lazy),
    inside("norms not folded", "cms_write", mutants.write_lazy),
    inside("scale forgotten in the scores", "cms_read", mutants.read),
)
MORE_ON_A_STEP = (
    inside("gate inverted", "core", mutants.core),
    inside("clipped before U_p and U_w", "core", mutants.core),
    inside("p before its step in s", "core", mutants.core),
    inside("g for 1 - g", "core", mutants.core),
    inside("softplus of dt replaced by exp", "core.wave.ssm", mutants.ssm),
    inside("softplus of A replaced by exp", "core.wave.ssm", mutants.ssm),
    inside("y of the carry before the step", "core.wave.ssm", mutants.ssm),
    inside("input not times dt", "core.wave.ssm", mutants.ssm),
    inside("missing skip D u", "core.wave.ssm", mutants.ssm),
    inside("silu gate in the wave", "core.wave", mutants.wave),
    inside("wave state and output added, not averaged", "core.wave", mutants.wave),
    inside("decay after the write", "cms_write", mutants.write),
    inside("slot chosen before the decay by the norm of its key", "cms_write", mutants.write),
    inside("slot of the largest norm", "cms_write", mutants.write),
    inside("write gate inverted", "cms_write", mutants.write),
    inside("closed gate writes", "cms_write", mutants.write),
    inside("keys not decayed", "cms_write", mutants.write),
    misread("slot 0 for the least salient", "cms_write", cms_write="slot0"),
    misread("decays of the levels in the other order", "cms_write", cms_decays=STATE3.cms_decays[::-1]),
    more.exchanged("cms_write.key.0.kernel", "cms_write.key.1.kernel"),
    inside("mixing weights over the wrong axis", "cms_read", mutants.reading),
    inside("mixing by a sigmoid", "cms_read", mutants.reading),
    inside("e before s in the query", "cms_read", mutants.reading),
    inside("scores not divided by sqrt(d_k)", "cms_read", mutants.read),
    inside("gelu for relu in the encoder", "encoder", mutants.encoder),
    inside("reward joined before the action", "encoder", mutants.encoder),
    inside("memory written from s before the step", "", mutants.stepped),
    EPSILONS[0], *EPSILONS[2:],
    bugs.missing_bias("cms_write.gate.1"),
    bugs.left_at_initialisation("core.U_p"),
    bugs.plus_one("encoder.norm"),
    bugs.scaled_output("cms_read.level_proj.1"),
    bugs.averaged_over_batch("cms_read.query_out"),
    bugs.dropped_state("core.wave", argument=0),
    bugs.low_precision("core.wave"),
    more.tf32_matmul("decoder.hidden_in"),
)
ON_A_SPOILT_STEP = (inside("row that is not finite written", "cms_write", mutants.write),)
ON_A_LINEAR_STEP = (
    inside("modulation without its tanh", "core.wave", mutants.linear),
    inside("diagonal without its 0.9", "core.wave", mutants.linear),
    inside("U V exchanged in the wave", "core.wave", mutants.linear),
    inside("particles before context in B_net", "core.wave", mutants.linear),
    Injector("tanh of a discrete output", "decoder", patches=(Patch("decoder", prepare=lambda m: setattr(m, "continuous", True)),)),
    Injector("limit 10 for none", "core", patches=(Patch("core", prepare=lambda m: setattr(m, "limit", 10.0)),)),
)
WHILE_TRAINING = (bugs.optimiser_setting(weight_decay=1e-4), more.coupled_decay())
MORE_ON_A_ROLLOUT = (
    inside("decay after the write, lazily", "cms_write", mutants.write_lazy),
    inside("norm of the row not renewed", "cms_write", mutants.write_lazy),
    misread("threshold 0.4 for 0.5", "cms_write", salience_threshold=0.4),  # of the ten gates of a single step none lies between
    bugs.state_in_low_precision("cms_write", output=0),
)
UNSEEN = (
    inside("w not clipped", "core", mutants.core),
    inside("s without its past", "core", mutants.core),
    inside("row overwritten", "cms_write", mutants.write),
    inside("levels averaged for mixed", "cms_read", mutants.reading),
    inside("dt without its scale", "core.wave.ssm", mutants.ssm),
    inside("relu before the norm", "encoder", mutants.encoder),
    inside("decoder reads s before the step", "", mutants.stepped),
    inside("y averaged over the state", "core.wave.ssm", mutants.ssm),
)
UNSEEN_ON_A_LINEAR_STEP = (inside("columns modulated for rows", "core.wave", mutants.linear),)
UNSEEN_ON_A_ROLLOUT = (inside("keys not folded", "cms_write", mutants.write_lazy),)

FEW: tuple[tuple[Case, tuple[Injector, ...]], ...] = ((STEP, ON_A_STEP), (ROLLOUT, ON_A_ROLLOUT))
RUNS = (
    (STEP, (*ON_A_STEP, *MORE_ON_A_STEP)), (SPOILT, ON_A_SPOILT_STEP), (LINEAR_STEP, ON_A_LINEAR_STEP), (TRAINED, WHILE_TRAINING),
    (ROLLOUT, (*ON_A_ROLLOUT, *MORE_ON_A_ROLLOUT)),
)
UNSEEN_RUNS = ((STEP, UNSEEN), (LINEAR_STEP, UNSEEN_ON_A_LINEAR_STEP), (ROLLOUT, UNSEEN_ON_A_ROLLOUT))
