"""Statistics of gradients and states as flat dicts of floats, ready to be logged.

Letters: B batch, L length, N state, H heads, P head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

STATE_LAG = 64


def gradient_statistics(gradients: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean, standard deviation, least and greatest finite entry, and number of non-finite entries of every parameter's gradient."""
    table: dict[str, float] = {}
    for name, gradient in gradients.items():
        flat = np.asarray(gradient, dtype=np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        table[f"gradient/{name}/nonfinite"] = float(flat.size - finite.size)
        if finite.size:
            table |= {
                f"gradient/{name}/mean": float(finite.mean()),
                f"gradient/{name}/std": float(finite.std()),
                f"gradient/{name}/min": float(finite.min()),
                f"gradient/{name}/max": float(finite.max()),
            }
    return table


def autocorrelation(earlier: np.ndarray, later: np.ndarray) -> float:
    """<h_t, h_{t+lag}> over the root of <h_t, h_t> <h_{t+lag}, h_{t+lag}>, sums over batch and time; one for a state that has stopped.

    earlier, later (B, T, N): the same stretch and the one `lag` tokens on. The mean is not taken out: a state that stands still is
    exactly what this must show, and has nothing but a mean.
    """
    first, second = np.asarray(earlier, dtype=np.float64), np.asarray(later, dtype=np.float64)
    scale = np.sqrt((first * first).sum() * (second * second).sum())
    return float((first * second).sum() / scale) if scale > 0 else float("nan")


def state_statistics(states: Sequence[Mapping[str, np.ndarray]], trajectories: Sequence[np.ndarray], lag: int = STATE_LAG) -> dict[str, float]:
    """Per layer and kind: mean norm along the last axis, RMS and greatest entry; of the SSM also the autocorrelation at `lag`.

    `states`: per layer {"ssm": (B, N), "wkv": (B, H, P, P)}; `trajectories`: per layer the SSM states (B, L, N) of every token.
    """
    table: dict[str, float] = {}
    for layer, state in enumerate(states):
        for kind, value in state.items():
            value = np.asarray(value, dtype=np.float64)
            table[f"state/{layer}/{kind}/norm"] = float(np.linalg.norm(value, axis=-1).mean())
            table[f"state/{layer}/{kind}/rms"] = float(np.sqrt((value * value).mean()))
            table[f"state/{layer}/{kind}/largest"] = float(np.abs(value).max())
    for layer, trajectory in enumerate(trajectories):
        if trajectory.shape[1] > lag:
            table[f"state/{layer}/ssm/autocorrelation_{lag}"] = autocorrelation(trajectory[:, :-lag], trajectory[:, lag:])
    return table
