"""WaveCore in JAX: its steps are its rollout, its lazy memory the full one, what it refuses, how it starts, and that it learns."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from conf.models import TIER_SIZES, WaveCoreConfig
from jax_impl.functional import WaveCoreModel, make_core_model
from jax_impl.ops.wave import saturate
from jax_impl.wavecore import LinearWave
from jax_impl.weights import flatten
from parity_tests.harness.adapters.nnx_trace import quick_options

CONFIG = WaveCoreConfig(
    d_s=14, d_w=10, d_p=7, d_e=13, d_k=5, d_c=11, num_levels=2, cms_sizes=(6, 9), cms_dims=(15, 17), cms_decays=(0.1, 0.05), mamba_state_dim=2,
    heads=("action", "value", "world_model"), salience_threshold=0.48)
OBS, ACTION, OUTPUT = 19, 12, 18
GATES = tuple(map(jax.tree_util.DictKey, ("cms_write", "gate")))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def quick(function: Any) -> Any:
    """`function`, jitted by what compiles fastest; the arithmetic is tiny."""
    return jax.jit(function, compiler_options=quick_options())


@functools.cache
def make(**fields: Any) -> tuple[WaveCoreModel, dict[str, Any]]:
    """A model and its weights, drawn by NumPy: JAX compiles a program for every shape that it draws.

    They have the sizes that they start with, but for the write gates, which units of s at their limit would keep always open or closed.
    """
    model, rng = WaveCoreModel(dataclasses.replace(CONFIG, **fields), OBS, ACTION, OUTPUT, dtype="float64"), np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        constant = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
        drawn = rng.normal(scale=leaf.shape[0] ** -0.5, size=leaf.shape) if constant is None else np.full(leaf.shape, constant)
        if path[1:3] == GATES:
            drawn[: CONFIG.d_s] *= 0.02
        return drawn

    return model, jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init))


def inputs(*shape: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(*shape, width)) for width in (OBS, ACTION, 1))


def zeros(model: WaveCoreModel, batch: int | None) -> Any:
    return jax.tree.map(np.asarray, model.init_state(batch))


def assert_close(found: Any, expected: Any, bound: float) -> None:
    """Every leaf to `bound`, relative to its largest entry or to 1."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=bound * max(1.0, float(np.abs(other).max())))


@pytest.mark.parametrize("batch", [None, 3])
def test_rollout_of_200_steps_is_200_steps(batch: int | None) -> None:
    model, variables = make()
    xs = inputs(200, *(() if batch is None else (batch,)))
    y, last, info = quick(model.rollout)(variables, zeros(model, batch), *xs)
    state, seen, step = zeros(model, batch), [], quick(model.step)
    for now in zip(*xs, strict=True):
        out, state, about = step(variables, state, *now)
        seen.append((out, about))
    assert_close(state, last, 1e-11)
    assert_close(jax.tree.map(lambda *steps: np.stack(steps), *seen), (y, info), 1e-11)
    assert all((norms > 0).all() for norms in last.norms)  # full, so that rows are chosen by norm


@pytest.mark.parametrize("rule", ["least_salient", "slot0"])
def test_the_lazy_memory_is_the_plain_one_in_the_closed_loop(rule: str) -> None:
    """100 steps, saved as arrays and loaded after 50; the level with decay 0.1 is folded once."""
    model, variables = make(cms_write=rule)

    @quick
    def run(state: Any, plain: Any, xs: Any) -> Any:
        def both(held: Any, now: Any) -> Any:
            state, plain = held
            y, state, info = model.step(variables, state, *now)
            expected, full = model.apply(variables, *now, *plain)
            plain = tuple(full.pop(name) for name in ("fast_state", "wave_state", "particle_state", "cms_memories", "cms_keys"))
            lazy = (*state[:3], *model.memories(state))
            return (state, plain), ((y, lazy, {name: info[name] for name in full}), (expected, plain, full), state.scales[0])

        return jax.lax.scan(both, (state, plain), xs)

    state, xs = zeros(model, 3), inputs(100, 3)
    held, first = run(state, tuple(state[:5]), tuple(x[:50] for x in xs))
    assert all(0 < scale < 1 for scale in held[0].scales)
    _, second = run(*jax.tree.map(np.array, held), tuple(x[50:] for x in xs))
    for found, expected, _ in (first, second):
        assert_close(found, expected, 1e-11)
    assert (np.concatenate([first[2], second[2]]) == 1).sum() == 1


