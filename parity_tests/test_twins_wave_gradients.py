"""Gradients of WaveCore in torch and JAX, through several steps, against the complex steps of its NumPy twin, in float64.

The cases, and how the modules are run, are those of `test_twins_wave.py`. Letters: B batch, T time.
"""

from functools import lru_cache

import numpy as np
import pytest

from parity_tests.twins_wave import WaveCoreTwin

pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from parity_tests.test_twins_wave import BACKENDS, by_call, by_rollout, config_of, held_of, inputs, randomised, start  # noqa: E402
from torch_impl.ops.cms import FOLD  # noqa: E402

# Complex steps are exact, so what is left is the rounding of two gradients; acceptance asks 1e-10 between implementations.
BOUND = 1e-11
STEPS, BATCH = 4, 2
IN_LOSS = ("action", "value", "next_obs", "fast_state", "wave_state", "particle_state")


def size_of(leaves):
    """A scalar whose slope differs from entry to entry."""
    return sum((leaf + 0.5 * leaf * leaf).sum() for leaf in leaves)


def loss_by_call(module, held, *sequence):
    total = 0.0
    for step in zip(*sequence, strict=True):
        info, held = by_call(module, held, *step)
        total = total + size_of(info[name] for name in IN_LOSS if name in info)
    return total + size_of((*held[3], *held[4]))


def loss_by_scan(module, held, *sequence):
    """`loss_by_call` in JAX, compiled once for all steps."""

    def step(held, one):
        info, held = by_call(module, held, *one)
        return held, {name: info[name] for name in IN_LOSS if name in info}

    held, info = jax.lax.scan(step, held, sequence)
    return size_of((*info.values(), *held[3], *held[4]))


def loss_by_rollout(module, held, *sequence):
    info, _ = by_rollout(module, held, *sequence)
    return size_of((*(info[name] for name in IN_LOSS if name in info), *info["cms_memories"], *info["cms_keys"]))


def twin_loss(config, arrays, state, sequence):
    steps, last = WaveCoreTwin(config, arrays).rollout(state, *sequence)
    return size_of((*(out[name] for out in steps for name in IN_LOSS if name in out), *last["memories"], *last["keys"]))


@lru_cache
def edge_case(variant):
    """Configuration, arrays, state and inputs with entries of p exactly at both limits for good, and a relu at exactly zero in every tower."""
    config = config_of(variant)
    arrays, state = randomised(config), start(config, batch=BATCH, near=0.2)
    arrays["core.particle_out.weight"][:2], arrays["core.particle_out.bias"][:2] = 0.0, 0.0
    state["p"][:, 0], state["p"][:, 1] = config.state_saturation_limit, -config.state_saturation_limit
    for tower in ("encoder.obs", "encoder.join", "cms_read.query", "core.particle", "decoder.hidden"):
        arrays[tower + "_norm.weight"][3], arrays[tower + "_norm.bias"][3] = 0.0, 0.0
    return config, arrays, state, inputs(steps=STEPS, batch=BATCH)


@lru_cache
def slopes(variant):
    """A direction and the derivative of the loss along it, by the twin: for every parameter by name, and for the leaves of (held, *inputs)."""
    config, arrays, state, sequence = edge_case(variant)

    def moved(value, index):
        direction = np.random.default_rng([9, index]).standard_normal(value.shape)
        return direction, value + 1e-30j * direction

    found = {}
    for index, (name, value) in enumerate(arrays.items()):
        direction, changed = moved(value, index)
        found[name] = direction, twin_loss(config, {**arrays, name: changed}, state, sequence).imag / 1e-30
    leaves, tree = jax.tree.flatten((held_of(state), *sequence))
    beside = []
    for index, value in enumerate(leaves):
        direction, changed = moved(value, len(arrays) + index)
        held, *rest = jax.tree.unflatten(tree, [*leaves[:index], changed, *leaves[index + 1 :]])
        beside.append((direction, twin_loss(config, arrays, dict(zip(state, held, strict=True)), rest).imag / 1e-30))
    return found, beside


@pytest.mark.filterwarnings("error::numpy.exceptions.ComplexWarning")  # an imaginary part that is dropped is a derivative that is lost
@pytest.mark.parametrize(
    ("backend", "loss", "variant"),
    [("torch", loss, variant) for loss in (loss_by_call, loss_by_rollout) for variant in ("many at once", "linear wave, slot0, all heads")]
    + [("jax", loss_by_scan, "many at once"), ("jax", loss_by_rollout, "many at once"), ("jax", loss_by_rollout, "linear wave, slot0, all heads")],
)
def test_gradients(backend, loss, variant):
    """Every gradient, to parameters by name and to states, memory and inputs, through time and writes, against the twin's complex steps.

    Row and open or closed are constants, a closed gate gives none, clip passes all up to the limit and at it, relu none at zero.
    """
    config, arrays, state, sequence = edge_case(variant)
    parameters, rest = BACKENDS[backend](config, arrays).gradients(loss, held_of(state), *sequence)
    expected, beside = slopes(variant)
    assert parameters.keys() == expected.keys()
    pairs = [(name, parameters[name], *expected[name]) for name in expected]
    pairs += [(f"argument {index}", found, *one) for index, (found, one) in enumerate(zip(jax.tree.leaves(rest), beside, strict=True))]
    for name, found, direction, slope in pairs:
        scale = np.linalg.norm(found) * np.linalg.norm(direction)
        assert scale > 0 and abs((found * direction).sum() - slope) <= BOUND * scale, name


def test_the_lazy_scale_is_folded_on_the_way():
    config = config_of("many at once")
    assert all((1 - decay) ** STEPS < FOLD for decay in config.cms_decays[:2])
