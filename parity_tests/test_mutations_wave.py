"""Porting bugs put into the healthy port of WaveCore, one at a time: each is noticed, and located at the module where it was put.

Bugs inside a module come from mutants: the module or the function again in JAX, with every bug as a branch. Without a bug each of them is
the port itself, which a test asserts, so that what the harness notices is the bug. Twelve bugs run with the tests, the others with
`--all-mutations` (`make mutations`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jax_impl.ops import cms
from jax_impl.ops.wave import saturate, selective_step, softplus
from parity_tests import families
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.compare import Place, exact
from parity_tests.harness.mutate import Injector, Mutation
from parity_tests.harness.plugin import mutation_tests
from parity_tests.harness.recording import Recording
from parity_tests.specs_wavecore import DEFAULT, STATE3, rollout, step

# the rollout trains and rounds in test_wavecore: what is left out here would compile the same layers once more
STEP = dataclasses.replace(step("wavecore_step", STATE3, batch=5, regimes=("as is",)), dtypes=("float64",), trajectory=None)
ROLLOUT = rollout("wavecore", DEFAULT, ("as is", "carried state"))


def core(bug: str | None) -> Callable:
    """`HopeCore.__call__`, with `bug` or without."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        s, w, p, e, c = args
        w = m.wave(w, m.z_proj(e), c)
        p = p + m.particle_out(jax.nn.relu(m.particle_norm(m.particle_in(jnp.concatenate([p, c], -1)))))
        g = jax.nn.sigmoid(m.gate(jnp.concatenate([s, e, c], -1)))
        g = 1 - g if bug == "gate inverted" else g
        if bug == "clipped before U_p and U_w":
            w, p = saturate(w, m.limit), saturate(p, m.limit)
        s = s + g * (p @ m.U_p[...].mT) + (1 - g) * (w @ m.U_w[...].mT)
        if bug == "states taken before clipping":
            return s, w, p
        return saturate(s, m.limit), saturate(w, m.limit), saturate(p, m.limit)

    return around


def wave(bug: str | None) -> Callable:
    """`MambaWave.__call__`, with `bug` or without."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        w, z, c = args
        zc = jnp.concatenate([z, c], -1)
        if bug == "carry reshaped in the other order":
            y, h = m.ssm(m.wave_in(zc), w.reshape(len(w), m.state_dim, -1).mT)
            h = h.mT
        else:
            y, h = m.ssm(m.wave_in(zc), w.reshape(len(w), -1, m.state_dim))
        return 0.5 * h.reshape(w.shape) + 0.5 * m.wave_out(y * jax.nn.sigmoid(m.gate_proj(zc)))

    return around


def ssm(bug: str | None) -> Callable:
    """`SelectiveSSM.__call__`, with `bug` or without."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        u, carry = args
        raw, a_raw = m.dt_proj(u), m.a_raw[...]
        dt = (jnp.exp(raw) if bug == "softplus of dt replaced by exp" else softplus(raw)) * m.config.mamba_dt_scale
        dt = dt if bug == "dt without its minimum" else dt + m.config.mamba_dt_min
        if bug == "softplus of A replaced by exp":
            a_raw = jnp.log(jnp.expm1(jnp.exp(a_raw)))  # softplus of this is exp(a_raw)
        y, h = selective_step(u, carry, dt, m.b_proj(u), m.c_proj(u), a_raw, m.B_base[...], m.C_base[...], m.D[...])
        if bug == "y of the carry before the step":
            y = selective_step(u, carry, 0 * dt, m.b_proj(u), m.c_proj(u), a_raw, m.B_base[...], m.C_base[...], m.D[...])[0]
        return y, h

    return around


