"""DeltaNet in JAX by itself: the chunked rules equal the recurrent ones, zeros have zero gradients, the language model streams and is causal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conf.models import DeltaNetConfig
from cython_ext import reference
from jax_impl.deltanet import DeltaNetLayer, GatedRMSNorm, ShortConvolution
from jax_impl.functional import DeltaNetModel
from jax_impl.generate import generate
from jax_impl.ops.delta_rule import delta_rule, hierarchical_delta_rule, l2norm, normalised
from jax_impl.weights import flatten

SMALL = DeltaNetConfig(vocab_size=29, dim=15, depth=2, heads=3, ffn_dim=22, chunk_size=6)

QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile; the arithmetic is tiny


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 29, (batch, length)))


@functools.cache
def make(config: DeltaNetConfig = SMALL, **options: Any) -> tuple[DeltaNetModel, dict[str, Any], Any]:
    """A model, weights of which none is zero or one, and its jitted `apply`."""
    model, rng = DeltaNetModel(config, **options), np.random.default_rng(5)
    variables = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), jax.eval_shape(model.init))
    return model, variables, jax.jit(model.apply, compiler_options=QUICK)


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def arguments(length: int, seed: int = 0) -> dict[str, jax.Array]:
    """q, k, v, beta and a state for 2 samples of 3 heads of 5 channels; keys close to each other, where an inverse by powers of N would fail."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=(2, 3, length, 5)) for name in "qkv"} | {"initial_state": rng.normal(size=(2, 3, 5, 5))}
    return {name: jnp.asarray(x) for name, x in drawn.items()} | {
        "k": l2norm(jnp.asarray(1 + 0.3 * drawn["k"])), "beta": jnp.asarray(rng.uniform(0.5, 1, (2, 3, length)))}


def weighed(outputs: Any, seed: int = 9) -> jax.Array:
    """A loss in which every entry of every output has a weight of its own."""
    rng = np.random.default_rng(seed)
    return sum((leaf * rng.normal(size=leaf.shape)).sum() for leaf in jax.tree.leaves(outputs))


def assert_alike(one: Any, other: Any, inputs: Any, bound: float) -> None:
    """Both functions of `inputs` have the same outputs and gradients, leaf by leaf, relative to each leaf's norm."""
    def both(call: Any) -> Any:
        def loss(inputs: Any) -> tuple[jax.Array, Any]:
            outputs = call(**inputs)
            return weighed(outputs), outputs

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(inputs)
        return outputs, gradients

    for found, expected in zip(jax.tree.leaves(both(one)), jax.tree.leaves(both(other)), strict=True):
        assert relative(found, expected) < bound


@pytest.mark.parametrize(("length", "chunk", "with_state"), [(23, 7, True), (11, 64, False)])
def test_the_chunked_plain_rule_equals_the_recurrence(length: int, chunk: int, with_state: bool) -> None:
    with jax.enable_x64(True):
        inputs = arguments(length)
        if not with_state:
            del inputs["initial_state"]
        # another order of float64 sums, in systems of condition 1e2 or so: about 1e-15
        assert_alike(functools.partial(delta_rule, chunk_size=chunk), functools.partial(delta_rule, impl="recurrent"), inputs, 1e-12)


def hierarchical_arguments(length: int) -> dict[str, Any]:
    """Inputs of `hierarchical_delta_rule`, with a zero row in q, k and v."""
    rng, inputs = np.random.default_rng(1), arguments(length)
    inputs |= {name: inputs[name].at[:, :, 4].set(0.0) for name in "qkv"}
    for name in ("fast_decay", "slow_decay", "fast_gate", "slow_gate"):
        inputs[name] = jnp.asarray(rng.uniform(0.1, 0.9, (2, 3, length)))
    for name, width in (("token_mlp", 10), ("chunk_mlp", 11)):
        inputs[name] = tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((2, width), (2,), (1, 2), (1,)))
    inputs |= {"bilinear": jnp.asarray(rng.normal(size=(3, 5, 5))), "temp": jnp.asarray(rng.uniform(1, 2, 3))}
    state = inputs.pop("initial_state")
    return inputs | {"initial_state": (state, 0.5 * state[::-1])}


MASK = np.arange(12) < np.array([[11], [6]])  # of the second row no token is valid in the second chunk of 7


def test_the_chunked_hierarchical_rule_equals_the_recurrent_one() -> None:
    with jax.enable_x64(True):
        chunked, recurrent = (
            functools.partial(hierarchical_delta_rule, mask=jnp.asarray(MASK), chunk_size=7, impl=impl) for impl in ("chunked", "recurrent"))
        # float64 sums in another order: about 1e-14; gradients of what hardly matters, such as temp, are differences of larger ones
        assert_alike(chunked, recurrent, hierarchical_arguments(12), 1e-11)


