"""Parts of the port of GroundedMamba again in JAX, with porting bugs as branches; without a bug each of them is the port itself.

Letters: B batch, L length, D width, N state, H heads, P head width, M slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl import layers
from jax_impl.ops import memory_bank
from jax_impl.ops.normalise import layer_norm
from parity_tests.harness.adapters.nnx_injectors_more import within

CHUNK = 6  # of the port in the case


def scan(bug: str | None) -> Callable:
    """The call of a StableStateSSM with `selective_scan` replaced."""

    def scanned(
        update: Array, dt_a: Array, dt_b: Array | None, transition: Array, weight: Array, bias: Array, initial_state: Array | None = None, *,
        eps: float, impl: str,
    ) -> tuple[Array, Array]:
        start = jnp.zeros_like(update[:, 0]) if initial_state is None else initial_state
        driven = update if dt_b is None or bug == "input of the state without its step size" else dt_b[..., None] * update  # (B, L, N)

        def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
            dt, drive = token
            old = layer_norm(state, weight, bias, eps) if bug == "norm on the old state" else state
            moved = old + drive if bug == "transition after the write" else old
            pre = moved + dt[:, None] * (moved @ transition.mT)
            pre = pre if bug == "transition after the write" else pre + drive
            if bug == "identity missing from the transition":
                pre = pre - old
            if bug == "state norm with ddof 1":
                n = pre.shape[-1]
                centred = pre - pre.mean(-1, keepdims=True)
                new = centred / jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / (n - 1) + eps) * weight + bias
            elif bug == "norm on the old state":
                new = pre
            else:
                new = layer_norm(pre, weight, bias, eps)
            if bug == "last state returned before its norm":
                return new, (new, pre)
            return new, (old if bug == "output of the state before its update" else new, new)

        _, (states, last) = jax.lax.scan(step, start, (dt_a.swapaxes(0, 1), driven.swapaxes(0, 1)))
        if bug == "last state returned before its norm":
            states = states.at[-1].set(last[-1])
        return states.swapaxes(0, 1), last[-1]

    return within(layers, selective_scan=scanned)


def memory(bug: str | None) -> Callable:
    """The call of an RWKVGroundedMemory with `wkv` replaced, for the "bonus" form."""

    def recurrent(r: Array, k: Array, v: Array, w: Array, u: Array, state: Array) -> tuple[Array, Array]:
        def step(state: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            r_t, k_t, v_t = token  # (B, H, P)
            if bug == "gate on the state instead of on the output":
                k_t, r_t = r_t * k_t, jnp.ones_like(r_t)
            write = k_t[..., None] * v_t[..., None, :]  # (B, H, P, P)
            if bug == "key and value exchanged in the write":
                write = write.mT
            read = state if bug == "bonus missing" else state + u[..., None] * write
            new = w[..., None] * state + write
            if bug == "decay after the write":
                new = w[..., None] * (state + write)
            if bug == "state read after its update":
                read = new + u[..., None] * write
            if bug == "decay before the read":
                read = w[..., None] * state + u[..., None] * write
            return new, ((read if bug == "state read along the wrong axis" else read.mT) @ r_t[..., None])[..., 0]

        last, outputs = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (r, k, v)))
        return outputs.swapaxes(0, 1), last

    def remembered(
        r: Array, k: Array, v: Array, w: Array, u: Array, initial_state: Array | None = None, *, time_first: str, impl: str, chunk_size: int,
    ) -> tuple[Array, Array]:
        start = jnp.zeros((r.shape[0], *r.shape[2:], r.shape[3]), r.dtype) if initial_state is None else initial_state
        rest = r.shape[1] % CHUNK
        whole = r.shape[1] - rest
        if not rest or not whole or bug not in ("ragged chunk decays as a whole one", "ragged chunk starts from zero"):
            return recurrent(r, k, v, w, u, start)
        first, middle = recurrent(*(x[:, :whole] for x in (r, k, v)), w, u, start)
        second, last = recurrent(*(x[:, whole:] for x in (r, k, v)), w, u, middle if bug == "ragged chunk decays as a whole one" else 0 * middle)
        if bug == "ragged chunk decays as a whole one":
            last = last + (w**CHUNK - w**rest)[..., None] * middle
        return jnp.concatenate([first, second], axis=1), last

    return within(layers, wkv=remembered)


def bank(bug: str | None) -> Callable:
    """The call of an RWKVGroundedMemory with `memory_bank.read` replaced."""

    def read(query: Array, keys: Array, values: Array, count: Array, *, alpha: float, heads: int) -> Array:
        query = query.reshape(*query.shape[:-1], heads, -1)  # (B, L, heads, D / heads)
        if bug != "bank read without its de-biasing":
            keys, values = (memory_bank.debias(x, count, alpha) for x in (keys, values))
        keys, values = (x.reshape(x.shape[0], heads, -1) for x in (keys, values))
        scores = jnp.einsum("blhd,mhd->bhlm", query, keys)
        scores = scores if bug == "scores not divided by sqrt(d)" else scores / math.sqrt(query.shape[-1])
        scores = scores if bug == "empty slots attended" else jnp.where(count == 0, -jnp.inf, scores)
        if bug == "attention of the bank over the wrong axis":
            weights = jnp.where(count == 0, 0.0, jax.nn.softmax(jnp.where(count == 0, 0.0, scores), axis=1))
        else:
            weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bhlm,mhd->blhd", weights, values).reshape(*query.shape[:2], -1)

    return within(memory_bank, read=read)


def rwkv(bug: str | None) -> Callable:
    """`RWKVGroundedMemory.__call__` with a decay exp(-exp(time_decay)), a normalised key, a readout norm and a bank that is not empty."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        b, state = args[0], args[1] if len(args) > 1 else None
        gate = jnp.tanh if bug == "tanh for the sigmoid of the receptance" else jax.nn.sigmoid
        r, k, v = gate(m.receptance_proj(b)), m.key_proj(b), m.value_proj(b)
        rows = m.rows(k, v)
        w = jnp.exp(-jnp.exp(m.time_decay[...]))  # (H, P)
        r, k, v = (x.reshape(*x.shape[:-1], *w.shape) for x in (r, k, v))
        k = (w if bug == "key normalised by the decay" else 1 - w) * k
        y, state = layers.wkv(r, k, v, w, m.time_first[...], state, time_first="bonus", impl=m.impl, chunk_size=m.chunk_size)
        if bug == "bank added before the norm":
            y = m.readout_norm(y + m.retrieve(b).reshape(y.shape))
        elif bug == "heads joined in the other order":
            y = m.readout_norm(y).reshape(*b.shape[:2], *w.shape).mT.reshape(b.shape) + m.retrieve(b)
        elif bug == "bank read by the key":
            y = m.readout_norm(y) + m.memory_gate[...] * memory_bank.read(
                m.key_proj(b), m.memory_keys[...], m.memory_values[...], m.memory_count[...], alpha=m.config.memory_alpha,
                heads=m.config.retrieval_heads)
        else:
            y = m.readout_norm(y) + m.retrieve(b)
        return m.output_proj(y), state, rows

    return around


