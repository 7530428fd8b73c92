"""GroundedMamba in JAX by itself: its forms agree, compilation does not grow with L, the functional face is pure, bad input is named."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conf.models import GroundedMambaConfig
from jax_impl import language
from jax_impl.functional import GroundedMambaModel
from jax_impl.generate import generate
from jax_impl.grounded_mamba import GroundedMamba
from jax_impl.ops import memory_bank
from jax_impl.weights import flatten

SIZES = {"vocab_size": 29, "dim": 21, "depth": 2, "ssm_dim": 5, "rwkv_heads": 3}
SMALL = GroundedMambaConfig(**SIZES, memory_size=13, memory_every=2, memory_writes=6, retrieval_heads=7)


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 29, (batch, length)))


ONE_BLOCK = dataclasses.replace(SMALL, depth=1)


@functools.cache
def moved(config: GroundedMambaConfig, dtype: str) -> dict[str, Any]:
    """Variables with every float leaf moved and the bank written to twice; those of float64 are asked for under x64."""
    model, rng = GroundedMambaModel(config, dtype=dtype), np.random.default_rng(5)
    variables = jax.jit(lambda: model.init(3))()
    variables["params"] = jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), variables["params"])

    @jax.jit
    def write(variables: Any, ids: jax.Array) -> Any:
        return model.update_memory(variables, model.apply(variables, ids, return_aux=True)[2])

    for seed in range(2 * config.memory_every):
        variables = write(variables, tokens(2, 11, seed))
    return variables


def make(config: GroundedMambaConfig = SMALL, dtype: str = "float32", **options: Any) -> tuple[GroundedMambaModel, dict[str, Any]]:
    """A model and those variables, which are the same for every option."""
    return GroundedMambaModel(config, dtype=dtype, **options), moved(config, dtype)


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@functools.cache
def loss_and_gradient(**options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of a loss that every logit and every state is in, over nine chunks of 7 and a ragged tenth, or one chunk of 64 and one token."""
    model, variables = make(ONE_BLOCK, "float64", **options)

    def loss(params: Any) -> jax.Array:
        logits, states = model.apply({**variables, "params": params}, tokens(3, 65))
        return jnp.square(logits).mean() + sum(jnp.square(s).mean() for state in states for s in state.values())

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return value, flatten(gradient)


@pytest.mark.parametrize("options", [{"chunk_size": 7}, {"chunk_size": 64}, {"chunk_size": 7, "remat": True}], ids=str)
def test_fast_forms_and_remat_equal_the_recurrent_form(options: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        (expected, there), (found, here) = loss_and_gradient(impl="recurrent"), loss_and_gradient(**options)
        assert abs(found / expected - 1) < 1e-13  # another order of float64 sums: about 1e-15
        assert here.keys() == there.keys()
        for path, leaf in there.items():
            assert relative(here[path], leaf) < 1e-12, path


def test_remat_recomputes_every_block() -> None:
    def saved(remat: bool) -> int:
        model, variables = make(remat=remat)
        text = str(jax.make_jaxpr(jax.grad(lambda p: model.apply({**variables, "params": p}, tokens(2, 5))[0].sum()))(variables["params"]))
        return text.count("checkpoint") + text.count("remat")

    assert saved(True) >= SMALL.depth and saved(False) == 0


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_the_program_does_not_grow_with_the_length(impl: str) -> None:
    model, variables = make(impl=impl)

    def equations(length: int) -> int:
        gradient = jax.grad(lambda p, ids: model.apply({**variables, "params": p}, ids)[0].sum())
        return str(jax.make_jaxpr(gradient)(variables["params"], tokens(2, length))).count(" = ")

    assert equations(128) == equations(1280)  # two chunks or more: with one, broadcasting axes of size 1 takes other equations


def test_streaming_and_generation_under_jit() -> None:
    with jax.enable_x64(True):
        model, variables = make(dtype="float64")
        apply, ids = jax.jit(model.apply), tokens(2, 17)
        whole, last = apply(variables, ids)
        states, pieces = None, []
        for piece in jnp.split(ids, (5, 6), axis=1):
            logits, states = apply(variables, piece, states)
            pieces.append(logits)
        assert relative(jnp.concatenate(pieces, axis=1), whole) < 1e-13
        assert max(relative(a[kind], b[kind]) for a, b in zip(states, last, strict=True) for kind in a) < 1e-13
        greedy = generate(lambda ids, states: apply(variables, ids, states), ids, 9, temperature=0.0)
        assert (apply(variables, greedy)[0][:, 16:-1].argmax(-1) == greedy[:, 17:]).all()
        module, compiled = model.merge(variables), functools.partial(generate, lambda ids, states: apply(variables, ids, states))
        with mock.patch.object(language, "generate", lambda called, *given: (called is module, compiled(*given))):
            is_its_own, continued = module.generate(ids, 9, temperature=0.0)
        assert is_its_own and (continued == greedy).all()


def test_gradients_stop_at_a_state_passed_in() -> None:
    model, variables = make()
    states = jax.tree.map(lambda x: x + 0.5, model.init_states(2))
    gradient = jax.jit(jax.grad(lambda states: sum(x.sum() for x in jax.tree.leaves(model.apply(variables, tokens(2, 5), states)))))(states)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_arrays_and_variables_are_inverse_and_strict() -> None:
    model, variables = make()
    arrays = model.arrays(variables)
    assert arrays["lm_head.weight"] is not arrays["embedding.weight"] and (arrays["lm_head.weight"] == arrays["embedding.weight"]).all()
    assert arrays["blocks.1.ssm.dt_proj.weight"].shape == (2, 21) and arrays["blocks.1.rwkv.memory_count"].dtype == np.int64
    assert all(value.flags.c_contiguous and value.flags.owndata for value in arrays.values())
    again = model.variables(arrays)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, variables, again))
    wrong = {**arrays, "extra": arrays["ln_out.bias"], "ln_out.bias": np.zeros(4), "lm_head.weight": arrays["lm_head.weight"] + 1}
    del wrong["blocks.0.ssm.A"]
    with pytest.raises(ValueError) as error:
        model.variables(wrong)
    for part in ("extra is not used", "ln_out.bias must have shape (21,), found (4,)", "blocks.0.ssm.A is missing", "lm_head.weight differs"):
        assert part in str(error.value)


