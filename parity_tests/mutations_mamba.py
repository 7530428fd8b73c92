"""Porting bugs for the healthy port of GroundedMamba. FEW run with the tests, but for the
dearest, which `test_mutations` exchanges. RUNS are those that the harness was tuned on.

UNSEEN_RUNS were written before anything was measured on them, and nothing was tuned for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import layers
from jax_impl.ops import memory_bank
from parity_tests import mutants_mamba as mutants
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters import nnx_injectors_more as more
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.mutate import Injector
from parity_tests.specs import DEFAULT, grounded_mamba

# the regimes that the bugs below need: the state handed on, the offset that breaks a one-pass variance, more than one chunk, a NaN
CASE = grounded_mamba("grounded_mamba", DEFAULT, regimes=("as is", "carried state", "+ 100", "one NaN"))

# What no forward pass shows is found after it, so on one block, in float64 and with few splits, each of which compiles: test_grounded_mamba
# has the other tiers.
LATE = grounded_mamba("grounded_mamba_late", dataclasses.replace(DEFAULT, depth=1), regimes=("as is",), split=3)
LATE = dataclasses.replace(LATE, dtypes=("float64",))


def misread(name: str, path: str, where: str | None = None, **fields: Any) -> Injector:
    """A module that was ported with another value of some fields of its config."""
    return Injector(name, path if where is None else where, patches=(
        Patch(path, prepare=lambda m: setattr(m, "config", dataclasses.replace(m.config, **fields))),))


def inside(bug: str, path: str, mutant: Callable[[str | None], Callable]) -> Injector:
    """A module whose call is that of a mutant."""
    return Injector(bug, path, patches=(Patch(path, mutant(bug)),))


def instead(bug: str, path: str, namespace: Any, method: str = "__call__", where: str | None = None, **functions: Callable) -> Injector:
    """A module that calls other functions of a namespace."""
    return Injector(bug, path if where is None else where, patches=(Patch(path, more.within(namespace, **functions), method=method),))


def states_exchanged(model: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
    return call(args[0], args[1][::-1] if len(args) > 1 and args[1] is not None else None, **kwargs)


def states_of_another_row(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
    return call(args[0], jax.tree.map(lambda leaf: leaf[::-1], args[1]) if len(args) > 1 else None, **kwargs)


def by_dot_product(row_keys: jax.Array, slot_keys: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(count == 0, -jnp.inf, row_keys @ slot_keys.mT).argmax(-1)


def frobenius(matrix: jax.Array, max_singular: float) -> jax.Array:
    norm = jnp.sqrt(jnp.square(matrix).sum())
    return matrix * (max_singular / jnp.maximum(norm, max_singular))


def largest_row(matrix: jax.Array, max_singular: float) -> jax.Array:
    return matrix * (max_singular / jnp.maximum(jnp.abs(matrix).sum(1).max(), max_singular))


def sigmoid_decay(value: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.log(np.log1p(np.exp(-value)))  # exp(-exp(this)) is sigmoid(value)


INJECTORS = (
    bugs.transposed("blocks.1.rwkv.key_proj"),
    bugs.epsilon("blocks.0.ln_rwkv"),
    bugs.fast_variance("blocks.1.ln_ssm"),
    bugs.missing_bias("blocks.1.ssm.dt_proj"),
    bugs.left_at_initialisation("blocks.1.rwkv.memory_gate"),
    bugs.swapped_heads("blocks.0.rwkv.time_first", heads=DEFAULT.rwkv_heads),
    bugs.dropped_state("blocks.1.ssm"),
    bugs.early_state("blocks.1.rwkv"),
    misread("key not normalised", "blocks.0.rwkv", normalised_key=False),
)
LATE_INJECTORS = (
    bugs.extra_stop_gradient("blocks.0.rwkv.receptance_proj"),
    bugs.untied("embedding"),
    bugs.optimiser_setting(weight_decay=1e-4),
)
MORE = (
    bugs.plus_one("ln_out"),
    bugs.scaled_output("blocks.0.ssm"),
    bugs.wrong_last_token("blocks.1.rwkv.output_proj"),
    bugs.averaged_over_batch("blocks.0.rwkv.readout_norm"),
    bugs.stale_state("blocks.0.rwkv"),
    bugs.state_in_low_precision("blocks.0.rwkv"),
    bugs.shifted("blocks.1.ssm.C_proj"),
    bugs.wrong_channel("blocks.0.rwkv.value_proj", channel=31),
    bugs.low_precision("blocks.1.ssm"),
    misread("decay of the write: gain for bonus", "blocks.1.rwkv", time_first="gain"),
    misread("gate 0.5 for 0.7", "blocks.0", gate_ssm=0.5),
    misread("gate inverted", "blocks.1", gate_ssm=1 - DEFAULT.gate_ssm),
    misread("hard clamp for smooth", "blocks.1.ssm", dt_clamp="hard"),
    misread("dt without its minimum", "blocks.0.ssm", dt_min=0.0),
    misread("retrieval heads 7 for 14", "blocks.1.rwkv", retrieval_heads=7),
    misread("spectral bound 1 for 0.99", "blocks.0.ssm", max_singular=1.0),
    instead("spectral bound missing", "blocks.1.ssm", layers, spectral_bound=lambda matrix, _: matrix),
    instead("spectral bound by the Frobenius norm", "blocks.0.ssm", layers, spectral_bound=frobenius),
    bugs.changed_leaf("transition not transposed", "blocks.1.ssm.A", lambda value, _: value.T),
    bugs.changed_leaf("skip missing", "blocks.0.ssm.D", lambda value, _: np.zeros_like(value)),
    bugs.changed_leaf("the two step sizes exchanged", "blocks.0.ssm.dt_proj.kernel", lambda value, _: value[:, ::-1]),
    bugs.changed_leaf("decay as sigmoid for exp(-exp)", "blocks.0.rwkv.time_decay", sigmoid_decay),
    more.bias_outside("blocks.0.ssm", "dt_proj", method="step_size"),
    *(inside(bug, "blocks.1.ssm", mutants.scan) for bug in (
        "input of the state without its step size", "norm on the old state", "transition after the write",
        "identity missing from the transition", "state norm with ddof 1", "output of the state before its update")),
    *(inside(bug, "blocks.0.rwkv", mutants.memory) for bug in (
        "decay after the write", "gate on the state instead of on the output", "bonus missing", "state read after its update",
        "decay before the read", "state read along the wrong axis", "key and value exchanged in the write",
        "ragged chunk decays as a whole one", "ragged chunk starts from zero")),
    *(inside(bug, "blocks.1.rwkv", mutants.bank) for bug in (
        "bank read without its de-biasing", "empty slots attended", "scores not divided by sqrt(d)",
        "attention of the bank over the wrong axis")),
    inside("bank added before the norm", "blocks.1.rwkv", mutants.rwkv),
    instead("rows of the bank taken from the beginning", "blocks.0.rwkv", memory_bank, row_positions=lambda tokens, rows, writes: jnp.arange(rows)),
    *(inside(bug, "blocks.1", mutants.block) for bug in (
        "one norm for both branches", "norm behind the residual", "residual missing", "first state carried instead of the last")),
    Injector("states of the blocks exchanged", "", patches=(Patch("", states_exchanged),)),
    more.exchanged("blocks.0.rwkv.memory_keys", "blocks.0.rwkv.memory_values"),
    more.loaded_twice("blocks.1.ln_rwkv.scale", "blocks.1.ln_ssm.scale"),
    more.exchanged("blocks.0.rwkv.receptance_proj.kernel", "blocks.0.rwkv.value_proj.kernel"),
    more.embedding_scale("embedding"),
    more.embedding_scale_dtype("embedding"),
    more.clamped_index("embedding", DEFAULT.vocab_size - 3),
    more.wrong_weight_row("embedding.embedding", 5),
    more.coarse_weight("blocks.1.rwkv.memory_query.kernel"),
    more.coarse_input("blocks.0.ssm.B_proj"),
    more.tf32_matmul("blocks.1.rwkv.value_proj"),
    more.cast_before_the_scale("blocks.0.ln_out"),
    more.ddof("blocks.1.ln_out"),
    more.epsilon_outside("blocks.0.ln_ssm"),
    more.wrong_head("blocks.1.rwkv.readout_norm", DEFAULT.rwkv_heads, 3),
    more.wrong_row("blocks.0.ssm.C_proj", 1),
    more.dropout_left_on("blocks.1.rwkv.output_proj"),
    more.nan_to_zero("blocks.0.ln_rwkv"),
    more.dropped_ragged_token("blocks.1.rwkv", mutants.CHUNK),
)
MORE_LATE = (
    bugs.optimiser_setting(eps=1e-6),
    bugs.optimiser_setting(betas=(0.9, 0.999)),
    bugs.optimiser_setting(lr=1e-3),
    bugs.optimiser_setting(clip=None),
    more.coupled_decay(),
    more.epsilon_in_the_root(),
    more.clipped_after_the_moments(),
    more.no_bias_correction(),
    more.kept_gradient("blocks.0", rank=4),
    more.written_in_place("blocks.0.rwkv", "writes"),
    misread("bank written every 11th step", "blocks.0.rwkv", where="optimiser", memory_every=11),
)
UNSEEN = (
    inside("tanh for the sigmoid of the receptance", "blocks.1.rwkv", mutants.rwkv),
    inside("key normalised by the decay", "blocks.1.rwkv", mutants.rwkv),
    inside("heads joined in the other order", "blocks.0.rwkv", mutants.rwkv),
    inside("bank read by the key", "blocks.0.rwkv", mutants.rwkv),
    inside("last state returned before its norm", "blocks.0.ssm", mutants.scan),
    instead("spectral bound by the largest row", "blocks.1.ssm", layers, spectral_bound=largest_row),
    Injector("states of another row of the batch", "blocks.0", patches=(Patch("blocks.0", states_of_another_row),)),
    inside("each branch normalised by itself", "blocks.0", mutants.block),
    bugs.changed_leaf("decay of the next head", "blocks.1.rwkv.time_decay", lambda value, _: np.roll(value, 1, 0)),
)
LATE_UNSEEN = (
    instead("nearest slot by the dot product", "blocks.0.rwkv", memory_bank, "update_memory", "optimiser", nearest_slots=by_dot_product),
)

FEW = ((CASE, INJECTORS), (LATE, LATE_INJECTORS))
RUNS = ((CASE, (*INJECTORS, *MORE)), (LATE, (*LATE_INJECTORS, *MORE_LATE)))
UNSEEN_RUNS = ((CASE, UNSEEN), (LATE, LATE_UNSEEN))