@pytest.mark.parametrize("kind", ["step", "rollout", "apply"])
def test_an_observation_that_is_not_finite_is_refused(kind: str) -> None:
    model, variables = make()
    state, (x, a, r) = zeros(model, 3), inputs(4, 3)
    x[2, 1, 5] = np.nan
    run = {"step": lambda: model.step(variables, state, x[2], a[2], r[2]), "rollout": lambda: model.rollout(variables, state, x, a, r),
           "apply": lambda: model.apply(variables, x[2], a[2], r[2], *state[:5])}[kind]
    with pytest.raises(ValueError, match=r"^x_obs \((4, )?3, 19\) must be finite, found NaN or infinity$"):
        run()


def test_an_observation_that_is_not_finite_never_reaches_the_memory() -> None:
    """Inside `jit`, where values cannot be looked at, its row keeps the decayed memory and the other rows go on as if it were not there."""
    model, variables = make(salience_threshold=0.0)

    @quick
    def run(state: Any, *now: Array) -> Any:
        lazy = model.step(variables, state, *now)[1]
        plain = model.apply(variables, *now, *state[:3], *model.memories(state))[1]
        return lazy, model.memories(lazy), (plain["cms_memories"], plain["cms_keys"]), model.memories(state)

    state = zeros(model, 3)
    for seed in range(5):
        state = run(state, *inputs(3, seed=seed))[0]
    now = inputs(3, seed=9)
    _, expected, _, before = run(state, *now)
    now[0][1, 4] = np.nan
    lazy, *found, _ = run(state, *now)
    assert np.isnan(lazy.s[1]).all() and np.isfinite(lazy.s[::2]).all()
    for after in found:
        for kind, old, new in zip(after, before, expected, strict=True):
            for level, decay in enumerate(CONFIG.cms_decays):
                np.testing.assert_allclose(kind[level][1], (1 - decay) * old[level][1], rtol=1e-14)
                np.testing.assert_allclose(kind[level][::2], new[level][::2], rtol=1e-12, atol=1e-14)


def test_float32_is_healthy_over_100_000_steps() -> None:
    """The whole core, one scan: what it holds is finite, norms are those of the memory, and the size of nothing drifts."""
    model, variables = WaveCoreModel(CONFIG, OBS, ACTION, OUTPUT), jax.tree.map(lambda leaf: leaf.astype(np.float32), make()[1])
    run = quick(lambda state, *xs: model.rollout(variables, state, *xs)[1:])
    state, sizes = jax.tree.map(lambda leaf: leaf.astype(np.float32), zeros(model, 1)), []
    xs = tuple(x.astype(np.float32) for x in inputs(20_000, 1))
    for _ in range(5):
        state, info = run(state, *xs)
        sizes.append([float(np.square(info[name]).mean()) for name in ("context", "query", "fast_state", "wave_state", "particle_state")])
        for memory, norms, scale in zip(state.memories, state.norms, state.scales, strict=True):
            np.testing.assert_allclose(norms, np.square(memory).sum(-1), rtol=1e-6)  # sums of 15 or 17 squares
            assert 2**-10 <= scale <= 1 and norms.min() > 0
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert (np.abs(np.divide(sizes[-1], sizes[0]) - 1) < 0.2).all()  # means over 20,000 steps of the same inputs


def test_clip_and_relu_have_their_gradients_at_the_limit() -> None:
    x = jnp.array([-10.5, -10.0, 3.0, 10.0, np.nextafter(10.0, 11)])
    y, gradient = quick(jax.value_and_grad(lambda x: saturate(x, 10.0).sum()))(x)
    assert y == 3 and gradient.tolist() == [0, 1, 1, 1, 0]
    assert saturate(x, 0.0) is x and jax.grad(jax.nn.relu)(0.0) == 0


def test_states_stay_at_the_limit_and_the_fast_state_takes_the_unclipped_ones() -> None:
    """With every other weight zero: p~ = p + bias, s~ = s + U_p p~ / 2."""
    for limit, particle in ((10.0, 10.0), (0.0, 12.0)):
        model, variables = make(state_saturation_limit=limit)
        params = jax.tree.map(np.zeros_like, variables["params"])
        params["core"]["particle_out"]["bias"] += 3.0
        params["core"]["U_p"] += 0.01
        core = quick(lambda params, *given, model=model: model.merge({"params": params}).core(*given))
        s, _, p = core(params, np.zeros((3, 14)), np.ones((3, 10)), np.full((3, 7), 9.0), np.ones((3, 13)), np.ones((3, 11)))
        assert (p == particle).all()
        np.testing.assert_allclose(s, 0.5 * 7 * 0.01 * 12.0, rtol=1e-14)


