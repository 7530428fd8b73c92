"""How long one step of WaveCore takes in JAX, with the memory kept lazily and with the memory rewritten in full.

    python -m experiments.tasks.core_step

Both are jitted with their state donated, run in one process and take turns (A B B A ...), so that what disturbs one disturbs the other. The ratio
is that of the medians. Beside it: the bytes of parameters per second, since a step at batch 1 reads every weight once, and from XLA's own trace
the time of every part of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conf.models import TIER_SIZES, WaveCoreConfig
from experiments import environment
from jax_impl.functional import Variables, WaveCoreModel

PARTS = ("encoder", "cms_read", "core", "cms_write", "decoder")
REST = "rest"  # what XLA made of none of the parts alone
Held = Any


@dataclass
class Variant:
    """One way to step, compiled, with the state that its next call takes."""

    compiled: Any
    held: Held

    def run(self, variables: Variables, inputs: Sequence[jax.Array], steps: int) -> float:
        """Seconds per step."""
        started = time.perf_counter()
        for _ in range(steps):
            _, self.held, _ = self.compiled(variables, self.held, *inputs)
        jax.block_until_ready(self.held)
        return (time.perf_counter() - started) / steps


@dataclass(frozen=True)
class Named:
    """A module whose operations carry a name in the compiled program."""

    name: str
    module: Any

    def __call__(self, *inputs: Any) -> Any:
        with jax.named_scope(self.name):
            return self.module(*inputs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.module, attribute)


@dataclass(frozen=True)
class Timing:
    """Seconds per step over all samples: median, quartiles and the shortest; bytes of parameters per second at the median."""

    median: float
    lower_quartile: float
    upper_quartile: float
    shortest: float
    parameter_bytes_per_second: float


@dataclass(frozen=True)
class Result:
    """`ratio` is the median of the full step over that of the lazy one; `profile[variant][part]` seconds per step inside XLA's operations."""

    tier: str
    batch: int | None
    rounds: int
    steps: int
    parameter_bytes: int
    memory_bytes: int
    ratio: float
    timings: dict[str, Timing]
    profile: dict[str, dict[str, float]]
    operations: dict[str, list[tuple[str, str, float]]]
    memory_copies: dict[str, list[str]]
    environment: dict[str, str]


def run(tier: str = "v3.0", batch: int | None = 1, rounds: int = 200, steps: int = 10) -> Result:
    """Measure a tier on `batch` rows, None for no batch axis: `rounds` samples of `steps` steps each."""
    sizes = TIER_SIZES[tier]
    model = WaveCoreModel(WaveCoreConfig.tier(tier), **sizes)
    variables = model.init(0)
    rows = () if batch is None else (batch,)
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(*rows, width)), jnp.float32) for width in (sizes["obs_dim"], sizes["action_dim"], 1)]
    variants = compile_both(model, variables, batch, inputs)
    for variant in variants.values():
        variant.run(variables, inputs, steps)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in sorted(variants, reverse=turn % 2 == 1):
            samples[name].append(variants[name].run(variables, inputs, steps))
    texts = {name: variant.compiled.as_text() for name, variant in variants.items()}
    operations = {name: operation_times(lambda v=variant: v.run(variables, inputs, steps), texts[name], steps) for name, variant in variants.items()}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    timings = {name: timing(values, weights) for name, values in samples.items()}
    return Result(
        tier=tier, batch=batch, rounds=rounds, steps=steps, parameter_bytes=weights,
        memory_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(variants["lazy"].held[3:5])),
        ratio=timings["full"].median / timings["lazy"].median,
        timings=timings,
        profile={name: by_part(rows) for name, rows in operations.items()},
        operations=operations,
        memory_copies={name: memory_copies(texts[name], variant.held) for name, variant in variants.items()},
        environment=environment.describe(),
    )


def compile_both(model: WaveCoreModel, variables: Variables, batch: int | None, inputs: Sequence[jax.Array]) -> dict[str, Variant]:
    """The lazy step and the step with the memory rewritten in full, each from zeros; parts of the step are named in the program."""
    def named(variables: Variables) -> Any:
        core = model.merge(variables)
        for name in PARTS:
            vars(core)[name] = Named(name, vars(core)[name])
        return core

    def lazy(variables: Variables, state: Any, *inputs: jax.Array) -> tuple[Any, ...]:
        return named(variables).step(state, *inputs)

    def full(variables: Variables, held: Any, *inputs: jax.Array) -> tuple[Any, ...]:
        y, info = named(variables)(*inputs, *held)
        after = info["fast_state"], info["wave_state"], info["particle_state"], info.pop("cms_memories"), info.pop("cms_keys")
        return y, after, info

    def compiled(function: Callable[..., Any], held: Held) -> Variant:
        held = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), held)  # no two donated leaves share a buffer
        return Variant(jax.jit(function, donate_argnums=1).lower(variables, held, *inputs).compile(), held)

    state = model.init_state(batch)
    return {"lazy": compiled(lazy, state), "full": compiled(full, tuple(state[:5]))}


