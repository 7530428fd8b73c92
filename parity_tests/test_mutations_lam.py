"""Porting bugs put into the healthy port of LAM, one at a time: each is noticed, and located at the module where it was put.

Bugs inside the rule come from `mutant`, the rule again in JAX, one chunk after another, with every bug as a branch; without a bug it is
the rule itself, which a test asserts, so that what the harness notices is the bug. Twelve bugs run with the tests, the others with
`--all-mutations` (`make mutations`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.ops import delta_rule as ops
from parity_tests import families
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.mutate import Injector, Mutation
from parity_tests.harness.plugin import mutation_tests
from parity_tests.specs import LAM, encoder

CASE = encoder("lam", regimes=("as is",))


def mutant(bug: str | None, q, k, v, beta, decays, gates, token_mlp, chunk_mlp, bilinear, temp, mask, size: int):
    """The hierarchical rule from zero states, with `bug` or without; arguments as `HierarchicalRule.__call__`, transform "lam"."""
    valid = mask[:, None].astype(q.dtype)  # (B, 1, L)
    q, k, v = (x * valid[..., None] for x in (q, k, v))
    q, k = ops.l2norm(q), ops.l2norm(k)
    scaled, k_b = beta[..., None] * v, beta[..., None] * k
    phi = ops.flux(jnp.concatenate([k_b, scaled], -1), token_mlp)
    fast = slow = jnp.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype)
    outputs = []
    for start in range(0, q.shape[2], size):
        cut = slice(start, start + size)
        count = valid[:, :, cut].sum(-1)
        some = jnp.maximum(count, 1)
        n = -jnp.tril(k_b[:, :, cut] @ k[:, :, cut].mT, -1)
        t = jnp.eye(n.shape[-1]) + n + jnp.tril(n @ n.mT, -1)
        u, w = t @ scaled[:, :, cut], t @ k_b[:, :, cut]
        if bug == "beta after chunking":
            u = beta[:, :, cut, None] * (t @ v[:, :, cut])
        s = ((k[:, :, cut] @ bilinear) * u).sum((-1, -2)) / temp / some
        means = [k[:, :, cut].sum(2) / some[..., None], u.sum(2) / some[..., None], s[..., None]]
        psi = ops.flux(jnp.concatenate(means, -1), chunk_mlp)[..., None]  # (B, H, 1, 1)
        if bug == "psi averaged over the batch":
            psi = jnp.broadcast_to(psi.mean(0, keepdims=True), psi.shape)
        alpha = 0.5 + 0.3 * (ops.flux(jnp.concatenate([w, u], -1), token_mlp) if bug == "flux after chunking" else phi[:, :, cut])
        new = []
        answer = 0.0
        for state, decay, gate, share, part in ((fast, decays[0], gates[0], 0.10, alpha), (slow, decays[1], gates[1], 0.05, 1 - alpha)):
            kept = ((decay[:, :, cut] * valid[:, :, cut]).sum(-1) / some)[..., None, None] * (1 - share * psi) * state
            read = ops.normalised(kept)
            corrected = u - w @ read
            o = gate[:, :, cut, None] * (q[:, :, cut] @ read + jnp.tril(q[:, :, cut] @ k[:, :, cut].mT) @ corrected)
            answer = answer + part * o
            written = gate[:, :, cut, None] * corrected if bug == "gates on the state update" else corrected
            new.append(kept + k[:, :, cut].mT @ written)
        outputs.append(answer)
        c = 0.05 + 0.1 * psi.mean(1, keepdims=True)
        mixed = new if bug == "missing cross update" else (new[0] + c * psi * new[1], new[1] + c * (1 - psi) * new[0])
        mixed = mixed if bug == "missing normalisation" else tuple(map(ops.normalised, mixed))
        alive = count[..., None, None] > 0
        fast, slow = jnp.where(alive, mixed[0], fast), jnp.where(alive, mixed[1], slow)
    return jnp.concatenate(outputs, 2), (fast, slow)


def mutated(bug: str | None) -> Callable:
    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        q, k, v, beta, decays, gates, mask, states = args
        assert states is None, "the encoder starts from zero"
        return mutant(
            bug, q, k, v, beta, decays, gates, module.token_flux.mlp(), module.chunk_flux.mlp(), module.W_bilinear[...], module.temp[...], mask,
            module.chunk_size)

    return around


def inside(bug: str, block: int) -> Injector:
    path = f"blocks.{block}.delta.rule"
    return Injector(bug, path, patches=(Patch(path, mutated(bug)),))


def field(name: str, path: str, leaf: str, value: Any) -> Injector:
    """A module that was ported with another value of one attribute."""
    return Injector(name, path, patches=(Patch(path, prepare=lambda module: setattr(module, leaf, value)),))


def other_side(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
    """Output t sees t - 1 .. t + 2 instead of t - 2 .. t + 1."""
    x = args[0]
    taps = module.kernel[...][:, 0]  # (K, D)
    padded = jnp.pad(x, ((0, 0), (1, 2), (0, 0)))
    return module.bias[...] + sum(padded[:, j : j + x.shape[1]] * taps[j] for j in range(len(taps))), None


INJECTORS = (
    inside("beta after chunking", 0),
    inside("gates on the state update", 1),
    inside("missing cross update", 1),
    inside("psi averaged over the batch", 1),
    field("single gelu", "blocks.1", "repeats", 1),
    bugs.tanh_gelu("blocks.0"),
    Injector("conv padded on the other side", "blocks.0.delta.k_conv1d", patches=(Patch("blocks.0.delta.k_conv1d", other_side),)),
    bugs.transposed("blocks.1.delta.q_proj"),
    bugs.epsilon("blocks.0.norm_delta", value=1e-6),
    bugs.left_at_initialisation("blocks.1.delta.slow_decay_bias", where="blocks.1.delta"),
    bugs.swapped_heads("blocks.0.delta.rule.W_bilinear", heads=LAM.heads),
    bugs.averaged_over_batch("blocks.1.delta.o_norm"),
)
MORE = (
    inside("flux after chunking", 0),
    inside("missing normalisation", 0),
    field("the inverse for N N^T", "blocks.0.delta.rule", "transform", "exact"),
)

found, test_detected_and_located = mutation_tests((CASE, INJECTORS), more=((CASE, MORE),))


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_cosine_alone_misses_most_of_what_the_rule_hides(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {"missing cross update", "psi averaged over the batch"} <= missed


def test_the_mutant_without_a_bug_is_the_rule() -> None:
    rng, shape = np.random.default_rng(4), (2, 3, 19, 5)
    mlps = [tuple(rng.normal(size=size) for size in ((2, inputs), (2,), (1, 2), (1,))) for inputs in (10, 11)]
    q, k, v = (rng.normal(size=shape) for _ in range(3))
    beta, *rest = (rng.uniform(0.1, 0.9, size=shape[:3]) for _ in range(5))
    bilinear, temp = rng.normal(size=(3, 5, 5)), rng.uniform(1.0, 2.0, size=3)
    mask = np.arange(19) < np.array([[19], [8]])
    with jax.enable_x64(True):
        q, k, v, beta, *rest = map(jnp.asarray, (q, k, v, beta, *rest))
        after = *mlps, bilinear, temp, jnp.asarray(mask)
        found = jax.jit(mutant, static_argnums=(0, 12))(None, q, k, v, beta, rest[:2], rest[2:], *after, 6)
        expected = jax.jit(functools.partial(ops.hierarchical_delta_rule, chunk_size=6))(q, k, v, beta, *rest, *after)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)  # four chunks of sums of at most 19 products of order 1