@pytest.mark.parametrize(("tier", "count"), [("v2.0", 954_697), ("v3.0", 3_408_521), ("v4.0", 12_813_577)])
def test_tiers_have_their_parameters(tier: str, count: int) -> None:
    shapes = jax.eval_shape(WaveCoreModel(WaveCoreConfig.tier(tier), **TIER_SIZES[tier]).init)
    assert set(shapes) == {"params"} and sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_presets_build() -> None:
    for preset in (WaveCoreConfig.development, WaveCoreConfig.pi5_optimized, WaveCoreConfig.cloud_optimized):
        model = WaveCoreModel(preset(), 768, 64, 64)
        assert len(jax.eval_shape(lambda model=model: model.init_state(3)).memories) == preset().num_levels
        if preset is WaveCoreConfig.pi5_optimized:
            assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init))) == 954_697


def test_heads_that_are_off_have_no_parameters_and_no_output() -> None:
    model, variables = make(heads=("value",))
    y, _, info = jax.eval_shape(model.step, variables, zeros(model, 3), *inputs(3))
    assert y is None and info["value"].shape == (3, 1) and "next_obs" not in info
    assert not {"action", "world_model"} & set(variables["params"]["decoder"])
    y, _, info = jax.eval_shape(model.rollout, variables, zeros(model, None), *inputs(4))
    assert y is None and info["value"].shape == (4, 1)
    model, variables = make()
    y, _, info = jax.eval_shape(model.step, variables, zeros(model, 3), *inputs(3))
    assert y.shape == (3, OUTPUT) and info["next_obs"].shape == (3, OBS) and info["query"].shape == (3, 5)
    assert [weights.shape for weights in info["attention_weights"]] == [(3, 6), (3, 9)]
    given = np.ones((3, 14)), np.ones((3, 11))
    continuous, discrete = (quick(m.merge(variables).decoder)(*given)[0] for m in (model, make(output_type="discrete")[0]))
    np.testing.assert_allclose(np.tanh(discrete), continuous, rtol=1e-13)


@pytest.mark.parametrize(("name", "value", "level", "message"), [
    ("x_obs", np.zeros((3, 20)), None, "x_obs must have shape (batch, 19) or (19,), none of them 0, found (3, 20)"),
    ("x_obs", np.zeros((0, 19)), None, "x_obs must have shape (batch, 19) or (19,), none of them 0, found (0, 19)"),
    ("a_prev", np.zeros((3, 11)), None, "a_prev must have shape (3, 12) with x_obs (3, 19), found (3, 11)"),
    ("r_t", np.zeros(3), None, "r_t must have shape (3, 1) with x_obs (3, 19), found (3,)"),
    ("s_prev", np.zeros((4, 14)), None, "s_prev must have shape (3, 14) with x_obs (3, 19), found (4, 14)"),
    ("w_prev", np.zeros((3, 10), np.float32), None, "w_prev must have dtype float64, as the weights have, found float32"),
    ("p_prev", np.full((3, 7), np.inf), None, "p_prev (3, 7) must be finite, found NaN or infinity"),
    ("cms_memories", (np.zeros((3, 6, 15)),), None, "cms_memories must be a tuple of 2 levels, found 1 levels"),
    ("cms_keys", np.zeros((3, 6, 5)), None, "cms_keys must be a tuple of 2 levels, found 3 levels"),
    ("cms_memories", np.zeros((3, 9, 15)), 1, "cms_memories[1] must have shape (3, 9, 17) with x_obs (3, 19), found (3, 9, 15)"),
    ("cms_keys", np.full((3, 6, 5), np.nan), 0, "cms_keys[0] (3, 6, 5) must be finite, found NaN or infinity"),
])
def test_wrong_arguments_are_one_clear_line(name: str, value: Any, level: int | None, message: str) -> None:
    model, variables = make()
    names = ("x_obs", "a_prev", "r_t", "s_prev", "w_prev", "p_prev", "cms_memories", "cms_keys")
    given = dict(zip(names, (*inputs(3), *zeros(model, 3)[:5]), strict=True))
    given[name] = value if level is None else tuple(value if i == level else leaf for i, leaf in enumerate(given[name]))
    with pytest.raises(ValueError) as caught:
        model.apply(variables, **given)
    assert str(caught.value) == message