def test_the_exact_hierarchical_rule_and_a_chunk_without_valid_tokens() -> None:
    with jax.enable_x64(True):
        inputs = hierarchical_arguments(12)
        rule = jax.jit(functools.partial(hierarchical_delta_rule, transform="exact", chunk_size=7), static_argnames="impl", compiler_options=QUICK)
        o, states = rule(**inputs, mask=jnp.asarray(MASK))
        assert (o[1, :, 6:] == 0).all() and (o[1, :, 5] != 0).all()
        cut = {name: inputs[name][1:, :, :7] for name in ("q", "k", "v", "beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate")}
        start = tuple(state[1:] for state in inputs["initial_state"])
        truth, last = rule(**{**inputs, **cut, "initial_state": start}, mask=jnp.asarray(MASK[1:, :7]), impl="recurrent")
        # float64 sums in another order: about 1e-15
        assert relative(o[1:, :, :7], truth) < 1e-13
        assert relative(states[0][1:], last[0]) < 1e-13 and relative(states[1][1:], last[1]) < 1e-13


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_the_exact_rule_in_bfloat16(impl: str) -> None:
    """Against the same numbers in float64: the inverse of a chunk is made of products in bfloat16."""
    inputs = {name: x.astype(jnp.bfloat16) for name, x in arguments(100).items()}
    o, state = jax.jit(functools.partial(delta_rule, chunk_size=32, impl=impl), compiler_options=QUICK)(**inputs)
    truth = reference.delta_rule.forward(**{name: np.asarray(x, np.float64) for name, x in inputs.items()})
    assert o.dtype == state.dtype == jnp.bfloat16
    for found, exact in zip((o, state), truth, strict=True):
        # a rounding is 2**-9, and some tens of them meet
        assert np.linalg.norm(np.asarray(found, np.float64) - exact) <= 30 * 2.0**-9 * np.linalg.norm(exact)


def test_gradients_at_zero_are_zero() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)).at[1].set(0.0)
    states = jnp.zeros((2, 5, 5)).at[0].set(1.0)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x: jax.Array, states: jax.Array) -> jax.Array:
        return (l2norm(x) * jnp.arange(5.0)).sum() + jnp.square(normalised(states)).sum()

    rows, matrices = gradient(x, states)
    assert (rows[1] == 0).all() and (rows[0] != 0).all() and jnp.isfinite(rows).all()
    assert (matrices[1] == 0).all() and jnp.isfinite(matrices[0]).all()


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_the_program_does_not_grow_with_the_length(impl: str) -> None:
    def equations(rule: Any, inputs: Any) -> int:
        return str(jax.make_jaxpr(jax.grad(lambda inputs: weighed(rule(**inputs))))(inputs)).count(" = ")

    # both lengths ragged: a whole number of chunks takes no padding
    assert len({equations(functools.partial(delta_rule, chunk_size=7, impl=impl), arguments(length)) for length in (17, 230)}) == 1
    if impl == "chunked":
        rule = functools.partial(hierarchical_delta_rule, chunk_size=7)
        assert len({equations(rule, hierarchical_arguments(length)) for length in (17, 230)}) == 1


@pytest.mark.parametrize("kernel", [3, 4])
def test_the_convolution_sees_what_it_should(kernel: int) -> None:
    layer, rng = ShortConvolution(6, kernel, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 6)).astype(np.float32)
    weight, bias = np.asarray(layer.kernel[...]), rng.normal(size=6).astype(np.float32)
    layer.bias[...] = jnp.asarray(bias)
    y, past = layer(jnp.asarray(x[:, 5:]), jnp.asarray(x[:, 6 - kernel : 5]))
    windows = {left: np.pad(x, ((0, 0), (left, kernel), (0, 0))) for left in (kernel - 1, kernel // 2)}
    causal, same = (sum(weight[j, 0] * padded[:, j : j + 11] for j in range(kernel)) + bias for padded in windows.values())
    np.testing.assert_allclose(y, causal[:, 5:], atol=1e-6)  # four float32 products of order one
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], same, atol=1e-6)
    assert (past == x[:, 12 - kernel :]).all()


def test_streaming_generation_and_causality() -> None:
    with jax.enable_x64(True):
        model, variables, apply = make(dtype="float64")
        ids, zeros = tokens(2, 15), model.init_states(2)
        whole, last = apply(variables, ids, zeros)
        states, pieces = zeros, []
        for piece in jnp.split(ids, 3, axis=1):
            logits, states = apply(variables, piece, states)
            pieces.append(logits)
        # the same numbers over other chunk boundaries, amplified by the norms of two blocks: about 1e-15
        assert relative(jnp.concatenate(pieces, axis=1), whole) < 1e-12
        assert max(relative(a[kind], b[kind]) for a, b in zip(states, last, strict=True) for kind in a) < 1e-12
        changed, _ = apply(variables, ids.at[0, 8].set((ids[0, 8] + 1) % 29), zeros)
        assert (changed[0, :8] == whole[0, :8]).all() and (changed[1] == whole[1]).all() and (changed[0, 8] != whole[0, 8]).any()
        greedy = generate(lambda ids, states: apply(variables, ids, zeros if states is None else states), ids[:, :5], 6, temperature=0.0)
        again, _ = apply(variables, jnp.pad(greedy, ((0, 0), (0, 4))), zeros)
        assert greedy.shape == (2, 11) and (again[:, 4:10].argmax(-1) == greedy[:, 5:]).all()


