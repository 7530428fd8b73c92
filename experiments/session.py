"""What a run needs before its first step: data, model, optimiser, and where it goes on if it was stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from conf.schema import TrainConfig
from experiments import checkpoint, distributed, environment
from experiments.data import batches, corpus, tokens
from experiments.errors import RunError
from experiments.folder import METRICS, describe, plain
from experiments.steps import TrainStep, make
from runtime.init import init_arrays


@dataclass
class Session:
    """A run, ready to go on after `start` steps."""

    config: TrainConfig
    folder: Path
    tokenizer: tokens.Tokenizer
    stream: batches.Stream
    held_out: np.ndarray  # (n,) tokens
    step: TrainStep
    start: int
    tracker_id: str | None
    seconds: float  # of training, before this process
    environment: dict[str, str]
    data: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)  # the description of the checkpoint that the run goes on from
    monitors: dict[str, np.ndarray] = field(default_factory=dict)  # and its monitors' arrays
    notes: list[str] = field(default_factory=list)  # checkpoints that were passed over
    group: distributed.Group = distributed.ALONE

    def parameters(self) -> int:
        """Trainable and frozen parameters, the tied head once, the memory bank left out."""
        from runtime.arrays import parameter_count

        return parameter_count(self.config.architecture, self.config.model)


def prepare(config: TrainConfig, folder: Path) -> Session:
    """Read the data, build or restore the model, and write what describes the run. Raises RunError for what the user can put right."""
    notes: list[str] = []
    group = distributed.join(config)
    group.share(lambda: group.check(config.training))
    resumed = group.share(lambda: _resumed(config, folder, notes))
    text = corpus.load(config.data)
    group.same("the text's sha256", text.sha256)
    tokenizer = group.share(lambda: tokens.tokenizer(config.data, text))
    with group.alike():
        if tokenizer.vocab_size > config.model.vocab_size:
            raise RunError(f"model.vocab_size: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}")
        training = config.training
        kind = batches.OneBatch if config.debug.overfit_batch else batches.Stream
        stream = kind(batches.encode(text.training, tokenizer), training.batch_size, training.context, config.seed)
        held_out = batches.held_out(batches.encode(text.validation, tokenizer))
    try:
        model = runtime.build(
            config.architecture, config.model, backend=config.backend.name, arrays=resumed.arrays if resumed else None,
            dtype=config.backend.dtype, seed=config.seed,
        )
    except ImportError as error:
        raise RunError(f"backend: {error}") from error
    _threads(config)
    step = make(model, config, group)
    if resumed:
        step.restore(resumed.arrays, resumed.optimiser, resumed.states, resumed.updates)
    described = environment.describe() | {"group": group.describe()}
    data = {"sha256": text.sha256, "training_tokens": stream.tokens, "held_out_tokens": len(held_out), "files": text.listing()}
    if group.main:
        describe(folder, config, described, data)
    if resumed:
        group.share(lambda: _warn(resumed, described, text.sha256))
    if group.main:
        _trim(folder / METRICS, resumed.step if resumed else 0)
    description = resumed.description if resumed else {}
    return Session(
        config, folder, tokenizer, stream, held_out, step, resumed.step if resumed else 0,
        description.get("tracker_id"), float(description.get("seconds", 0.0)), described, data, description,
        resumed.monitors if resumed else {}, notes, group,
    )


def save(session: Session, done: int, seconds: float, oversight: Mapping[str, Any], *, golden: bool = False) -> Path:
    """Write a checkpoint after `done` steps. `oversight`: what `Oversight` adds to its description, and "arrays" of the monitors."""
    stream, config, step = session.stream, session.config, session.step
    description = {
        "step": done,
        "updates": step.steps_done,
        "seed": config.seed,
        "data": {"sha256": session.data["sha256"], "epoch": done // stream.steps_per_epoch, "step_in_epoch": done % stream.steps_per_epoch},
        "config": plain(config),
        "environment": session.environment,
        "seconds": round(seconds, 3),
        **{name: value for name, value in oversight.items() if name != "arrays"},
    }
    keep = max(config.checkpoint.keep, config.recovery.good_states) if config.recovery.enabled else config.checkpoint.keep
    held = (step.optimiser_arrays(), step.carried(), step.arrays())
    return session.group.share(lambda: checkpoint.save(
        session.folder, step.model, held[0], held[1], description, keep, monitors=oversight["arrays"],
        folder=checkpoint.GOLDEN if golden else checkpoint.FOLDER, arrays=held[2],
    ))


def alone(session: Session) -> None:
    """Let process 0 go on by itself with all of the model. Every process of the group has to call it."""
    config, step, group = session.config, session.step, session.group
    if group.size == 1:
        return
    arrays, moments, carried = step.arrays(), step.optimiser_arrays(), step.carried()
    session.group = distributed.ALONE
    if not group.main:
        return
    model = runtime.build(config.architecture, config.model, backend=config.backend.name, arrays=arrays, dtype=config.backend.dtype)
    session.step = make(model, config)
    session.step.restore(arrays, moments, carried, step.steps_done)


def roll_back(session: Session, tried: Collection[int]) -> tuple[int, Mapping[str, Any]]:
    """Go back to the newest good state but for those of the steps `tried`, or to the initial one: its step and its recovery record.

    Carried states come back with it: they are some steps of the same lanes older than the text that follows, and known to be healthy.
    """
    config, step = session.config, session.step
    found = session.group.share(lambda: checkpoint.good(session.folder, tried, config.recovery.good_states))
    if found is None:
        step.restore(init_arrays(config.architecture, config.model, config.seed), {}, {}, 0)
        return 0, {}
    step.restore(found.arrays, found.optimiser, found.states, found.updates)
    return found.step, found.description["recovery"]


def _resumed(config: TrainConfig, folder: Path, notes: list[str]) -> checkpoint.Checkpoint | None:
    existing = any(path for name in (checkpoint.FOLDER, checkpoint.GOLDEN) for path in (folder / name).glob("step-*"))
    if config.resume == "none":
        if existing:
            raise RunError(f"run_dir: {folder} already holds checkpoints; add resume=auto to go on from them, or choose another folder")
        return None
    found = checkpoint.newest(folder, notes)
    if found is None:
        print(f"groundwave: no readable checkpoint in {folder}, starting from the beginning", file=sys.stderr)
        return None
    different = checkpoint.config_differences(found.description.get("config", {}), config)
    if different:
        raise RunError(f"resume: {found.path} is of another configuration: {'; '.join(different)}")
    return found


def _warn(found: checkpoint.Checkpoint, now: dict[str, str], sha256: str) -> None:
    before = found.description["data"]["sha256"]
    if before != sha256:
        raise RunError(f"resume: the text is not the one that {found.path} was trained on (sha256 {before[:12]}, now {sha256[:12]})")
    for line in environment.differences(found.description.get("environment", {}), now):
        print(f"groundwave: resumed where {line}: the run may differ in the last bits", file=sys.stderr)


def _threads(config: TrainConfig) -> None:
    if config.backend.threads is None:
        return
    import cython_ext

    cython_ext.set_num_threads(config.backend.threads)
    if config.backend.name in ("torch", "torch_compiled"):
        import torch

        torch.set_num_threads(config.backend.threads)


def _trim(path: Path, step: int) -> None:
    """Keep the lines of the metrics file up to `step`: those after it will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # cut short by the kill
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
