"""The rules, layers and blocks of LAM and DeltaNet again in JAX, with porting bugs as branches.

A mutant without a bug is the port itself, which a test asserts, so that what the harness notices is the bug. Most replace one function of
`jax_impl.ops.delta_rule` while a module is traced; what no single function holds is in `mutant`, the hierarchical rule as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_impl import deltanet, lam
from jax_impl.ops import delta_rule as ops
from parity_tests.harness.adapters.nnx_injectors_more import within


def mutant(bug: str | None, q, k, v, beta, decays, gates, token_mlp, chunk_mlp, bilinear, temp, mask, size: int):
    """The hierarchical rule from zero states; arguments as `HierarchicalRule.__call__`, transform "lam"."""
    valid = mask[:, None].astype(q.dtype)  # (B, 1, L)
    q, k, v = (x * valid[..., None] for x in (q, k, v))
    q, k = q if bug == "queries not normalised" else ops.l2norm(q), ops.l2norm(k)
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
        alpha = 0.5 + 0.3 * (ops.flux(jnp.concatenate([w, u], -1), token_mlp) if bug == "flux after chunking" else phi[:, :, cut])
        slowly = 0.10 if bug == "share 0.10 for 0.05 in the slow decay" else 0.05
        new, answer = [], 0.0
        for state, decay, gate, share, part in ((fast, decays[0], gates[0], 0.10, alpha), (slow, decays[1], gates[1], slowly, 1 - alpha)):
            keep = ((decay[:, :, cut] * valid[:, :, cut]).sum(-1) / some)[..., None, None] * (1 - share * psi)
            kept = state if bug == "decay after the write, in a chunk" else keep * state
            read = ops.normalised(kept)
            corrected = u - w @ read
            o = gate[:, :, cut, None] * (q[:, :, cut] @ read + jnp.tril(q[:, :, cut] @ k[:, :, cut].mT) @ corrected)
            answer = answer + part * o
            written = gate[:, :, cut, None] * corrected if bug == "gates on the state update" else corrected
            after = kept + k[:, :, cut].mT @ written
            new.append(keep * after if bug == "decay after the write, in a chunk" else after)
        outputs.append(answer)
        mixed = ops._mixed(*new, psi)
        alive = count[..., None, None] > 0
        if bug == "last ragged chunk writes nothing":
            alive = alive & (min(start + size, q.shape[2]) - start == size)
        fast, slow = jnp.where(alive, mixed[0], fast), jnp.where(alive, mixed[1], slow)
    return jnp.concatenate(outputs, 2), (fast, slow)


def whole(bug: str | None) -> Callable:
    """`HierarchicalRule.__call__` as `mutant`."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        q, k, v, beta, decays, gates, mask, states = args
        assert states is None, "the encoder starts from zero"
        return mutant(
            bug, q, k, v, beta, decays, gates, module.token_flux.mlp(), module.chunk_flux.mlp(), module.W_bilinear[...], module.temp[...], mask,
            module.chunk_size)

    return around


