"""The delta rules in torch and JAX against twins written independently in NumPy: values, and gradients along random directions.

The derivative of the twins comes from a complex step, exact to rounding; that of torch and JAX from one backward pass through
<o, g> + <S, G>. Letters: B batch, H heads, L length, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parity_tests import twins_delta

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from jax_impl.ops import delta_rule as jax_ops  # noqa: E402
from parity_tests.harness.adapters.nnx_trace import quick_options  # noqa: E402
from torch_impl.ops import delta_rule as torch_ops  # noqa: E402

B, H, D = 2, 3, 5
BOUND = 1e-11  # 257 steps of sums of five products, each rounded at 1e-16, and a way back of the same length
STEP = 1e-30


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float64
    assert np.linalg.norm(found - expected) <= BOUND * np.linalg.norm(expected)


def run_torch(call: Callable[..., Any], arrays: dict[str, np.ndarray], weights: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in arrays.items()}
    outputs = call(leaves)
    sum((out * torch.from_numpy(weight)).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    return [out.detach().numpy() for out in outputs], {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def run_jax(call: Callable[..., Any], arrays: dict[str, np.ndarray], weights: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    def loss(leaves: Any) -> Any:
        outputs = call(leaves)
        return sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)), outputs

    with jax.enable_x64(True):
        leaves = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(leaves).compile(compiler_options=quick_options())
        gradients, outputs = program(leaves)
        return [np.asarray(out) for out in outputs], {name: np.asarray(value) for name, value in gradients.items()}


RUN = {"torch": (run_torch, torch_ops), "jax": (run_jax, jax_ops)}


class Truth:
    """A twin's outputs, and for every array a random direction and the derivative of <outputs, weights> along it."""

    def __init__(self, twin: Callable[..., Any], arrays: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(11)
        self.arrays, self.outputs = arrays, twin(arrays)
        self.weights = [rng.normal(size=out.shape) for out in self.outputs]
        self.directions = {name: rng.normal(size=value.shape) for name, value in arrays.items()}
        self.derivatives = {}
        for name, direction in self.directions.items():
            moved = twin({**arrays, name: arrays[name] + 1j * STEP * direction})
            self.derivatives[name] = sum((out * weight).sum() for out, weight in zip(moved, self.weights, strict=True)).imag / STEP


def check(framework: str, call: Callable[..., Any], truth: Truth) -> None:
    """Values, and of every array the gradient along its direction."""
    run, ops = RUN[framework]
    outputs, gradients = run(lambda leaves: call(ops, leaves), truth.arrays, truth.weights)
    for found, value in zip(outputs, truth.outputs, strict=True):
        close(found, value)
    for name, derivative in truth.derivatives.items():
        assert derivative != 0, name
        direction = truth.directions[name]
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)  # the product may cancel, its terms do not
        assert abs((gradients[name] * direction).sum() - derivative) <= BOUND * scale, name


def plain_arrays(length: int, state: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    keys = rng.normal(size=(B, H, length, D))
    arrays = {
        "q": rng.normal(size=(B, H, length, D)), "k": keys / np.linalg.norm(keys, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, H, length, D)), "beta": rng.uniform(0.1, 0.95, size=(B, H, length)),
    }
    return arrays | ({"s": rng.normal(size=(B, H, D, D))} if state else {})


@functools.cache
def plain_truth(length: int, state: bool) -> Truth:
    def twin(a: Any) -> Any:
        return twins_delta.plain(a["q"], a["k"], a["v"], a["beta"], a.get("s", np.zeros((B, H, D, D))))

    return Truth(twin, plain_arrays(length, state))


