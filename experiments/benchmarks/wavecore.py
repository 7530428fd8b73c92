"""WaveCore v3.0: one step at batch 1, and the memory's write by itself, kept lazily and rewritten whole."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import cython_ext
from conf.models import TIER_SIZES, WaveCoreConfig
from experiments.benchmarks import bounds, gate, peers
from experiments.benchmarks.case import BOUND, STREAM, Case, Target
from experiments.tasks.core_step import compile_both
from parity_tests import specs_wavecore
from runtime import build
from runtime.init import init_arrays

TIER = "v3.0"
WIDTHS, CONFIG = TIER_SIZES[TIER], WaveCoreConfig.tier(TIER)
FULL, LAZY, EAGER, ENGINE, BFLOAT16, ONNX = "jax, memory rewritten", "jax, lazy memory", "torch, eager", "engine", "engine, bfloat16", "ONNX Runtime"
KERNEL_FULL, KERNEL_LAZY = "cms kernel, memory rewritten", "cms kernel, lazy"


@cache
def arrays() -> dict[str, np.ndarray]:
    """The weights that every contender has."""
    return init_arrays("wavecore", CONFIG.sized(**WIDTHS), 0)


@cache
def parity() -> gate.Check:
    return gate.battery(specs_wavecore.FULL[0])


def core(backend: str, dtype: str = "float32", weights: str | None = None) -> Any:
    return build("wavecore", CONFIG, backend, arrays(), dtype, **WIDTHS, weights=weights)


def observations(steps: int | None, batch: int = 1, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """Random x_obs, a_prev and reward, time first."""
    rng, rows = np.random.default_rng(0), (batch,) if steps is None else (steps, batch)
    return tuple(rng.normal(size=(*rows, width)).astype(dtype) for width in (WIDTHS["obs_dim"], WIDTHS["action_dim"], 1))


def agreement() -> list[gate.Check]:
    """Outputs and states of 30 steps in every form against torch's in float64."""
    forms: dict[str, dict[str, np.ndarray]] = {}
    for dtype in ("float64", "float32"):
        forms[dtype] = {name: rollout(core(backend, dtype), dtype) for name, backend in ((EAGER, "torch"), (LAZY, "jax"), (ENGINE, "cython"))}
    truth = forms["float64"].pop(EAGER)
    return [parity(), *gate.agreement(truth, forms["float64"], forms["float32"], EAGER), small_weights()]


def small_weights() -> gate.Check:
    """Outputs of 30 steps on weights in bfloat16, each from the state that float32 weights reached: what a step does, not how far runs part."""
    exact, small, outputs = core("cython"), core("cython", weights="bfloat16"), ([], [])
    state = exact.init_state(1)
    for inputs in zip(*observations(30), strict=True):
        outputs[1].append(small.step(small.load_state(exact.state_arrays(state)), *inputs)[0])
        y, state, _ = exact.step(state, *inputs)
        outputs[0].append(y)
    return gate.alike(BFLOAT16, *map(np.stack, outputs))


def rollout(made: Any, dtype: str) -> np.ndarray:
    """(30, 1, all outputs and states) of 30 steps."""
    y, _, info = made.rollout(made.init_state(1), *observations(30, dtype=dtype))
    return np.concatenate([np.asarray(part) for part in (y, info["fast_state"], info["wave_state"], info["particle_state"])], axis=-1)


def step_bytes() -> int:
    """Weights and memory, both read once."""
    memory = sum(n * (d + CONFIG.d_k) for n, d in zip(CONFIG.cms_sizes, CONFIG.cms_dims, strict=True))
    return 4 * (sum(value.size for value in arrays().values()) + memory)


def step(threads: int) -> Case:
    given, made = observations(None), core("jax")
    inputs = [jnp.asarray(part) for part in given]
    variants = compile_both(made.model, made.variables, 1, inputs)
    engines = {name: core("cython", weights=kind).engine(1) for name, kind in ((ENGINE, None), (BFLOAT16, "bfloat16"))}
    eager, tensors = core("torch").module, [torch.from_numpy(part) for part in given]
    held = [eager.init_state(1)]

    def torch_step() -> None:
        with torch.inference_mode():
            _, held[0], _ = eager.step(held[0], *tensors)

    def jax_step(name: str) -> None:
        variants[name].run(made.variables, inputs, 1)

    case = Case(
        name="wavecore_step", title=f"WaveCore {TIER}, one step at batch 1", checks=agreement(),
        contenders={
            FULL: lambda: jax_step("full"), LAZY: lambda: jax_step("lazy"), EAGER: torch_step,
            **{name: (lambda engine=engine: engine.step(*given)) for name, engine in engines.items()},
        },
        bounds={STREAM: bounds.stream(step_bytes())},
        targets=[
            Target("engine against JAX with the memory rewritten", FULL, ENGINE, 3), Target("engine, of the read bandwidth", BOUND, ENGINE, 0.7),
            Target("JAX, lazy against rewritten memory", FULL, LAZY, 1.0), Target("bfloat16 weights against float32", ENGINE, BFLOAT16, 1.0),
        ],
        operations=step_bytes() / 2, bytes=step_bytes(), rounds=60,
    )
    case.peer(ONNX, lambda: peers.onnx_call(Stepped(eager), threads, *tensors))
    return case


class Stepped(torch.nn.Module):
    """One step from zeros with the memory rewritten, as a module of arrays: what an exporter takes."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.core, self.held = core, tuple(core.init_state(1)[:5])

    def forward(self, x_obs: torch.Tensor, a_prev: torch.Tensor, r_t: torch.Tensor) -> Any:
        y, info = self.core(x_obs, a_prev, r_t, *self.held)
        return y, info["fast_state"], info["wave_state"], info["particle_state"], *info["cms_memories"], *info["cms_keys"]


def write(threads: int) -> Case:
    """The three levels' write, 50 steps from given memories; full and lazy agree at the end."""
    kernel, rng = cython_ext.kernel("cms"), np.random.default_rng(0)
    levels = list(zip(CONFIG.cms_sizes, CONFIG.cms_dims, CONFIG.cms_decays, strict=True))
    rule = dict(rule=CONFIG.cms_write, threshold=CONFIG.salience_threshold)

    def new(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rows = [(new(1, d), new(1, CONFIG.d_k), rng.uniform(0.6, 1.0, (1, 1)).astype(np.float32)) for _, d, _ in levels]
    full = [[new(1, n, d), new(1, n, CONFIG.d_k)] for n, d, _ in levels]
    lazy = [[memory.copy(), keys.copy(), np.square(memory).sum(-1), np.ones((), np.float32)] for memory, keys in full]

    def write_full() -> None:
        for i, (_, _, decay) in enumerate(levels):
            kernel.write(*full[i], *rows[i], decay, **rule)

    def write_lazy() -> None:
        for i, (_, _, decay) in enumerate(levels):
            kernel.write_lazy(*lazy[i], *rows[i], decay, **rule)

    for _ in range(50):
        write_full()
        write_lazy()
    checks = [
        gate.Check(f"level {i}, lazy against rewritten after 50 writes", gate.distance(full[i][0], lazy[i][3] * lazy[i][0]), 1e-5) for i in range(3)]
    return Case(
        name="wavecore_write", title=f"WaveCore {TIER}, the write of its memory", checks=checks,
        contenders={KERNEL_FULL: write_full, KERNEL_LAZY: write_lazy}, bounds={},
        targets=[Target("lazy against rewritten", KERNEL_FULL, KERNEL_LAZY, 1.3)], rounds=60,
    )


CASES = [step, write]