def test_only_trained_weights_are_parameters() -> None:
    fixed = GroundedMambaModel(SMALL).init()
    learned = GroundedMambaModel(dataclasses.replace(SMALL, gate="learned")).init()
    assert "gate_proj" in fixed["buffers"]["blocks"][0] and "gate_proj" not in fixed["params"]["blocks"][0]
    assert "gate_proj" in learned["params"]["blocks"][0] and "gate_proj" not in learned["buffers"]["blocks"][0]
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(GroundedMamba(
        GroundedMambaConfig.groundthink(), rngs=nnx.Rngs(0))))))
    assert count == 13_692_184


@pytest.mark.parametrize("tokens_, rows, writes", [(22, 6, 0), (22, 6, 3), (100_003, 64, 1), (131_072, 64, 270_000), (4_194_301, 64, 2_000_000_000)])
def test_row_positions_are_exact_in_32_bits(tokens_: int, rows: int, writes: int) -> None:
    expected = [(i * tokens_ // rows + 7919 * writes) % tokens_ for i in range(rows)]
    assert memory_bank.row_positions(tokens_, rows, jnp.asarray(writes, jnp.int32)).tolist() == expected


@pytest.mark.parametrize(("ids", "message"), [
    (jnp.full((2, 3), 29), r"input_ids \(2, 3\) must lie in \[0, 29\), found 29"),
    (jnp.full((2, 3), -1), "found -1"),
    (jnp.zeros((2, 0), int), r"neither of them 0, found \(2, 0\)"),
    (jnp.zeros(3, int), r"found \(3,\)"),
    (jnp.zeros((2, 3)), "input_ids must be integers, found float32"),
])
def test_bad_token_ids_are_named(ids: jax.Array, message: str) -> None:
    model, variables = make()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, ids)
    if "lie in" not in message and "found -1" not in message:
        with pytest.raises(ValueError, match=message):
            jax.jit(model.apply)(variables, ids)


@pytest.mark.parametrize(("layer", "kind", "value", "message"), [
    (1, "wkv", jnp.zeros((2, 3, 7, 6)), r"states\[1\]\['wkv'\] must have shape \(2, 3, 7, 7\), found \(2, 3, 7, 6\)"),
    (0, "ssm", jnp.zeros((1, 5)), r"states\[0\]\['ssm'\] must have shape \(2, 5\), found \(1, 5\)"),
    (0, "ssm", jnp.full((2, 5), jnp.nan), r"states\[0\]\['ssm'\] \(2, 5\) must be finite, found NaN"),
    (0, "ssm", jnp.zeros((2, 5), jnp.bfloat16), "must have dtype float32, found bfloat16"),
])
def test_bad_states_are_named(layer: int, kind: str, value: jax.Array, message: str) -> None:
    model, variables = make()
    states = model.init_states(2)
    states[layer][kind] = value
    with pytest.raises(ValueError, match=message):
        model.apply(variables, tokens(2, 3), states)


def test_float64_outside_x64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float64 must be used inside jax.enable_x64"):
        GroundedMambaModel(SMALL, dtype="float64").init()