def test_gradients_stop_at_a_state_passed_in() -> None:
    model, variables, _ = make(dataclasses.replace(SMALL, depth=1))
    states = jax.tree.map(lambda x: x + 0.5, model.init_states(2))
    gradient = jax.jit(jax.grad(lambda states: weighed(model.apply(variables, tokens(2, 5), states))))(states)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_remat_recomputes_every_block() -> None:
    def saved(remat: bool) -> int:
        model, variables, _ = make(remat=remat)
        text = str(jax.make_jaxpr(jax.grad(lambda params: weighed(model.apply({**variables, "params": params}, tokens(2, 5)))))(variables["params"]))
        return text.count("checkpoint") + text.count("remat")

    assert saved(True) >= SMALL.depth and saved(False) == 0


def test_arrays_and_variables_are_inverse_and_strict() -> None:
    model, variables, _ = make()
    arrays = model.arrays(variables)
    assert (arrays["lm_head.weight"] == arrays["embedding.weight"]).all()
    shapes = {
        "delta.q_conv1d.weight": (15, 1, 4), "delta.q_conv1d.bias": (15,), "delta.b_proj.weight": (3, 15), "delta.o_norm.weight": (5,),
        "delta.o_norm.gate": (5,), "norm_ffn.weight": (15,), "w1.weight": (22, 15), "w2.weight": (15, 22)}
    assert {name: arrays[f"blocks.1.{name}"].shape for name in shapes} == shapes
    kernel = variables["params"]["blocks"][1]["delta"]["q_conv1d"]["kernel"]
    assert kernel.shape == (4, 1, 15) and arrays["blocks.1.delta.q_conv1d.weight"][7, 0, 2] == kernel[2, 0, 7]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, variables, model.variables(arrays)))
    wrong = {**arrays, "extra": arrays["norm.weight"], "lm_head.weight": arrays["lm_head.weight"] + 1}
    wrong["blocks.0.delta.k_conv1d.weight"] = wrong["blocks.0.delta.k_conv1d.weight"].T
    with pytest.raises(ValueError) as error:
        model.variables(wrong)
    for part in ("extra is not used", "k_conv1d.weight must have shape (15, 1, 4), found (4, 1, 15)", "lm_head.weight differs"):
        assert part in str(error.value)


def test_the_learned_gate_is_trained_only_without_an_output_gate() -> None:
    gated, bare = (nnx.eval_shape(lambda gate=gate: DeltaNetLayer(15, 3, output_gate=gate, rngs=nnx.Rngs(0))) for gate in (True, False))
    trained = [{path[-2:] for path in flatten(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))} for layer in (gated, bare)]
    assert ("o_norm", "gate") not in trained[0] and ("g_proj", "kernel") in trained[0]
    assert ("o_norm", "gate") in trained[1] and ("g_proj", "kernel") not in trained[1]
    norm, o = GatedRMSNorm(5, 1e-6, False), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3, 5)).astype(np.float32))
    norm.gate[...] = jnp.linspace(-1.0, 2.0, 5)
    assert (norm(o, None) == norm(o, jnp.broadcast_to(norm.gate[...], o.shape))).all() and (norm(o, None) != norm(o, 0 * o)).any()


@pytest.mark.parametrize(("options", "message"), [
    ({"rule": "linear"}, "rule must be one of 'hierarchical', 'plain', found 'linear'"),
    ({"conv": "valid"}, "conv must be one of 'same', 'causal', found 'valid'"),
    ({"impl": "fused"}, "impl must be one of 'recurrent', 'chunked', 'compiled', found 'fused'"),
    ({"heads": 4}, "dim must be divisible by heads, found dim=15 and heads=4"),
    ({"conv": "causal"}, "conv must be 'same' with rule='hierarchical', found 'causal'"),
])
def test_layers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaNetLayer(15, **{"heads": 3, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("options", "message"), [
    ({"transform": "neumann"}, "transform must be 'lam' or 'exact', found 'neumann'"),
    ({"impl": "scan"}, "impl of the delta rule must be 'recurrent' or 'chunked', found 'scan'"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, found 0"),
    ({"impl": "recurrent", "transform": "lam"}, "the recurrent form has transform 'exact', found 'lam'"),
])
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments(3), **options)


def test_bad_calls_are_named() -> None:
    model, variables, _ = make()
    with pytest.raises(ValueError, match=r"must lie in \[0, 29\), found 29"):
        model.apply(variables, jnp.full((2, 3), 29))
    states = model.init_states(2)
    states[1]["conv_k"] = jnp.zeros((2, 4, 15))
    with pytest.raises(ValueError, match=r"states\[1\]\['conv_k'\] must have shape \(2, 3, 15\), found \(2, 4, 15\)"):
        model.apply(variables, tokens(2, 3), states)
    layer = nnx.eval_shape(lambda: DeltaNetLayer(15, 3, rule="plain", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="mask must be None for a layer on the plain rule"):
        layer(jnp.ones((2, 3, 15)), jnp.ones((2, 3), bool))
