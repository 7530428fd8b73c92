"""The modules and functions of WaveCore again in JAX, with porting bugs as branches.

A mutant without a bug is the port itself, which a test asserts, so that what the harness notices is the bug.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_impl.ops import cms
from jax_impl.ops.wave import saturate, selective_step, softplus
from jax_impl.wavecore import _info
from parity_tests.harness.adapters.nnx_injectors_more import within


def encoder(bug: str | None) -> Callable:
    """`Encoder.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        x, a, r = args
        relu = (lambda x: jax.nn.gelu(x, approximate=False)) if bug == "gelu for relu in the encoder" else jax.nn.relu
        o = m.obs_in(x)
        o = m.obs_out(m.obs_norm(relu(o)) if bug == "relu before the norm" else relu(m.obs_norm(o)))
        a, r = relu(m.action(a)), m.reward(r) if bug == "reward without its relu" else relu(m.reward(r))
        joined = [o, r, a] if bug == "reward joined before the action" else [o, a, r]
        return m.norm(m.join_out(relu(m.join_norm(m.join_in(jnp.concatenate(joined, -1))))))

    return around


def reading(bug: str | None) -> Callable:
    """`CMSRead.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        s, e, memories, keys, scales = (*args, None)[:5]
        joined = [e, s] if bug == "e before s in the query" else [s, e]
        query = m.query_out(jax.nn.relu(m.query_norm(m.query_in(jnp.concatenate(joined, -1)))))
        attention, answers = [], []
        for level, project in enumerate(m.level_proj):
            weights, content = cms.read(query, memories[level], keys[level], None if scales is None else scales[level])
            attention.append(weights)
            answers.append(project(content))
        logits = m.mixing(jnp.concatenate(answers[::-1] if bug == "answers joined last level first" else answers, -1))
        mix = {"mixing by a sigmoid": jax.nn.sigmoid, "mixing weights over the wrong axis": lambda x: jax.nn.softmax(x, 0)}.get(
            str(bug), lambda x: jax.nn.softmax(x, -1))(logits)
        if bug == "levels averaged for mixed":
            mix = jnp.full_like(mix, 1 / len(answers))
        context = (mix[..., None] * jnp.stack(answers, -2)).sum(-2)
        return query, context, tuple(attention)

    return around


def core(bug: str | None) -> Callable:
    """`HopeCore.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        s, w, p, e, c = args
        old = w, p
        w = m.wave(w, m.z_proj(e), c)
        p = p + m.particle_out(jax.nn.relu(m.particle_norm(m.particle_in(jnp.concatenate([p, c], -1)))))
        g = jax.nn.sigmoid(m.gate(jnp.concatenate([s, e, c], -1)))
        g = 1 - g if bug == "gate inverted" else g
        if bug == "clipped before U_p and U_w":
            w, p = saturate(w, m.limit), saturate(p, m.limit)
        from_p = (old[1] if bug == "p before its step in s" else p) @ m.U_p[...].mT
        from_w = (old[0] if bug == "w before its step in s" else w) @ m.U_w[...].mT
        both = g * from_p + (g if bug == "g for 1 - g" else 1 - g) * from_w
        s = both if bug == "s without its past" else s + both
        if bug == "states taken before clipping":
            return s, w, p
        if bug == "s clipped by tanh":
            return m.limit * jnp.tanh(s / m.limit), saturate(w, m.limit), saturate(p, m.limit)
        return saturate(s, m.limit), w if bug == "w not clipped" else saturate(w, m.limit), saturate(p, m.limit)

    return around


def wave(bug: str | None) -> Callable:
    """`MambaWave.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        w, z, c = args
        zc = jnp.concatenate([z, c], -1)
        inputs = m.wave_in(jnp.concatenate([c, z], -1) if bug == "context before particles in the wave" else zc)
        if bug == "carry reshaped in the other order":
            y, h = m.ssm(inputs, w.reshape(len(w), m.state_dim, -1).mT)
            h = h.mT
        else:
            y, h = m.ssm(inputs, w.reshape(len(w), -1, m.state_dim))
        gate = (jax.nn.silu if bug == "silu gate in the wave" else jax.nn.sigmoid)(m.gate_proj(zc))
        out = gate * m.wave_out(y) if y.shape[-1] == w.shape[-1] and bug == "gate behind wave_out" else m.wave_out(y * gate)
        share = 1.0 if bug == "wave state and output added, not averaged" else 0.5
        return share * h.reshape(w.shape) + share * out

    return around


def ssm(bug: str | None) -> Callable:
    """`SelectiveSSM.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        u, carry = args
        raw, a_raw, b, c, d = m.dt_proj(u), m.a_raw[...], m.b_proj(u), m.c_proj(u), m.D[...]
        dt = (jnp.exp(raw) if bug == "softplus of dt replaced by exp" else softplus(raw))
        dt = dt if bug == "dt without its scale" else dt * m.config.mamba_dt_scale
        dt = dt if bug == "dt without its minimum" else dt + m.config.mamba_dt_min
        if bug == "softplus of A replaced by exp":
            a_raw = jnp.log(jnp.expm1(jnp.exp(a_raw)))  # softplus of this is exp(a_raw)
        if bug == "b and c exchanged":
            b, c = c, b
        if bug == "input not times dt":
            b = b / dt
        if bug == "missing skip D u":
            d = 0 * d
        y, h = selective_step(u, carry, dt, b, c, a_raw, m.B_base[...], m.C_base[...], d)
        if bug == "y of the carry before the step":
            y = selective_step(u, carry, 0 * dt, b, c, a_raw, m.B_base[...], m.C_base[...], d)[0]
        if bug == "y averaged over the state":
            y = (y - d * u) / carry.shape[-1] + d * u
        return y, h

    return around


