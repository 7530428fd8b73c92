"""LAM in JAX by itself: an embedding does not depend on padding or neighbours, positions stretch, bad masks are named."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conf.models import LamConfig
from jax_impl.functional import LamModel
from jax_impl.lam import LAM
from jax_impl.weights import flatten

# chunks so short that psi, which is seen from the third chunk on, matters in the second sentence
SMALL = LamConfig(vocab_size=29, dim=15, heads=3, depth=2, ffn_dim=22, max_positions=11, max_length=40, chunk_size=3)
LENGTHS = np.array([17, 10, 1])
MASK = (np.arange(17) < LENGTHS[:, None]).astype(np.int32)

QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile; the arithmetic is tiny


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 29, (batch, length))


@functools.cache
def make(config: LamConfig = SMALL, **options: Any) -> tuple[LamModel, dict[str, Any], Any]:
    """A model, weights of which none is zero or one, and its jitted `apply`."""
    model, rng = LamModel(config, **options), np.random.default_rng(5)
    variables = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), jax.eval_shape(model.init))
    return model, variables, jax.jit(model.apply, static_argnums=3, compiler_options=QUICK)


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def unit(x: jax.Array) -> np.ndarray:
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def test_padding_and_neighbours_do_not_matter() -> None:
    with jax.enable_x64(True):
        _, variables, apply = make(dtype="float64")
        ids = tokens(3, 17)
        together = apply(variables, ids, MASK, True)
        alone = apply(variables, ids[1:2, :10])
        # float64 sums over other lengths, amplified by the norms of two blocks: about 1e-15
        assert relative(together.embedding[1], alone.embedding[0]) < 1e-12
        assert relative(together.last_hidden_state[1, :10], alone.last_hidden_state[0]) < 1e-12
        order = [2, 0, 1]
        moved = apply(variables, ids[order], MASK[order], True)
        assert relative(moved.embedding, together.embedding[jnp.asarray(order)]) < 1e-12
        assert (together.last_hidden_state[1, 9] != 0).any() and all((hidden[1, 10:] == 0).all() for hidden in together.hidden_states)
        refilled = apply(variables, np.where(MASK, ids, 28 - ids), MASK, True)
        assert (refilled.last_hidden_state == together.last_hidden_state).all() and (refilled.embedding == together.embedding).all()
        assert abs(jnp.linalg.norm(together.embedding, axis=1) - 1).max() < 1e-15 and alone.hidden_states is None


def test_a_layer_does_not_see_what_stands_in_the_padding() -> None:
    model, variables, _ = make(dataclasses.replace(SMALL, depth=1))
    x, noise = np.random.default_rng(0).normal(size=(2, 3, 17, 15)).astype(np.float32)
    layer = jax.jit(lambda x, mask: model.merge(variables).blocks[0].delta(x, mask), compiler_options=QUICK)
    (y, state), (again, other) = (layer(np.where(MASK[..., None], x, rest), MASK == 1) for rest in (0, noise))
    assert (y == again).all() and all((state[name] == other[name]).all() for name in ("S_fast", "S_slow"))


def test_remat_recomputes_every_block() -> None:
    def saved(remat: bool) -> int:
        model, variables, _ = make(remat=remat)
        text = str(jax.make_jaxpr(jax.grad(lambda params: model.apply({**variables, "params": params}, tokens(2, 5)).embedding.sum()))(
            variables["params"]))
        return text.count("checkpoint") + text.count("remat")

    assert saved(True) >= SMALL.depth and saved(False) == 0


def test_hidden_states_and_repeated_gelu() -> None:
    shallow, ids = dataclasses.replace(SMALL, depth=1), tokens(2, 5)
    _, variables, apply = make(shallow)
    twice, once = (run(variables, ids, None, True) for run in (apply, make(dataclasses.replace(shallow, gelu_repeats=1))[2]))
    assert len(twice.hidden_states) == 2 and (twice.hidden_states[1] == twice.last_hidden_state).all()
    np.testing.assert_allclose(twice.embedding, unit(twice.last_hidden_state.mean(1)), atol=1e-6)  # float32, entries below one
    assert (once.hidden_states[0] == twice.hidden_states[0]).all() and relative(once.embedding, twice.embedding) > 1e-3


@pytest.mark.parametrize("length", [11, 12, 40])
def test_positions_are_stretched_over_the_valid_tokens(length: int) -> None:
    module, table = nnx.eval_shape(lambda: LAM(SMALL, rngs=nnx.Rngs(0))), 0.02 * np.random.default_rng(0).normal(size=(11, 15))
    module.position_embeddings.embedding = nnx.Param(jnp.asarray(table, jnp.float32))
    lengths = np.array([length, 11, 12, 3])
    mask = np.arange(length) < np.minimum(lengths, length)[:, None]
    found = np.broadcast_to(module.positions(length, jnp.asarray(mask)), (4, length, 15))
    alone = module.positions(length, None)
    for row, n in enumerate(mask.sum(1)):
        places = np.arange(n) * (10 / (n - 1) if n > 11 else 1)
        expected = np.stack([np.interp(places, np.arange(11), column) for column in table.T], axis=1)
        np.testing.assert_allclose(found[row, :n], expected, atol=1e-8)  # entries of 0.02 in float32
    np.testing.assert_allclose(alone[0], found[0], atol=1e-8)


def test_positions_are_exact_in_32_bits() -> None:
    module = nnx.eval_shape(lambda: LAM(LamConfig(vocab_size=5, dim=1, heads=1, depth=1, ffn_dim=1), rngs=nnx.Rngs(0)))
    module.position_embeddings.embedding = nnx.Param(jnp.arange(512, dtype=jnp.float32)[:, None])
    found = np.asarray(module.positions(32768, None))[0, :, 0]
    exact = np.arange(32768) * 511 / 32767
    np.testing.assert_allclose(found, exact, atol=511 * 2.0**-24)  # one rounding of a float32 below 512


def test_names_sizes_and_what_is_trained() -> None:
    model, variables, _ = make()
    arrays = model.arrays(variables)
    shapes = {
        "delta.k_conv1d.weight": (15, 1, 4), "delta.fast_decay_proj.weight": (3, 15), "delta.slow_decay_bias": (3,), "ffn_in.weight": (22, 15),
        "delta.rule.W_bilinear": (3, 5, 5), "delta.rule.temp": (3,), "delta.rule.chunk_flux.hidden.weight": (2, 11), "norm_delta.bias": (15,),
        "delta.rule.token_flux.hidden.weight": (2, 10), "delta.rule.token_flux.out.weight": (1, 2), "delta.o_norm.gate": (5,)}
    assert {name: arrays[f"blocks.1.{name}"].shape for name in shapes} == shapes
    assert set(flatten(variables["buffers"])) == {("blocks", i, "delta", "o_norm", "gate") for i in range(2)}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, variables, model.variables(arrays)))
    with pytest.raises(ValueError, match=r"lm_head.weight is not used"):  # tied to an embedding that LAM has under another name
        model.variables({**arrays, "lm_head.weight": arrays["word_embeddings.weight"]})
    base = nnx.eval_shape(lambda: nnx.state(LAM(rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == 23_700_948


@pytest.mark.parametrize(("mask", "message"), [
    (np.ones((2, 4)), r"attention_mask must have the shape of input_ids, \(2, 3\), found \(2, 4\)"),
    (np.array([[1, 1, 0], [0, 0, 0]]), "attention_mask: row 1 has no valid token"),
    (np.array([[1, 1, 0], [1, 0, 1]]), "attention_mask: row 1 has padding before a valid token"),
    (np.array([[0, 1, 1], [1, 0, 0]]), "attention_mask: row 0 has padding before a valid token"),
])
def test_bad_masks_are_named(mask: np.ndarray, message: str) -> None:
    model, variables, apply = make()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.asarray(tokens(2, 3)), jnp.asarray(mask))
    if "shape" in message:
        with pytest.raises(ValueError, match=message):
            apply(variables, tokens(2, 3), mask)


@pytest.mark.parametrize(("ids", "message"), [
    (np.full((2, 3), 29), r"must lie in \[0, 29\), found 29"),
    (np.zeros((2, 0), int), "neither of them 0"),
    (np.zeros((1, 41), int), "at most max_length=40 tokens, found 41"),
])
def test_bad_ids_are_named(ids: np.ndarray, message: str) -> None:
    model, variables, _ = make()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, ids)