def write(bug: str | None) -> Callable:
    """`cms.write`, with `bug` or without."""

    def written(memory: Any, keys: Any, value: Any, key: Any, gate: Any, decay: float, *, rule: str, threshold: float) -> tuple:
        keep = 1 - decay
        decayed, decayed_keys = keep * memory, keep * keys
        norms = jnp.square(decayed).sum(-1)
        if bug == "slot chosen before the decay by the norm of its key":
            norms = jnp.square(keys).sum(-1)
        if bug == "write gate inverted":
            gate = 1 - gate
        row, is_open = cms.choose(norms, gate, rule, threshold)
        if bug == "last slot of a tie":
            row = norms.shape[-1] - 1 - norms[:, ::-1].argmin(-1)
        if bug == "closed gate writes":
            is_open = jnp.ones_like(is_open)
        at = jnp.arange(len(row)), row

        def put(old: Any, base: Any, new: Any) -> Any:
            return base.at[at].set(jnp.where(is_open[:, None], gate * new + (1 - gate) * old[at], base[at]))

        if bug == "decay after the write":
            return keep * put(memory, memory, value), keep * put(keys, keys, key)
        if bug == "old row not decayed":
            return put(memory, decayed, value), put(keys, decayed_keys, key)
        if bug == "old row without gradient":
            return put(jax.lax.stop_gradient(decayed), decayed, value), put(jax.lax.stop_gradient(decayed_keys), decayed_keys, key)
        return put(decayed, decayed, value), put(decayed_keys, decayed_keys, key)

    return within(cms, write=written)


def write_lazy(bug: str | None) -> Callable:
    """`cms.write_lazy`, with `bug` or without."""

    def written(
        memory: Any, keys: Any, norms: Any, scale: Any, value: Any, key: Any, gate: Any, decay: float, *, rule: str, threshold: float
    ) -> tuple:
        before, scale = scale, (1 - decay) * jax.lax.stop_gradient(scale)
        row, is_open = cms.choose(norms, gate, rule, threshold)
        divisor = {"decay after the write, lazily": before, "row written without the scale": 1.0}.get(str(bug), scale)
        at = jnp.arange(len(row)), row

        def put(rows: Any, new: Any) -> Any:
            return rows.at[at].set(jnp.where(is_open[:, None], gate * new / divisor + (1 - gate) * rows[at], rows[at]))

        memory, keys = put(memory, value), put(keys, key)
        if bug != "norm of the row not renewed":
            norms = norms.at[at].set(jnp.square(memory[at]).sum(-1))
        folds = scale < cms.FOLD
        factor = jnp.where(folds, scale, 1.0)
        if bug != "norms not folded":
            norms = jnp.where(folds, jnp.square(factor * memory).sum(-1), norms)
        scale = jnp.where(folds, 1.0, scale)
        return factor * memory, factor * keys, *jax.lax.stop_gradient((norms, scale))

    return within(cms, write_lazy=written)


def read(bug: str | None) -> Callable:
    """`cms.read`, with `bug` or without."""

    def answered(query: Any, memory: Any, keys: Any, scale: Any = None) -> tuple:
        scores = jnp.einsum("bnk,bk->bn", keys, query) / (1.0 if bug == "scores not divided by sqrt(d_k)" else query.shape[-1] ** 0.5)
        scale = 1.0 if scale is None else scale
        attention = jax.nn.softmax(scores if bug == "scale forgotten in the scores" else scale * scores, -1)
        return attention, scale * jnp.einsum("bn,bnd->bd", attention, memory)

    return within(cms, read=answered)


def mixed_over_the_batch(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
    """The softmax over the levels, which are the last axis of the mixing weights, along the other one."""
    exact = jax.nn.softmax
    with mock.patch.object(jax.nn, "softmax", lambda x, axis: exact(x, 0 if x.shape[-1] == STATE3.num_levels else axis)):
        return call(*args, **kwargs)


def within(namespace: Any, **functions: Callable) -> Callable:
    """The module's own call with functions of `namespace` replaced while it is traced."""

    @contextlib.contextmanager
    def replaced() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(namespace, name, function))
            yield

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        with replaced():
            return call(*args, **kwargs)

    return around


def inside(bug: str, path: str, mutant: Callable[[str | None], Callable]) -> Injector:
    return Injector(bug, path, patches=(Patch(path, mutant(bug)),))


