"""Independent twin of WaveCore in plain NumPy: one row of the batch after another, the whole memory rewritten every step.

As in `twins.py` it imports nothing of ours and is analytic in its arrays, so that complex arrays carry derivatives through it: relu, clip,
the smallest row and the threshold of a gate decide on real parts, and what they decided is a constant.

Letters: B batch, T time, n slots of a level, d width of a level, d_* as the configuration has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.twins import normalise, sigmoid, softmax

LN_EPS = 1e-6
State = dict[str, Any]  # s (B, d_s), w (B, d_w), p (B, d_p), and lists over levels: memories (B, n, d), keys (B, n, d_k)


def relu(x: np.ndarray) -> np.ndarray:
    """Derivative 0 at 0."""
    return np.where(x.real > 1e-50, x, 0.0)  # two complex steps of 1e-30, multiplied, leave 1e-60 in the real part of what is zero


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x), without overflow."""
    return relu(x) + np.log1p(np.exp(np.where(x.real > 0, -x, x)))


def clip(x: np.ndarray, limit: float) -> np.ndarray:
    """Derivative 1 up to the limit and at it; x itself where the limit is 0."""
    if limit == 0:
        return x
    return np.where(x.real > limit, limit, np.where(x.real < -limit, -limit, x))


def smallest(rows: np.ndarray) -> int:
    """The row of (n, d) with the smallest squared norm, the first of several."""
    best, least = 0, np.inf
    for i, row in enumerate(rows):
        norm = (row.real * row.real).sum()
        if norm < least:
            best, least = i, norm
    return best


