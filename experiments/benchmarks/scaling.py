"""Cost against the length of a text and against the number of rows: curves, each point the median of turns in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import torch

from experiments.benchmarks import lam, mamba, peers, wavecore
from experiments.benchmarks.measure import Call, take_turns
from experiments.monitors.memory import peak_bytes, reset_peak
from runtime import build

LENGTHS = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
SENTENCES = (32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
POSITIONS = 512  # of MiniLM's table
ROWS = (1, 2, 4, 8, 16, 32, 64)
FEW = dict(rounds=5, budget=15.0)


@dataclass
class Curve:
    """`series[contender]`: points (x, seconds, megabytes that the first call of this size added to the process at its peak)."""

    name: str
    title: str
    x: str
    series: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)

    def point(self, x: int, contenders: dict[str, Call]) -> None:
        """Measure all contenders at `x`."""
        added = {}
        for name, call in contenders.items():
            reset_peak()
            before = peak_bytes()
            call()
            added[name] = (peak_bytes() - before) / 2**20
        for name, timing in take_turns(contenders, **FEW).items():
            self.series.setdefault(name, []).append((x, timing.median, added[name]))

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def mamba_lengths(threads: int, lengths: Sequence[int] = LENGTHS) -> Curve:
    """A prompt of GroundedMamba: the engine gives the last token's logits, the others those of all tokens, which is what they have."""
    curve = Curve("mamba_lengths", "GroundedMamba, a prompt", "tokens")
    engine = build("grounded_mamba", mamba.CONFIG, "cython", mamba.arrays()).engine
    loop, compiled, (model, variables) = mamba.module("recurrent"), mamba.module("compiled"), mamba.functional()
    apply = jax.jit(lambda v, x: model.apply(v, x)[0][:, -1])
    for length in lengths:
        tokens = mamba.ids(1, length)
        given, array = torch.from_numpy(tokens), jnp.asarray(tokens)
        contenders: dict[str, Call] = {
            mamba.ENGINE: lambda tokens=tokens: engine.prefill(tokens), mamba.KERNELS: peers.torch_call(compiled, given),
            mamba.JAX: lambda array=array: jax.block_until_ready(apply(variables, array)),
        }
        if length <= 1_024:
            contenders[mamba.LOOP] = peers.torch_call(loop, given)
        curve.point(length, contenders)
    return curve


def lam_lengths(threads: int, lengths: Sequence[int] = SENTENCES) -> Curve:
    """One text through LAM and, as far as its positions go, through MiniLM."""
    curve = Curve("lam_lengths", "LAM-base, one text", "tokens")
    engine, eager, teacher = build("lam", lam.CONFIG, "cython", lam.arrays()), lam.module("chunked"), optional(lam.minilm)
    for length in lengths:
        tokens = lam.ids(1, length)
        contenders: dict[str, Call] = {
            lam.ENGINE: lambda tokens=tokens: engine(tokens), lam.EAGER: peers.torch_call(eager, torch.from_numpy(tokens)),
        }
        if teacher is not None and length <= POSITIONS:
            contenders[lam.MINILM] = lam.embedding(teacher, torch.from_numpy(tokens))
        curve.point(length, contenders)
    return curve


def lam_rows(threads: int, rows: Sequence[int] = ROWS) -> Curve:
    """Sentences of 32 tokens at once."""
    curve = Curve("lam_rows", "LAM-base, sentences of 32 tokens at once", "sentences")
    engine, eager, teacher = build("lam", lam.CONFIG, "cython", lam.arrays()), lam.module("chunked"), optional(lam.minilm)
    for count in rows:
        tokens = lam.ids(count, 32)
        given = torch.from_numpy(tokens)
        contenders: dict[str, Call] = {lam.ENGINE: lambda tokens=tokens: engine(tokens), lam.EAGER: peers.torch_call(eager, given)}
        if teacher is not None:
            contenders[lam.MINILM] = lam.embedding(teacher, given)
        curve.point(count, contenders)
    return curve


def wavecore_rows(threads: int, rows: Sequence[int] = ROWS) -> Curve:
    """A step of WaveCore for many robots at once."""
    curve = Curve("wavecore_rows", f"WaveCore {wavecore.TIER}, one step", "rows")
    made, eager = wavecore.core("jax"), wavecore.core("torch").module
    engines = wavecore.core("cython")
    for count in rows:
        given = wavecore.observations(None, count)
        inputs, tensors, engine = [jnp.asarray(part) for part in given], [torch.from_numpy(part) for part in given], engines.engine(count)
        lazy, held = wavecore.compile_both(made.model, made.variables, count, inputs)["lazy"], [eager.init_state(count)]

        def eager_step(held: list = held, tensors: list = tensors) -> None:
            with torch.inference_mode():
                _, held[0], _ = eager.step(held[0], *tensors)

        curve.point(count, {
            wavecore.ENGINE: lambda engine=engine, given=given: engine.step(*given),
            wavecore.LAZY: lambda lazy=lazy, inputs=inputs: lazy.run(made.variables, inputs, 1), wavecore.EAGER: eager_step,
        })
    return curve


def optional(make: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
    try:
        return make()
    except ImportError:
        return None


CASES = [mamba_lengths, lam_lengths, lam_rows, wavecore_rows]