def parts(bug: str | None) -> Callable:
    """`HierarchicalRule.__call__` with the functions that it is made of."""

    def mixed(fast: Any, slow: Any, psi: Any) -> tuple:
        c = 0.05 + 0.1 * psi.mean((0, 1) if bug == "cross share averaged over the batch" else 1, keepdims=True)
        if bug == "missing cross update":
            c = 0.0
        one, other = (1 - psi, psi) if bug == "psi and 1 - psi exchanged" else (psi, 1 - psi)
        new = fast + c * one * slow
        states = new, slow + c * other * (new if bug == "slow learns from the new fast state" else fast)
        return states if bug == "missing normalisation" else tuple(map(square_normalised, states))

    def square_normalised(state: Any) -> Any:
        """`ops.normalised`."""
        axes = {"norm of the state over its rows": -1, "norm of the state over all heads": (-3, -2, -1)}.get(str(bug), (-2, -1))
        return state / (ops._root((state * state).sum(axes, keepdims=True)) + ops.EPS)

    def chunk_flux(k: Any, u: Any, count: Any, mlp: Any, bilinear: Any, temp: Any) -> Any:
        s = ((k @ bilinear) * u).sum(-1).sum(-1)
        s = s * temp if bug == "scores times temp" else s / temp
        s = s if bug == "scores summed over the chunk" else s / jnp.maximum(count, 1)
        means = [ops._mean(k.mT, count[..., None]), ops._mean(u.mT, count[..., None]), s[..., None]]
        if bug == "means of u before those of k":
            means[:2] = means[1::-1]
        psi = flux(jnp.concatenate(means, -1), mlp)[..., 0]
        return jnp.broadcast_to(psi.mean(0, keepdims=True), psi.shape) if bug == "psi averaged over the batch" else psi

    def mean(x: Any, count: Any) -> Any:
        return x.mean(-1) if bug == "padding counted in the means" else x.sum(-1) / jnp.maximum(count, 1)

    def transformed(q: Any, k: Any, k_b: Any, v: Any, transform: str) -> tuple:
        n = (1 if bug == "N with the other sign" else -1) * jnp.tril(k_b @ k.mT, 0 if bug == "N with its diagonal" else -1)
        square = n @ (n if bug == "N N for N N^T" else n.mT)
        square = square if bug == "N N^T not masked" else jnp.tril(square, -1)
        both = jnp.concatenate([v, k_b], -1)
        both = both + (n if bug == "missing second order" else n + square) @ both
        u, w = jnp.split(both, 2, axis=-1)
        scores = q @ k.mT
        return u, w, scores if bug == "scores not causal" else jnp.tril(scores, -1 if bug == "scores without their own token" else 0)

    def flux(x: Any, mlp: Any) -> Any:
        w0, b0, w2, b2 = mlp
        hidden = x @ w0.T + b0
        hidden = jax.nn.gelu(hidden, approximate=False) if bug == "gelu for silu in the flux" else jax.nn.silu(hidden)
        y = jax.nn.sigmoid(hidden @ w2.T + b2)
        y = y if bug == "flux not clamped" else jnp.clip(y, 0.01, 0.99)
        return y * 2 / 3 if bug == "0.2 for 0.3 in alpha" and x.shape[-1] % 2 == 0 else y

    def l2norm(x: Any) -> Any:
        if bug == "l2norm eps 1e-6 in the root":
            return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)
        return jnp.where((x != 0).any(-1, keepdims=True), x / jnp.maximum(ops._root((x * x).sum(-1, keepdims=True)), 1e-12), 0.0)

    def chunks(x: Any, size: int) -> Any:
        missing = -x.shape[2] % min(size, x.shape[2])
        sides = (missing, 0) if bug == "chunks counted from the end" else (0, missing)
        padded = jnp.pad(x, [sides if axis == 2 else (0, 0) for axis in range(x.ndim)])
        return padded.reshape(*x.shape[:2], -1, min(size, x.shape[2]), *x.shape[3:])

    def joined(x: Any, length: int) -> Any:
        flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
        return flat[:, :, -length:] if bug == "chunks counted from the end" else flat[:, :, :length]

    read = (lambda state: state) if bug == "states read as they are" else square_normalised
    return within(ops, _mixed=mixed, _chunk_flux=chunk_flux, _mean=mean, _transformed=transformed, flux=flux, l2norm=l2norm, _chunks=chunks,
                  _joined=joined, normalised=read)