def timing(samples: Sequence[float], parameter_bytes: int) -> Timing:
    """Summary of seconds per step."""
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper, min(samples), parameter_bytes / median)


def memory_copies(text: str, held: Held) -> list[str]:
    """Instructions of the main computation of a compiled program that copy a whole level's memory or keys."""
    shapes = {",".join(map(str, leaf.shape)) for levels in held[3:5] for leaf in levels}
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* copy\(", entry(text), re.MULTILINE)
    return [name for name, shape in found if shape in shapes]


def entry(text: str) -> str:
    """The main computation of a compiled program's text."""
    start = text.index("\nENTRY ")
    return text[start : text.index("\n}", start)]


def owners(text: str) -> dict[str, str]:
    """Part of every instruction of the main computation: by its name scope, or by the weights that it takes, or as what it takes."""
    parts: dict[str, str] = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", entry(text), re.MULTILINE):
        call, _, metadata = rest.partition("metadata=")
        scopes = re.split("[/\"]", metadata)
        weights = [part for part in PARTS if f"params____{part}____" in call]
        taken = [parts.get(operand, REST) for operand in re.findall(r"%([\w.-]+)", call)]
        parts[name] = next((part for part in (*(part for part in PARTS if part in scopes), *weights, *taken) if part != REST), REST)
    return parts


def operation_times(call: Callable[[], Any], text: str, steps: int) -> list[tuple[str, str, float]]:
    """(operation, part, seconds per step) of the main computation, longest first, while `call` runs the program `steps` times.

    The time is the median over the steps. Operations may run side by side, so that their sum is not the time of a step.
    """
    parts = owners(text)
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for event in (event for line in plane.lines for event in line.events if event.name in parts):
                    seconds[event.name].append(event.duration_ns * 1e-9)
    rows = [(name, parts[name], statistics.median(values) * len(values) / steps) for name, values in seconds.items()]
    return sorted(rows, key=lambda row: -row[2])


def by_part(operations: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Seconds per step of every part."""
    return {part: sum(seconds for _, owner, seconds in operations if owner == part) for part in (*PARTS, REST)}


def table(result: Result) -> str:
    """The result as text."""
    rows = "no batch axis" if result.batch is None else f"batch {result.batch}"
    lines = [f"WaveCore {result.tier}, {rows}, one step in JAX; {result.rounds} samples of {result.steps} steps, in turns", ""]
    lines.append(f"{'':12}{'median us':>10}{'quartiles us':>18}{'shortest us':>13}{'weights GB/s':>14}{'copies of memory':>18}")
    for name, found in result.timings.items():
        quartiles = f"{found.lower_quartile * 1e6:.0f} to {found.upper_quartile * 1e6:.0f}"
        lines.append(
            f"{name:12}{found.median * 1e6:10.0f}{quartiles:>18}{found.shortest * 1e6:13.0f}{found.parameter_bytes_per_second / 1e9:14.1f}"
            f"{len(result.memory_copies[name]):18d}")
    weights, memory = result.parameter_bytes / 1e6, result.memory_bytes / 1e6
    lines += ["", f"full / lazy = {result.ratio:.3f}; {weights:.1f} MB of weights, {memory:.2f} MB of memory", ""]
    lines.append(f"{'us in XLA':12}" + "".join(f"{name:>10}" for name in result.profile))
    for part in (*PARTS, REST):
        lines.append(f"{part:12}" + "".join(f"{profile[part] * 1e6:10.1f}" for profile in result.profile.values()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.tasks.core_step", description="Time of one step of WaveCore in JAX.")
    parser.add_argument("--tier", choices=list(TIER_SIZES), default="v3.0")
    parser.add_argument("--batch", type=int, default=1, help="0: no batch axis")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10, help="steps in each sample")
    parser.add_argument("--output", type=Path, default=None, metavar="FOLDER", help="default: runs/core_step-TIME")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 2 or chosen.steps < 1 or chosen.batch < 0:
        parser.error(f"needs --rounds of at least 2, --steps of 1, --batch of 0, found {chosen.rounds}, {chosen.steps}, {chosen.batch}")
    result = run(chosen.tier, chosen.batch or None, chosen.rounds, chosen.steps)
    folder = chosen.output or Path("runs") / time.strftime("core_step-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"core_step": dataclasses.asdict(result)}, indent=2) + "\n")
    print(table(result))
    print(f"\n{folder / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