def linear(bug: str | None) -> Callable:
    """`LinearWave.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        w, z, c = args
        modulation = m.A_modulation(c)
        modulation = modulation if bug == "modulation without its tanh" else jnp.tanh(modulation)
        diagonal = (1.0 if bug == "diagonal without its 0.9" else 0.9) * jnp.tanh(m.A_diag[...]) * w
        low = w @ m.A_U[...] @ m.A_V[...].mT if bug == "U V exchanged in the wave" else w @ m.A_V[...] @ m.A_U[...].mT
        if bug == "columns modulated for rows":
            w = w * modulation
            return 0.9 * jnp.tanh(m.A_diag[...]) * w + (w @ m.A_V[...]) @ m.A_U[...].mT + m.B_net(jnp.concatenate([c, z], -1))
        return modulation * (diagonal + low) + m.B_net(jnp.concatenate([z, c] if bug == "particles before context in B_net" else [c, z], -1))

    return around


def write(bug: str | None) -> Callable:
    """`cms.write`."""

    def written(memory: Any, keys: Any, value: Any, key: Any, gate: Any, decay: float, *, rule: str, threshold: float) -> tuple:
        keep = 1 - decay
        decayed, decayed_keys = keep * memory, keys if bug == "keys not decayed" else keep * keys
        norms = jnp.square(decayed).sum(-1)
        if bug == "slot chosen before the decay by the norm of its key":
            norms = jnp.square(keys).sum(-1)
        if bug == "slot of the largest norm":
            norms = -norms
        if bug == "slot chosen by the sum for the norm":
            norms = decayed.sum(-1)
        if bug == "write gate inverted":
            gate = 1 - gate
        row, is_open = cms.choose(norms, gate, rule, threshold)
        if bug == "last slot of a tie":
            row = norms.shape[-1] - 1 - norms[:, ::-1].argmin(-1)
        if bug == "closed gate writes":
            is_open = jnp.ones_like(is_open)
        if bug != "row that is not finite written":
            is_open = is_open & cms._finite(value, key, gate)
        at = jnp.arange(len(row)), row

        def put(old: Any, base: Any, new: Any) -> Any:
            share, new = jnp.where(is_open[:, None], gate, 0), jnp.where(is_open[:, None], new, 0)
            mixed = new if bug == "row overwritten" else share * new + (1 - share) * old[at]
            return base.at[at].set(jnp.where(is_open[:, None], mixed, base[at]))

        if bug == "decay after the write":
            return keep * put(memory, memory, value), keep * put(keys, keys, key)
        if bug == "old row not decayed":
            return put(memory, decayed, value), put(keys, decayed_keys, key)
        if bug == "old row without gradient":
            return put(jax.lax.stop_gradient(decayed), decayed, value), put(jax.lax.stop_gradient(decayed_keys), decayed_keys, key)
        return put(decayed, decayed, value), put(decayed_keys, decayed_keys, key)

    return within(cms, write=written)


def write_lazy(bug: str | None) -> Callable:
    """`cms.write_lazy`."""

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
            norms = jnp.where(folds, (factor if bug == "norms folded by the scale once" else jnp.square(factor)) * jnp.square(memory).sum(-1), norms)
        scale = scale if bug == "scale not renewed by the fold" else jnp.where(folds, 1.0, scale)
        return factor * memory, keys if bug == "keys not folded" else factor * keys, *jax.lax.stop_gradient((norms, scale))

    return within(cms, write_lazy=written)


def read(bug: str | None) -> Callable:
    """`cms.read`."""

    def answered(query: Any, memory: Any, keys: Any, scale: Any = None) -> tuple:
        scores = jnp.einsum("bnk,bk->bn", keys, query) / (1.0 if bug == "scores not divided by sqrt(d_k)" else query.shape[-1] ** 0.5)
        if bug == "scores divided by sqrt(n)":
            scores = scores * (query.shape[-1] / memory.shape[-2]) ** 0.5
        scale = 1.0 if scale is None else scale
        attention = jax.nn.softmax(scores if bug == "scale forgotten in the scores" else scale * scores, -1)
        if bug == "empty slots not attended":
            attention = jax.nn.softmax(jnp.where(jnp.square(memory).sum(-1) > 0, scale * scores, -jnp.inf), -1)
        return attention, (1.0 if bug == "scale forgotten in the content" else scale) * jnp.einsum("bn,bnd->bd", attention, memory)

    return within(cms, read=answered)


def stepped(bug: str | None) -> Callable:
    """`WaveCore.__call__`."""

    def around(m: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        x, a, r, s, w, p, memories, keys = args
        before = s
        e = m.encoder(x, a, r)
        query, context, attention = m.cms_read(s, e, memories, keys)
        s, w, p = m.core(s, w, p, e, context)
        new = m.cms_write(before if bug == "memory written from s before the step" else s, e, r, memories, keys)
        if bug == "memory read after the write":
            context = m.cms_read(s, e, *new)[1]
        y, heads = m.decoder(before if bug == "decoder reads s before the step" else s, context)
        return y, _info(query, context, attention, s, w, p) | {"cms_memories": new[0], "cms_keys": new[1]} | heads

    return around