def given(bug: str | None) -> Callable:
    """`HierarchicalRule.__call__` with its arguments."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        q, k, v, beta, decays, gates, mask, states = args
        decays = decays[::-1] if bug == "fast and slow decays exchanged" else decays
        gates = gates[::-1] if bug == "fast and slow gates exchanged" else gates
        states = states[::-1] if bug == "fast and slow states exchanged" else states
        mask = None if bug == "mask ignored by the rule" else mask
        beta = 2 * beta if bug == "beta doubled" else beta
        return call(q, k, v, beta, decays, gates, mask, states)

    return around


def plain(bug: str | None) -> Callable:
    """`PlainRule.__call__`: one token after another."""

    def rule(q: Any, k: Any, v: Any, beta: Any, state: Any, **_: Any) -> tuple:
        state = jnp.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype) if state is None else state
        q = q * q.shape[-1] ** -0.5 if bug == "queries scaled by 1 / sqrt(d)" else q

        def step(state: Any, token: tuple) -> tuple:
            q_t, k_t, v_t, beta_t = (x[..., None] for x in token)  # (B, H, d, 1), beta (B, H, 1)
            read = (state if bug == "error along the wrong axis" else state.mT) @ k_t
            beta_t = beta_t[..., None]
            change = k_t * (beta_t * v_t - (1 if bug == "beta on the write only" else beta_t) * read).mT
            new = state + (change.mT if bug == "outer product the other way round" else change)
            return new, ((state if bug == "read before the write" else new).mT @ q_t)[..., 0]

        state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v, beta)))
        return jnp.moveaxis(o, 0, 2), state

    return within(deltanet, delta_rule=rule)


def output_norm(bug: str | None) -> Callable:
    """`GatedRMSNorm.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        o, gate = args
        sigmoid = jax.nn.sigmoid(m.gate[...] if gate is None else gate)
        if bug == "gate before the norm":
            o = o * sigmoid
        y = o * jax.lax.rsqrt(jnp.square(o).mean((-2, -1) if bug == "norm over all heads" else -1, keepdims=True) + m.eps) * m.weight[...]
        if bug == "silu gate for sigmoid":
            return y * jax.nn.silu(gate)
        return y if bug == "gate before the norm" else y * (1 - sigmoid if bug == "output gate inverted" else sigmoid)

    return around


def block(bug: str | None) -> Callable:
    """`LamBlock.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        x, mask = args
        mixed = m.delta(x, mask)[0]
        x = x + m.norm_delta(mixed) if bug == "norm before the residual" else m.norm_delta(x + mixed)
        h = m.ffn_in(x)
        for _ in range(m.repeats):
            h = jax.nn.gelu(h, approximate=False)
        h = m.ffn_out(h)
        x = m.norm_ffn(h if bug == "residual of the feed-forward missing" else x + h)
        return x if mask is None or bug == "padding not zeroed after the block" else x * mask[..., None]

    return around


def positions(bug: str | None) -> Callable:
    """`LAM.positions`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        length, mask = args
        table = m.position_embeddings.embedding[...]
        last = len(table) - 1
        i = jnp.arange(length)
        if bug == "positions from one":
            return table[jnp.minimum(i + 1, last)][None]
        if bug == "positions clamped at the end of the table":
            return table[jnp.minimum(i, last)][None]
        if length <= last + 1:
            return table[None, :length]
        n = jnp.full((1, 1), length) if mask is None or bug == "stretched over the padded length" else mask.sum(1, keepdims=True)
        stretched, spans = n > last + 1, n if bug == "stretched with n for n - 1" else jnp.maximum(n - 1, 1)
        low = jnp.minimum(jnp.where(stretched, i * last // spans, i), last)
        share = jnp.where(stretched, i * last % spans, 0).astype(table.dtype) / spans
        below, above = table[low], table[jnp.minimum(low + 1, last)]
        return below if bug == "position rounded down" else below + share[..., None] * (above - below)

    return around


def pooled(bug: str | None) -> Callable:
    """`LAM.__call__`, its last step."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        output, mask = call(*args, **kwargs), args[1] != 0
        x = output.last_hidden_state
        mean = x.sum(1) / mask.sum(1, keepdims=True)
        if bug == "first token for the mean":
            mean = x[:, 0]
        if bug == "largest value for the mean":
            mean = x.max(1)
        if bug == "last valid token left out of the mean":
            mean = mean - x[jnp.arange(len(x)), mask.sum(1) - 1] / mask.sum(1, keepdims=True)
        return output._replace(embedding=mean if bug == "embedding not normalised" else lam.l2norm(mean))

    return around


def heads(bug: str | None) -> Callable:
    """`DeltaNetLayer._heads`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        z = args[0]
        if bug == "heads split in the other order":
            return z.reshape(*z.shape[:2], -1, m.heads).mT
        return z.reshape(*z.shape[:2], m.heads, -1)

    return around


def layer(bug: str | None) -> Callable:
    """`DeltaNetLayer.__call__`, the function behind its convolutions, which alone is on (B, L, D)."""
    silu = jax.nn.silu
    other = {"silu missing behind the convolutions": lambda x: x, "relu for silu behind the convolutions": jax.nn.relu}.get(str(bug), silu)
    return within(jax.nn, silu=lambda x: other(x) if x.ndim == 3 else silu(x))


def same_other_side(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
    """A centred convolution in which output t sees t - 1 .. t + 2 instead of t - 2 .. t + 1."""
    x = args[0]
    taps = module.kernel[...][:, 0]  # (K, D)
    padded = jnp.pad(x, ((0, 0), (1, 2), (0, 0)))
    return module.bias[...] + sum(padded[:, j : j + x.shape[1]] * taps[j] for j in range(len(taps))), None