@pytest.mark.parametrize("state", [False, True], ids=["from_zero", "from_a_state"])
@pytest.mark.parametrize("length", [1, 63, 100, 257])
@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_exact_chunks_are_the_recurrence(framework: str, chunk: int, length: int, state: bool) -> None:
    def call(ops: Any, a: Any) -> Any:
        return ops.delta_rule(a["q"], a["k"], a["v"], a["beta"], a.get("s"), chunk_size=chunk)

    check(framework, call, plain_truth(length, state))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_recurrence_is_its_twin(framework: str) -> None:
    check(framework, lambda ops, a: ops.delta_rule(a["q"], a["k"], a["v"], a["beta"], a["s"], impl="recurrent"), plain_truth(63, True))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_lams_transform_is_another_function(framework: str) -> None:
    """Equal to the inverse up to two tokens, and not beyond: its chunk size belongs to the weights."""
    for length, same in ((2, True), (7, False)):
        arrays = plain_arrays(length, True)
        run, ops = RUN[framework]
        weights = [np.ones((B, H, length, D)), np.ones((B, H, D, D))]
        (o, _), _ = run(
            lambda a, ops=ops: ops.delta_rule(a["q"], a["k"], a["v"], a["beta"], a["s"], chunk_size=7, transform="lam"), arrays, weights)
        exact, _ = twins_delta.plain(*(arrays[name] for name in ("q", "k", "v", "beta", "s")))
        distance = np.linalg.norm(o - exact) / np.linalg.norm(exact)
        assert distance <= BOUND if same else distance > 1e-3


def hierarchical_arrays(length: int) -> dict[str, np.ndarray]:
    """Fluxes and decays well inside their ranges, so that each is visible in a gradient; the keys lean one way as real ones do."""
    rng, m = np.random.default_rng(length), D // 2
    gates = ("beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate")
    arrays = {name: rng.normal(size=(B, H, length, D)) + 0.3 for name in ("q", "k", "v")}
    arrays |= {name: rng.uniform(0.2, 0.9, size=(B, H, length)) for name in gates}
    for kind, inputs in (("token", 2 * D), ("chunk", 2 * D + 1)):
        arrays |= {f"{kind}0": rng.normal(size=(m, inputs)), f"{kind}1": rng.normal(size=m)}
        arrays |= {f"{kind}2": rng.normal(size=(1, m)), f"{kind}3": rng.normal(size=1)}
    arrays |= {"bilinear": rng.normal(size=(H, D, D)), "temp": rng.uniform(1.0, 3.0, size=H)}
    return arrays | {"fast": rng.normal(size=(B, H, D, D)), "slow": rng.normal(size=(B, H, D, D))}


GATES = ("q", "k", "v", "beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate")


def flat(result: Any) -> list[Any]:
    return [result[0], *result[1]]


def ordered(a: Any, last: Any, states: Any) -> list[Any]:
    mlps = [tuple(a[f"{kind}{i}"] for i in range(4)) for kind in ("token", "chunk")]
    return [*(a[name] for name in GATES), *mlps, a["bilinear"], a["temp"], last, states]


LENGTH, LENGTHS = 200, (200, 111)
MASK = np.arange(LENGTH) < np.array(LENGTHS)[:, None]


@functools.cache
def hierarchical_truth(kind: str, states: bool) -> Truth:
    def twin(a: Any) -> Any:
        zeros = np.zeros((B, H, D, D))
        start, lengths = ((a["fast"], a["slow"]), LENGTHS) if states else ((zeros, zeros), (LENGTH,) * B)
        return flat(twins_delta.hierarchical(*ordered(a, lengths, start), 64, kind))

    return Truth(twin, {name: value for name, value in hierarchical_arrays(LENGTH).items() if states or name not in ("fast", "slow")})


@pytest.mark.parametrize("kind", ["lam", "exact"])
@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_hierarchical_rule_is_its_twin(framework: str, impl: str, kind: str) -> None:
    """200 tokens in chunks of 64: from the third chunk on the decays and the chunk flux reach the outputs. The second sample is shorter
    and its last chunks empty."""
    def call(ops: Any, a: Any) -> Any:
        valid = torch.from_numpy(MASK) if ops is torch_ops else MASK
        return flat(ops.hierarchical_delta_rule(*ordered(a, valid, (a["fast"], a["slow"])), chunk_size=64, transform=kind, impl=impl))

    check(framework, call, hierarchical_truth(kind, True))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_decays_and_chunk_flux_from_zero_states(framework: str) -> None:
    """Where an encoder starts: the gradients of decays and chunk flux are small at four chunks, but there, and right."""
    check(framework, lambda ops, a: flat(ops.hierarchical_delta_rule(*ordered(a, None, None), chunk_size=64)), hierarchical_truth("lam", False))