def block(bug: str | None) -> Callable:
    """`GroundedMambaBlock.__call__` with a constant gate."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        x, state = args[0], args[1] if len(args) > 1 else None
        h, s = (None, None) if state is None else (jax.lax.stop_gradient(state["ssm"]), jax.lax.stop_gradient(state["wkv"]))
        ssm, states = m.ssm(m.ln_ssm(x), h)
        rwkv, s, rows = m.rwkv((m.ln_ssm if bug == "one norm for both branches" else m.ln_rwkv)(x), s)
        g = jnp.asarray(m.config.gate_ssm, x.dtype)
        aux = {"memory_rows": rows, "gate": jax.lax.stop_gradient(g).mean(), "ssm_states": jax.lax.stop_gradient(states)}
        mixed = g * ssm + (1 - g) * rwkv
        if bug == "norm behind the residual":
            y = m.ln_out(x + mixed)
        elif bug == "residual missing":
            y = m.ln_out(mixed)
        elif bug == "each branch normalised by itself":
            y = x + g * m.ln_out(ssm) + (1 - g) * m.ln_out(rwkv)
        else:
            y = x + m.ln_out(mixed)
        return y, {"ssm": states[:, 0 if bug == "first state carried instead of the last" else -1], "wkv": s}, aux

    return around
