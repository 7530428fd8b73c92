"""What is measured of a trained model beside its bits per byte: memory of a long stream, induction and recall.

Peak memory is that of a process of its own, which loads the model and does nothing else: `python -m experiments.comparison_measure MODEL
BACKEND TOKENS CHUNK THREADS`. In the process that trained, the allocator's own reserves would hide it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from conf.schema import TrainConfig
from experiments import schedule
from experiments.errors import RunError
from experiments.monitors.memory import peak_bytes, reset_peak
from experiments.steps import make
from experiments.tasks import reasoning

TIMEOUT = 3600.0  # seconds that the process may take


def measure(model: Path, config: TrainConfig, *, memory: bool) -> dict[str, Any]:
    """Numbers of the saved `model` of a run with this configuration. `memory` is the same for all seeds and takes a process: left out if not set."""
    settings = config.comparison
    found: dict[str, Any] = dict(streaming(model, config)) if memory else {}
    for name, puzzle in reasoning.TASKS.items():
        puzzles = puzzle(settings.puzzles, [0, 0])  # the same for every model and seed
        found[name] = dataclasses.asdict(reasoning.score(_load(model, config), puzzles))
        if settings.puzzle_steps:
            found[f"{name}_trained"] = dataclasses.asdict(trained(_load(model, config), config, name, puzzles))
    return found


def _load(model: Path, config: TrainConfig) -> Any:
    return runtime.load(model, backend=config.backend.name, dtype=config.backend.dtype)


def trained(model: Any, config: TrainConfig, name: str, puzzles: reasoning.Puzzles) -> reasoning.Score:
    """The score on `puzzles` after training on others: fresh ones at every step, the optimiser new, its rate the run's own."""
    settings = config.comparison
    steps, step = settings.puzzle_steps, make(model, config)
    optimiser = dataclasses.replace(config.optimiser, warmup=steps // 10)
    for done in range(1, steps + 1):
        batch = reasoning.TASKS[name](settings.puzzle_batch, [1, config.seed, done]).batch()
        step.step(batch, schedule.rates(done, steps, optimiser))
    return reasoning.score(step.model, puzzles)


def streaming(model: Path, config: TrainConfig) -> dict[str, float]:
    """Peak memory of a process that streams `memory_tokens` tokens, and the size of the states that it carries. Raises RunError if it fails."""
    return process(model, config.backend.name, config.comparison.memory_tokens, config.evaluation.chunk, config.backend.threads)


def process(model: Path, backend: str, tokens: int, chunk: int, threads: int | None) -> dict[str, float]:
    """`stream` in a process of its own. Raises RunError if it fails."""
    command = [sys.executable, "-m", "experiments.comparison_measure", str(model), backend, str(tokens), str(chunk), str(threads or 0)]
    search = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": search}, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"comparison: the measurement of memory took longer than {TIMEOUT:.0f} s: {' '.join(command)}") from error
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"comparison: the measurement of memory ended with status {done.returncode}: {last}") from error


def stream(model: Any, tokens: int, chunk: int) -> dict[str, float]:
    """Stream `tokens` random bytes in chunks through `model`. Megabytes above what the process held after its first two tokens."""
    ids = np.random.default_rng(0).integers(0, 256, (1, tokens))
    model(ids[:, :2])
    resettable = reset_peak()
    held, states = peak_bytes(), None
    started = time.perf_counter()
    for start in range(0, tokens, chunk):
        _, states = model(ids[:, start : start + chunk], states)
    seconds = time.perf_counter() - started
    size = sum(np.asarray(value).nbytes for state in states for value in state.values())
    above = (peak_bytes() - held) / 2**20 if resettable else math.nan  # a system that cannot forget the peak of loading cannot tell
    return {
        "memory_megabytes": above, "process_megabytes": peak_bytes() / 2**20, "state_kilobytes": size / 2**10,
        "streamed_tokens_per_second": tokens / seconds,
    }


def main(arguments: list[str]) -> int:
    """The process of its own; prints one line of JSON."""
    path, backend, tokens, chunk, threads = arguments
    model = runtime.load(path, backend=backend)
    if int(threads):
        import cython_ext

        cython_ext.set_num_threads(int(threads))
        if backend.startswith("torch"):
            import torch

            torch.set_num_threads(int(threads))
    print(json.dumps(stream(model, int(tokens), int(chunk))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