EPSILONS = tuple(bugs.epsilon(path, value=1e-5) for path in ("encoder.obs_norm", "cms_read.query_norm", "core.particle_norm", "decoder.hidden_norm"))
ON_A_STEP = (
    inside("states taken before clipping", "core", core),
    inside("carry reshaped in the other order", "core.wave", wave),
    inside("dt without its minimum", "core.wave.ssm", ssm),
    inside("old row not decayed", "cms_write", write),
    inside("last slot of a tie", "cms_write", write),
    inside("old row without gradient", "cms_write", write),
    EPSILONS[1],
    bugs.transposed("core.wave.ssm.b_proj"),
    bugs.stale_state("core", argument=2, output=2),
)
ON_A_ROLLOUT = (
    inside("row written without the scale", "cms_write", write_lazy),
    inside("norms not folded", "cms_write", write_lazy),
    inside("scale forgotten in the scores", "cms_read", read),
)
MORE_ON_A_STEP = (
    inside("gate inverted", "core", core),
    inside("clipped before U_p and U_w", "core", core),
    inside("softplus of dt replaced by exp", "core.wave.ssm", ssm),
    inside("softplus of A replaced by exp", "core.wave.ssm", ssm),
    inside("y of the carry before the step", "core.wave.ssm", ssm),
    inside("decay after the write", "cms_write", write),
    inside("slot chosen before the decay by the norm of its key", "cms_write", write),
    inside("write gate inverted", "cms_write", write),
    inside("closed gate writes", "cms_write", write),
    Injector("mixing weights over the wrong axis", "cms_read", patches=(Patch("cms_read", mixed_over_the_batch),)),
    inside("scores not divided by sqrt(d_k)", "cms_read", read),
    EPSILONS[0], *EPSILONS[2:],
    bugs.missing_bias("cms_write.gate.1"),
    bugs.left_at_initialisation("core.U_p"),
    bugs.plus_one("encoder.norm"),
    bugs.scaled_output("cms_read.level_proj.1"),
    bugs.averaged_over_batch("cms_read.query_out"),
    bugs.dropped_state("core.wave", argument=0),
    bugs.low_precision("core.wave"),
)
MORE_ON_A_ROLLOUT = (
    inside("decay after the write, lazily", "cms_write", write_lazy),
    inside("norm of the row not renewed", "cms_write", write_lazy),
    bugs.state_in_low_precision("cms_write", output=0),
)

found, test_detected_and_located = mutation_tests(
    (STEP, ON_A_STEP), (ROLLOUT, ON_A_ROLLOUT), more=((STEP, MORE_ON_A_STEP), (ROLLOUT, MORE_ON_A_ROLLOUT)), healthy=(STEP,))


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_cosine_alone_misses_what_the_rules_find(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {"dt without its minimum", "old row not decayed", "norms not folded", EPSILONS[1].name} <= missed
    hidden = {"clipped before U_p and U_w", "closed gate writes", *(item.name for item in EPSILONS)}
    assert hidden & found.keys() <= missed


def test_mutants_without_a_bug_are_the_port() -> None:
    for case, mutants in ((STEP, {"core": core, "core.wave": wave, "core.wave.ssm": ssm, "cms_write": write, "cms_read": read}),
                          (ROLLOUT, {"cms_write": write_lazy, "cms_read": read})):
        recording = Recording(case)
        candidate = Candidate(case, recording)
        twin = candidate.mutated(candidate.weights, tuple(Patch(path, mutant(None)) for path, mutant in mutants.items()), None, None)
        layers = [layer for regime in recording.regimes for layer in recording.forced(regime) if layer.path in mutants]
        checks = [check for layer in layers for check in exact(
            Place("forced", layer.path, "as is", "float64"), layer.outputs, twin.call(layer, "float64"), Bounds(case.bounds), "forced")]
        assert {check.where for check in checks if check.held} == set(mutants) and not [check for check in checks if not check.held]
