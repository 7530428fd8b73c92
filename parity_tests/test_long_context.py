"""GroundedMamba over 16,384 tokens of real text, streamed in chunks of 512: it stays healthy, and it is the function of one call.

Once with initial weights and once after a short training, since training may drive a recurrence to where its start was not.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from conf.models import GroundedMambaConfig
from experiments.monitors.statistics import autocorrelation

CONFIG = GroundedMambaConfig(vocab_size=256, dim=36, depth=2, ssm_dim=7, rwkv_heads=3, memory_size=17, memory_every=20)
LENGTH, CHUNK, LAG = 16_384, 512, 256


@functools.cache
def text() -> np.ndarray:
    return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode()[:65_536], np.uint8).astype(np.int64)


@functools.cache
def weights(kind: str) -> dict[str, np.ndarray]:
    """Weights in float64 (rounded to float32, so that both precisions start from the same): initial, or after 60 AdamW steps."""
    model = runtime.build("grounded_mamba", CONFIG, backend="torch_compiled", seed=1)
    if kind == "trained":
        module, states = model.module, None
        optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
        lanes = torch.from_numpy(text()[LENGTH:LENGTH + 4 * 10_000].reshape(4, 10_000))
        for step in range(60):
            ids = lanes[:, 128 * step : 128 * step + 129]
            logits, states, aux = module(ids[:, :-1], states, return_aux=True)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            module.update_memory(aux)
    return {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in model.arrays().items()}


def build(kind: str, backend: str, dtype: str) -> Any:
    arrays = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in weights(kind).items()}
    return runtime.build("grounded_mamba", CONFIG, backend=backend, arrays=arrays, dtype=dtype)


def stream(model: Any) -> tuple[np.ndarray, list[np.ndarray], dict[int, float]]:
    """Logits (1, L, V), the SSM states (1, L, N) of every block, and the largest WKV entry after so many tokens."""
    ids, states, logits, trajectories, largest = text()[None, :LENGTH], None, [], [], {}
    for start in range(0, LENGTH, CHUNK):
        piece, states, aux = model(ids[:, start : start + CHUNK], states, return_aux=True)
        logits.append(piece)
        trajectories.append(aux["ssm_states"])
        largest[start + CHUNK] = max(float(np.abs(state["wkv"]).max()) for state in states)
    return np.concatenate(logits, axis=1), [np.concatenate(block, axis=1) for block in zip(*trajectories, strict=True)], largest


@functools.cache
def oracle(kind: str) -> np.ndarray:
    return build(kind, "torch_compiled", "float64")(text()[None, :LENGTH])[0]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["initial", "trained"])
@pytest.mark.parametrize("backend", ["torch_compiled", "jax"])
def test_a_long_stream_is_healthy_and_equals_one_call(backend: str, kind: str) -> None:
    logits, trajectories, largest = stream(build(kind, backend, "float64"))
    assert np.isfinite(logits).all() and all(np.isfinite(block).all() for block in trajectories)
    assert largest[LENGTH] <= 1.5 * largest[4_096], "the memory is a weighted mean of its keys and values, so it must not grow with L"
    for layer, block in enumerate(trajectories):
        assert autocorrelation(block[:, :-LAG], block[:, LAG:]) < 0.999, f"the state of layer {layer} has stopped moving"
    assert error(logits, oracle(kind)) < 1e-11  # float64 rounding over 16,384 normalised steps does not accumulate


def test_float32_streams_within_the_rounding_of_one_float32_call() -> None:
    model = build("trained", "torch_compiled", "float32")
    own = error(model(text()[None, :LENGTH])[0], oracle("trained"))
    # 16 x the reference's own rounding: another order of the same sums, as in the harness's float32 band
    assert error(stream(model)[0], oracle("trained")) <= 16 * own


MEMORY = """
import resource, sys
import numpy as np
from parity_tests.test_long_context import CHUNK, build, text
model, states, peak = build("initial", "torch_compiled", "float32"), None, {}
for start in range(0, 16_384, CHUNK):
    states = model(text()[None, start:start + CHUNK], states)[1]
    peak[start + CHUNK] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak[16_384] - peak[4_096]))
"""


def test_peak_memory_of_a_stream_does_not_grow_with_the_length() -> None:
    """In a process of its own, where no earlier peak hides this one."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    grown, kept = int(done.stdout), (16_384 - 4_096) * CONFIG.dim * 4
    assert grown < kept, f"{grown} bytes more at 16,384 tokens than at 4,096; one activation kept per token would be {kept}"