def test_wrong_states_and_lengths_are_one_clear_line() -> None:
    model, variables = make()
    state = zeros(model, 3)
    with pytest.raises(ValueError, match=r"^state\.s must have shape \(5, 14\) with x_obs \(5, 19\), found \(3, 14\)$"):
        model.step(variables, state, *inputs(5))
    with pytest.raises(ValueError, match=r"^state\.scales\[1\] must have shape \(\) with x_obs \(3, 19\), found \(3,\)$"):
        model.step(variables, state._replace(scales=(state.scales[0], np.ones(3))), *inputs(3))
    x, a, r = inputs(4, 3)
    for wrong in ((x, a[:3], r), (x[:0], a[:0], r[:0])):
        with pytest.raises(ValueError, match=r"^x_obs, a_prev and r_t must have the same number of steps, at least 1, along .*, found \["):
            model.rollout(variables, state, *wrong)
    with pytest.raises(ValueError, match="obs_dim must be"):
        WaveCoreModel(CONFIG, 0, ACTION, OUTPUT)


WIDE = dataclasses.replace(
    CONFIG, d_s=70, d_w=60, d_p=36, d_e=52, d_c=44, d_k=40, num_levels=1, cms_sizes=(9,), cms_dims=(17,), cms_decays=(0.1,), salience_threshold=0.05)


@pytest.fixture(scope="module")
def drawn() -> tuple[WaveCoreModel, dict[str, Any]]:
    """`make_core_model`, jitted: one program for all of its draws."""
    made = []

    @quick
    def build(key: Array) -> Any:
        model, variables = make_core_model(rng_key=key, obs_dim=OBS, action_dim=ACTION, output_dim=OUTPUT, config=WIDE)
        made.append(model)
        return variables

    with jax.enable_x64(False):
        variables = build(jax.random.key(1))
    return made[0], variables


def test_initial_values(drawn: tuple[WaveCoreModel, dict[str, Any]]) -> None:
    """Standard deviations to 10 %: the smallest of these has 1,080 values, of which that is 4 standard errors and more."""
    linear = dataclasses.replace(WIDE, use_mamba_wave=False)
    wave = quick(lambda key: nnx.to_pure_dict(nnx.state(LinearWave(linear, rngs=nnx.Rngs(key)))))(jax.random.key(2))
    named = {".".join(map(str, path)): np.asarray(leaf) for path, leaf in flatten({**drawn[1]["params"], "linear": wave}).items()}
    for name, value in named.items():
        assert value.dtype == np.float32, name
        if name.endswith("scale"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif name.endswith("kernel"):
            std = value.shape[0] ** -0.5
            assert np.abs(value).max() <= 2 * std / 0.87962566103423978 * (1 + 1e-6), name
            if value.size > 1000:
                assert value.std() == pytest.approx(std, rel=0.1), name
    for width, name in ((36, "core.U_p"), (60, "core.U_w")):
        bound = math.sqrt(6 / (70 + width))
        assert 0.98 * bound < np.abs(named[name]).max() <= bound and named[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (named["linear.A_diag"] == 0).all() and (named["core.wave.ssm.D"] == 0).all()
    small = np.concatenate([named[f"core.wave.ssm.{name}"].ravel() for name in ("a_raw", "B_base", "C_base")])  # 180 values
    assert small.std() == pytest.approx(0.02, rel=0.25) and np.abs(small).max() > 0.04  # no cut at two standard deviations
    for name in ("A_U", "A_V"):  # 900 values
        assert named[f"linear.{name}"].std() == pytest.approx(0.01, rel=0.12)


def test_the_functional_form_trains(drawn: tuple[WaveCoreModel, dict[str, Any]]) -> None:
    """The loop that users of the functional form know, on sequences: the loss goes through states and memory."""
    model, variables = drawn
    optimiser = optax.chain(optax.clip_by_global_norm(WIDE.gradient_clip), optax.adam(3e-3))
    with jax.enable_x64(False):
        xs = tuple(x.astype(np.float32) for x in inputs(4, 3))
        target = np.tanh(np.roll(xs[0], 1, 0)[..., :OUTPUT])
        zero = tuple(model.init_state(3)[:5])

        def loss_of(params: Any) -> Array:
            def step(held: Any, now: Any) -> tuple[Any, Array]:
                x, a, r, wanted = now
                y, info = model.apply({"params": params}, x, a, r, *held)
                held = tuple(info[name] for name in ("fast_state", "wave_state", "particle_state", "cms_memories", "cms_keys"))
                return held, jnp.square(y - wanted).mean() + jnp.square(info["value"] - r).mean() + jnp.square(info["next_obs"] - x).mean()

            return jax.lax.scan(step, zero, (*xs, target))[1].mean()

        @quick
        def update(params: Any, moments: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, moments = optimiser.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments, loss, gradients

        params, losses = variables["params"], []
        moments = jax.tree.map(np.asarray, quick(optimiser.init)(params))
        for _ in range(12):
            params, moments, loss, gradients = update(params, moments)
            if not losses:
                assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["cms_write"]))
            losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
