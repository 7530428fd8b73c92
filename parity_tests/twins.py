"""Independent twins: the models again in plain NumPy, token by token, from their specification and not from the other implementations.

They import nothing of ours and are written to be read, not to be fast. Every function is analytic in its arrays wherever the model is
differentiable (no abs, no conj; comparisons look at real parts), so that complex arrays carry derivatives through it: the imaginary part of
f(x + i e d) / e is the derivative of f along d, exact to rounding for e = 1e-30 (Squire and Trapp, SIAM Review 40(1), 1998).

Letters: B batch, L length, D width, N state, H heads, P head width, V vocabulary, M slots, R rows written to the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))


def normalise(x: np.ndarray, eps: float) -> np.ndarray:
    """Mean 0, biased variance 1 along the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.real.max())
    return e / e.sum()


def largest_singular_value(a: np.ndarray) -> np.ndarray:
    """sigma_max of a matrix; its derivative is u^T dA v for the first singular pair u, v."""
    left, _, right = np.linalg.svd(a.real)
    return left[:, 0] @ a @ right[0]


def wkv_bonus(r: np.ndarray, k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One head of RWKV-5/6 in the loops of its published kernel (BlinkDL, RWKV-LM, wkv5): all arguments (L, P), w and u (P,), s (P, P).

    For every channel i of the key and j of the value: x = k_i v_j, y_j += r_i (u_i x + s_ij), s_ij = s_ij w_i + x.
    Returns y (L, P) and the last state, key index first.
    """
    length, width = r.shape
    s = np.array(s, dtype=np.result_type(r, k, v, w, u, s))
    y = np.zeros((length, width), dtype=s.dtype)
    for t in range(length):
        for j in range(width):
            for i in range(width):
                x = k[t, i] * v[t, j]
                y[t, j] += r[t, i] * (u[i] * x + s[i, j])
                s[i, j] = s[i, j] * w[i] + x
    return y, s


def wkv_gain(r: np.ndarray, k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GroundThink's meaning of time_first: the state takes u_i k_i v_j and is read after the update. As `wkv_bonus` otherwise."""
    length, width = r.shape
    s = np.array(s, dtype=np.result_type(r, k, v, w, u, s))
    y = np.zeros((length, width), dtype=s.dtype)
    for t in range(length):
        for j in range(width):
            for i in range(width):
                s[i, j] = w[i] * s[i, j] + u[i] * k[t, i] * v[t, j]
                y[t, j] += s[i, j] * r[t, i]
    return y, s


class GroundedMambaTwin:
    """GroundedMamba. `config`: any object with the fields; `arrays`: flat dict under torch's names, copied.

    `arrays` of the twin is its whole memory: `update_memory` changes it. Real arrays become float64, complex ones stay.
    """

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.arrays = {key: np.array(value, dtype=np.float64) if value.dtype.kind == "f" else np.array(value) for key, value in arrays.items()}
        self.dtype = np.result_type(*self.arrays.values())

    def forward(self, ids: np.ndarray, states: list[dict[str, np.ndarray]] | None = None) -> dict[str, Any]:
        """ids (B, L). Returns a dict: "logits" (B, L, V), "states", "blocks" (B, L, D) each, "gate", "ssm_states", "rows" per block."""
        config, arrays = self.config, self.arrays
        batch, width = ids.shape[0], config.dim // config.rwkv_heads
        if states is None:
            shapes = {"ssm": (batch, config.ssm_dim), "wkv": (batch, config.rwkv_heads, width, width)}
            states = [{key: np.zeros(shape) for key, shape in shapes.items()} for _ in range(config.depth)]
        x = arrays["embedding.weight"][ids]
        out: dict[str, Any] = {"states": [], "blocks": [], "gate": [], "ssm_states": [], "rows": []}
        for index in range(config.depth):
            x, state, gate, history, rows = self._block(f"blocks.{index}.", x, states[index])
            for key, value in (("states", state), ("blocks", x), ("gate", gate), ("ssm_states", history), ("rows", rows)):
                out[key].append(value)
        out["logits"] = self._norm("ln_out", x) @ arrays["embedding.weight"].T
        return out

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return normalise(x, self.config.norm_eps) * self.arrays[name + ".weight"] + self.arrays[name + ".bias"]

    def _block(self, at: str, x: np.ndarray, state: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        config, arrays = self.config, self.arrays
        a, b = self._norm(at + "ln_ssm", x), self._norm(at + "ln_rwkv", x)
        y = np.zeros(x.shape, dtype=self.dtype)
        history = np.zeros((*x.shape[:2], config.ssm_dim), dtype=self.dtype)
        wkv = np.zeros(np.shape(state["wkv"]), dtype=self.dtype)
        gates = np.zeros(x.shape[:2], dtype=self.dtype)
        for i in range(x.shape[0]):
            ssm, history[i] = self._ssm(at + "ssm.", a[i], state["ssm"][i])
            rwkv, wkv[i] = self._rwkv(at + "rwkv.", b[i], state["wkv"][i])
            for t in range(x.shape[1]):
                gates[i, t] = config.gate_ssm
                if config.gate == "learned":
                    gates[i, t] = softmax(arrays[at + "gate_proj.weight"] @ x[i, t] + arrays[at + "gate_proj.bias"])[0]
                y[i, t] = gates[i, t] * ssm[t] + (1.0 - gates[i, t]) * rwkv[t]
        rows = self._rows(at + "rwkv.", b) if config.memory_size else None
        return x + self._norm(at + "ln_out", y), {"ssm": history[:, -1], "wkv": wkv}, gates.mean(), history, rows

    def _ssm(self, at: str, a: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One sequence a (L, D) from h (N,): y (L, D) and all states (L, N)."""
        config, arrays = self.config, self.arrays
        sigma = largest_singular_value(arrays[at + "A"])
        transition = arrays[at + "A"] * config.max_singular / (sigma if sigma.real > config.max_singular else config.max_singular)
        outputs, states = [], []
        for a_t in a:
            dt = [self._step(z) for z in arrays[at + "dt_proj.weight"] @ a_t + arrays[at + "dt_proj.bias"]]
            scale = dt[1] / config.dt_max if len(dt) == 2 else 1.0
            h = h + dt[0] * (transition @ h) + scale * (arrays[at + "B_proj.weight"] @ a_t)
            h = self._norm(at + "state_norm", h)
            outputs.append(arrays[at + "C_proj.weight"] @ h + arrays[at + "D"] * a_t)
            states.append(h)
        return np.array(outputs), np.array(states)

    def _step(self, z: np.ndarray) -> np.ndarray:
        low, high = self.config.dt_min, self.config.dt_max
        if self.config.dt_clamp == "smooth":
            return low + (high - low) * sigmoid(z)
        positive = np.log1p(np.exp(z)) if z.real < 0 else z + np.log1p(np.exp(-z))
        return low if positive.real < low else high if positive.real > high else positive

    def _rwkv(self, at: str, b: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One sequence b (L, D) from s (H, P, P): output (L, D) and the last state."""
        config, arrays = self.config, self.arrays
        k, v = b @ arrays[at + "key_proj.weight"].T, b @ arrays[at + "value_proj.weight"].T
        r = sigmoid(b @ arrays[at + "receptance_proj.weight"].T)
        decay = arrays[at + "time_decay"]
        w = np.exp(-np.exp(decay)) if config.decay == "exp_exp" else decay
        y, last = np.zeros(b.shape, dtype=self.dtype), []
        for head in range(config.rwkv_heads):
            own = slice(head * w.shape[1], (head + 1) * w.shape[1])
            keys = (1.0 - w[head]) * k[:, own] if config.normalised_key else k[:, own]
            step = wkv_bonus if config.time_first == "bonus" else wkv_gain
            y[:, own], end = step(r[:, own], keys, v[:, own], w[head], arrays[at + "time_first"][head], s[head])
            last.append(end)
            if config.readout_norm:
                scaled = normalise(y[:, own], config.norm_eps)
                y[:, own] = scaled * arrays[at + "readout_norm.weight"][own] + arrays[at + "readout_norm.bias"][own]
        if config.memory_size and (arrays[at + "memory_count"] > 0).any():
            y = y + arrays[at + "memory_gate"] * np.array([self._read(at, b_t) for b_t in b])
        return y @ arrays[at + "output_proj.weight"].T, np.array(last)

    def _debiased(self, at: str, name: str) -> np.ndarray:
        """The occupied slots, each divided by the total weight of the rows that it has averaged."""
        count = self.arrays[at + "memory_count"]
        occupied = count[count > 0]
        assert (count[: len(occupied)] > 0).all(), "the occupied slots are a prefix"
        weight = 1.0 - (1.0 - self.config.memory_alpha) ** occupied
        return self.arrays[at + name][: len(occupied)] / weight[:, None]

    def _read(self, at: str, b_t: np.ndarray) -> np.ndarray:
        keys, values = self._debiased(at, "memory_keys"), self._debiased(at, "memory_values")
        query = self.arrays[at + "memory_query.weight"] @ b_t
        width = self.config.dim // self.config.retrieval_heads
        parts = []
        for head in range(self.config.retrieval_heads):
            own = slice(head * width, (head + 1) * width)
            parts.append(softmax(keys[:, own] @ query[own] / np.sqrt(width)) @ values[:, own])
        return np.concatenate(parts)

    def _rows(self, at: str, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Key and value rows (R, D) that a write after this forward would store; the key before `normalised_key`."""
        config, arrays = self.config, self.arrays
        flat = b.reshape(-1, config.dim)
        total = len(flat)
        number = min(config.memory_writes, total, config.memory_size)
        chosen = [(i * total // number + 7919 * int(arrays[at + "writes"])) % total for i in range(number)]
        return flat[chosen] @ arrays[at + "key_proj.weight"].T, flat[chosen] @ arrays[at + "value_proj.weight"].T

    def update_memory(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count a step in every block and write the block's rows when it is due."""
        for index, (keys, values) in enumerate(rows):
            at = f"blocks.{index}.rwkv."
            self.arrays[at + "update_counter"] = self.arrays[at + "update_counter"] + 1
            if self.arrays[at + "update_counter"] % self.config.memory_every == 0:
                self._write(at, keys, values)
                self.arrays[at + "writes"] = self.arrays[at + "writes"] + 1

    def _write(self, at: str, keys: np.ndarray, values: np.ndarray) -> None:
        alpha, count = self.config.memory_alpha, self.arrays[at + "memory_count"]
        before = self._debiased(at, "memory_keys")
        empty = [slot for slot in range(len(count)) if count[slot] == 0]
        slots = []
        for key in keys:
            if empty:
                slots.append(empty.pop(0))
                continue
            cosines = [old @ key / (np.sqrt(old @ old) * np.sqrt(key @ key)) for old in before]
            # Parallel keys (equal tokens have them) are a tie, which rounding must not decide: a sum of D products is off by D eps at most.
            slack = len(key) * np.finfo(np.float64).eps
            slots.append(min(slot for slot, cosine in enumerate(cosines) if cosine >= max(cosines) - slack))
        for slot, key, value in zip(slots, keys, values, strict=True):
            for name, row in (("memory_keys", key), ("memory_values", value)):
                self.arrays[at + name][slot] = (1.0 - alpha) * self.arrays[at + name][slot] + alpha * row
            count[slot] += 1