class WaveCoreTwin:
    """WaveCore. `config`: any object with the fields; `arrays`: flat dict under torch's names, Dense weights (out, in)."""

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
        self.config, self.arrays = config, dict(arrays)

    def init_state(self, batch: int) -> State:
        """Zeros: the state before the first step."""
        config = self.config
        return {
            "s": np.zeros((batch, config.d_s)), "w": np.zeros((batch, config.d_w)), "p": np.zeros((batch, config.d_p)),
            "memories": [np.zeros((batch, n, d)) for n, d in zip(config.cms_sizes, config.cms_dims, strict=True)],
            "keys": [np.zeros((batch, n, config.d_k)) for n in config.cms_sizes],
        }

    def rollout(self, state: State, x_obs: np.ndarray, a_prev: np.ndarray, r_t: np.ndarray) -> tuple[list[dict[str, Any]], State]:
        """T steps: x_obs (T, B, obs), a_prev (T, B, action), r_t (T, B, 1). Returns what every step gave, and the last state."""
        steps = []
        for x, a, r in zip(x_obs, a_prev, r_t, strict=True):
            out, state = self.step(state, x, a, r)
            steps.append(out)
        return steps, state

    def step(self, state: State, x_obs: np.ndarray, a_prev: np.ndarray, r_t: np.ndarray) -> tuple[dict[str, Any], State]:
        """One step: x_obs (B, obs), a_prev (B, action), r_t (B, 1). Returns a dict and the next state.

        The dict has query, context, attention_weights (a list over levels), fast_state, wave_state, particle_state, the heads that are on
        (action, value, next_obs), `unclipped` ([s; w; p] before the clip), `rows` and `open` (B, levels): the row chosen, and whether written.
        """
        answers = []
        for i in range(len(x_obs)):
            held = {name: state[name][i] for name in "swp"} | {name: [level[i] for level in state[name]] for name in ("memories", "keys")}
            answers.append(self._row(held, x_obs[i], a_prev[i], r_t[i]))
        outs, states = ([answer[k] for answer in answers] for k in (0, 1))
        return _together(outs), _together(states)

    def _row(self, state: State, x_obs: np.ndarray, a_prev: np.ndarray, r: np.ndarray) -> tuple[dict[str, Any], State]:
        """A step of one row: vectors, and per level matrices (n, d) and (n, d_k)."""
        e = self._encode(x_obs, a_prev, r)
        query, attention, context = self._read(state, e)
        unclipped = self._advance(state, e, context)
        s, w, p = (clip(value, self.config.state_saturation_limit) for value in unclipped)
        memories, keys, rows, is_open = self._write(state, s, e, r)
        out = {
            "query": query, "context": context, "attention_weights": attention, "fast_state": s, "wave_state": w, "particle_state": p,
            "unclipped": np.concatenate(unclipped), "rows": np.array(rows), "open": np.array(is_open), **self._decode(s, context),
        }
        return out, {"s": s, "w": w, "p": p, "memories": memories, "keys": keys}

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.arrays[name + ".weight"] @ x + self.arrays[name + ".bias"]

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return normalise(x, LN_EPS) * self.arrays[name + ".weight"] + self.arrays[name + ".bias"]

    def _tower(self, name: str, x: np.ndarray) -> np.ndarray:
        """Dense, LayerNorm, relu, Dense: the layers `name`_in, `name`_norm and `name`_out."""
        return self._dense(name + "_out", relu(self._norm(name + "_norm", self._dense(name + "_in", x))))

    def _encode(self, x_obs: np.ndarray, a_prev: np.ndarray, r: np.ndarray) -> np.ndarray:
        o = self._tower("encoder.obs", x_obs)
        a, r = relu(self._dense("encoder.action", a_prev)), relu(self._dense("encoder.reward", r))
        return self._norm("encoder.norm", self._tower("encoder.join", np.concatenate([o, a, r])))

    def _read(self, state: State, e: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        query = self._tower("cms_read.query", np.concatenate([state["s"], e]))
        attention, contexts = [], []
        for level, (memory, keys) in enumerate(zip(state["memories"], state["keys"], strict=True)):
            scores = np.array([key @ query for key in keys]) / np.sqrt(self.config.d_k)
            weights = softmax(scores)
            content = sum(weight * row for weight, row in zip(weights, memory, strict=True))
            attention.append(weights)
            contexts.append(self.arrays[f"cms_read.level_proj.{level}.weight"] @ content)
        mix = softmax(self._dense("cms_read.mixing", np.concatenate(contexts)))
        return query, attention, sum(share * context for share, context in zip(mix, contexts, strict=True))

    def _advance(self, state: State, e: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """s~, w~ and p~."""
        z = self._dense("core.z_proj", e)
        w = (self._mamba if self.config.use_mamba_wave else self._linear)(state["w"], z, c)
        p = state["p"] + self._tower("core.particle", np.concatenate([state["p"], c]))
        g = sigmoid(self._dense("core.gate", np.concatenate([state["s"], e, c])))
        s = state["s"] + g * (self.arrays["core.U_p"] @ p) + (1 - g) * (self.arrays["core.U_w"] @ w)
        return s, w, p

    def _mamba(self, w: np.ndarray, z: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Channel by channel i, state by state j; the state of channel i lies in w from i * state_dim on."""
        config, at = self.config, "core.wave.ssm."
        zc = np.concatenate([z, c])
        u = self._dense("core.wave.wave_in", zc)
        dt = softplus(self._dense(at + "dt_proj", u)) * config.mamba_dt_scale + config.mamba_dt_min
        b, c_in = self._dense(at + "b_proj", u), self._dense(at + "c_proj", u)
        a = -softplus(self.arrays[at + "a_raw"])
        h, y = (np.zeros(size, dtype=np.result_type(w, u, *self.arrays.values())) for size in (config.d_w, len(u)))
        for i in range(len(u)):
            y[i] = self.arrays[at + "D"][i] * u[i]
            for j in range(config.mamba_state_dim):
                k = i * config.mamba_state_dim + j
                h[k] = np.exp(dt[i] * a[i, j]) * w[k] + dt[i] * (b[i] * self.arrays[at + "B_base"][i, j]) * u[i]
                y[i] = y[i] + c_in[i] * self.arrays[at + "C_base"][i, j] * h[k]
        return 0.5 * h + 0.5 * self._dense("core.wave.wave_out", y * sigmoid(self._dense("core.wave.gate_proj", zc)))

    def _linear(self, w: np.ndarray, z: np.ndarray, c: np.ndarray) -> np.ndarray:
        """The matrix A(c) written out."""
        at = "core.wave."
        a = np.diag(0.9 * np.tanh(self.arrays[at + "A_diag"])) + self.arrays[at + "A_U"] @ self.arrays[at + "A_V"].T
        a = a * np.tanh(self._dense(at + "A_modulation", c))[:, None]
        return a @ w + self._dense(at + "B_net", np.concatenate([c, z]))

    def _write(self, state: State, s: np.ndarray, e: np.ndarray, r: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], list[int], list[bool]]:
        config = self.config
        se, ser = np.concatenate([s, e]), np.concatenate([s, e, r])
        memories, keys, rows, is_open = [], [], [], []
        for level, decay in enumerate(config.cms_decays):
            value, key = self._dense(f"cms_write.value.{level}", se), self._dense(f"cms_write.key.{level}", se)
            gate = sigmoid(self._dense(f"cms_write.gate.{level}", ser))[0]
            memory, held = (1 - decay) * state["memories"][level], (1 - decay) * state["keys"][level]
            row = smallest(memory) if config.cms_write == "least_salient" else 0
            writes = bool(gate.real > config.salience_threshold) if config.cms_write == "least_salient" else True
            if writes:
                memory, held = (x.astype(np.result_type(x, new, gate)) for x, new in ((memory, value), (held, key)))
                memory[row] = gate * value + (1 - gate) * memory[row]
                held[row] = gate * key + (1 - gate) * held[row]
            for found, value in ((memories, memory), (keys, held), (rows, row), (is_open, writes)):
                found.append(value)
        return memories, keys, rows, is_open

    def _decode(self, s: np.ndarray, c: np.ndarray) -> dict[str, np.ndarray]:
        h = relu(self._tower("decoder.hidden", np.concatenate([s, c])))
        heads = {}
        if "action" in self.config.heads:
            y = self._dense("decoder.action", h)
            heads["action"] = np.tanh(y) if self.config.output_type == "continuous" else y
        if "value" in self.config.heads:
            heads["value"] = self._dense("decoder.value", h)
        if "world_model" in self.config.heads:
            heads["next_obs"] = self._dense("decoder.world_model", h)
        return heads


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The dicts of B rows as one, with the batch axis in front; lists over levels stay lists."""
    return {
        name: [np.stack(level) for level in zip(*(row[name] for row in rows), strict=True)] if isinstance(value, list)
        else np.stack([row[name] for row in rows])
        for name, value in rows[0].items()
    }
