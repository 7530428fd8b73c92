"""Distil LAM from a BERT-like encoder: `python -m experiments.distil [data.sentences=FILE evaluation.sts=CSV ...]`.

The student has the teacher's embeddings, feed-forwards and norms and random DeltaNet layers, and learns the teacher's hidden states after
every layer and its sentence embeddings, on sentences and on passages of several chunks. The teacher runs once over every text.
A checkpoint is a saved LAM, without the state of the optimiser: a run that was stopped starts again from its beginning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import runtime
from conf.distil_schema import DistilConfig
from experiments import environment, report, trackers
from experiments.distillation import batches, cache, summary, texts
from experiments.distillation.loss import Figures, Student
from experiments.distillation.teacher import Embed, Teacher, embeddings, locate, padded
from experiments.errors import RunError
from experiments.folder import CHECKPOINTS, METRICS, checkpoint, describe, how_to_look, log, progress_bar
from experiments.monitors.memory import peak_bytes
from experiments.tasks import sts
from experiments.trackers import Tracker

MODEL = "model"
Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass
class Distillation:
    """A run, ready for its first step. `plan` holds the texts of every step; `groups` the batches of held-out sentences and passages."""

    config: DistilConfig
    folder: Path
    teacher: Teacher
    lam: Any  # runtime.LAM on torch, whose module `student` trains
    student: Student
    texts: texts.Texts
    outputs: cache.Outputs
    plan: list[np.ndarray]
    groups: dict[str, list[np.ndarray]]
    pairs: sts.Pairs | None

    @property
    def last_step(self) -> int:
        """Number of the step after which the run ends."""
        return min(len(self.plan), self.config.training.stop_at or len(self.plan))

    def batch(self, chosen: np.ndarray) -> Batch:
        """ids, mask, and the teacher's hidden states and embeddings, of the chosen texts."""
        ids, mask = padded([self.outputs.ids[i] for i in chosen], self.teacher.padding)
        return ids, mask, self.outputs.rows(chosen), np.asarray(self.outputs.embeddings[chosen])

    def embeddings(self, embed: Embed, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings (n, D) that `embed` gives for rows of token ids."""
        return embeddings(embed, rows, self.teacher.padding, self.config.evaluation.batch_size)

    def sts(self, embed: Embed) -> sts.Scores:
        """Correlations on the pairs of `evaluation.sts`."""
        if self.pairs is None:
            raise ValueError("evaluation.sts names no file, so there are no pairs")
        return sts.evaluate(lambda sentences: self.embeddings(embed, self.teacher.ids(sentences)), self.pairs)


def run(config: DistilConfig, folder: Path, *, group: str | None = None) -> dict[str, Any]:
    """Distil as configured in `folder` and return the summary that is also written there. `group`: the sweep's name, if any.

    Raises RunError for what the user can put right: the teacher, texts, paths, a loss that is not finite.
    """
    console = Console(soft_wrap=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"groundwave: {message}", file=sys.stderr)
        state = prepare(config, folder, console)
        described = environment.describe()
        describe(folder, config, described, state.texts.sources)
        tracker = trackers.make(
            config.tracker, folder, settings={**dataclasses.asdict(config), "environment": described, "data": state.texts.sources}, name=folder.name,
            group=group, tags=["lam", "distil"], run_id=None,
        )
        try:
            before = _measure(state, "untrained student")
            seconds = _loop(state, tracker, console)
            found = _conclude(state, tracker, console, before, seconds)
        finally:
            tracker.finish()
    _how_to_look(console, state, tracker)
    return found


def prepare(config: DistilConfig, folder: Path, console: Console) -> Distillation:
    """Read the teacher and the texts, compute or find the teacher's outputs, build the student. Raises RunError."""
    import torch

    if (folder / MODEL).exists() or (folder / CHECKPOINTS).exists():
        raise RunError(f"run_dir: {folder} already holds a model; choose another folder")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pairs = sts.read_pairs(Path(config.evaluation.sts), "evaluation.sts") if config.evaluation.sts else None
    teacher = Teacher(locate(config.teacher), config.teacher.max_tokens)
    gathered = texts.gather(config, teacher.counts)
    ids = teacher.ids(gathered.training + gathered.held_out)
    console.print(
        f"{len(gathered.sentences):,} sentences and {len(gathered.passages):,} passages, {sum(map(len, ids)):,} tokens with those held out; {folder}",
        highlight=False,
    )
    with progress_bar(console) as progress:
        bar = progress.add_task("teacher", total=len(ids), figures="")
        outputs = cache.outputs(
            Path(config.data.cache_dir), teacher, ids, config.training.batch_tokens, lambda done: progress.update(bar, completed=done))
    try:
        lam = runtime.LAM.from_teacher(teacher.folder, backend="torch", seed=config.seed)
    except (ValueError, OSError) as error:
        raise RunError(f"teacher: no student can be made of {teacher.folder}: {error}") from error
    student = Student(lam.model.module, config.optimiser, config.loss)
    lengths, training, sentences = outputs.lengths, len(gathered.training), len(gathered.held_sentences)
    plan = batches.plan(lengths[:training], config.training.epochs, config.training.batch_tokens, config.seed)
    parts = {"sentences": (training, training + sentences), "passages": (training + sentences, len(ids))}
    groups = {
        name: [start + chosen for chosen in batches.batches(lengths[start:stop], config.training.batch_tokens)]
        for name, (start, stop) in parts.items() if stop > start
    }
    return Distillation(config, folder, teacher, lam, student, gathered, outputs, plan, groups, pairs)


def _loop(state: Distillation, tracker: Tracker, console: Console) -> float:
    """Train to the last step; the seconds of training, evaluation left out."""
    config, last, live = state.config, state.last_step, console.is_terminal
    seconds, window, window_seconds = 0.0, 0, 0.0
    with open(state.folder / METRICS, "a", encoding="utf-8") as metrics, progress_bar(console) as progress:
        bar = progress.add_task("distilling", total=last, figures="")
        for done, chosen in enumerate(state.plan[:last], start=1):
            started = time.perf_counter()
            batch = state.batch(chosen)
            rates = state.student.rates(done, len(state.plan))
            figures = state.student.step(batch, rates)
            elapsed = time.perf_counter() - started
            seconds, window_seconds, window = seconds + elapsed, window_seconds + elapsed, window + int(batch[1].sum())
            _check(figures, done)
            values: dict[str, float] = {}
            if done % config.training.log_every == 0 or done == last:
                values = {f"train/{name}": value for name, value in dataclasses.asdict(figures).items()}
                values |= {f"rate/{name}": rate for name, rate in rates.items()}
                values |= {"time/tokens_per_second": window / window_seconds, "memory/peak_bytes": float(peak_bytes())}
                window, window_seconds = 0, 0.0
            if done % config.evaluation.every == 0 and done < last:
                values |= _measure(state, f"step {done}", console, lengths=False)
            if values:
                log(metrics, tracker, done, values)
            if "train/loss" in values:
                progress.update(bar, figures=_line(figures))
                if not live and (done == last or done % (max(last // 20 // config.training.log_every, 1) * config.training.log_every) == 0):
                    console.print(f"step {done}/{last}  {_line(figures)}  {values['time/tokens_per_second']:.0f} tokens/s", highlight=False)
            progress.update(bar, completed=done)
            if done % config.checkpoint.every == 0 and done < last:
                checkpoint(state.folder, done, config.checkpoint.keep, state.lam.save)
    return seconds


def _measure(state: Distillation, name: str, console: Console | None = None, *, lengths: bool = True) -> dict[str, float]:
    """Held-out errors and cosines of the student, correlations where there are pairs, and similarities to the teacher by length."""
    values: dict[str, float] = {}
    for kind, chosen in state.groups.items():
        found = state.student.observe(state.batch(part) for part in chosen)
        values[f"held_out/{kind}/hidden"] = float(np.mean(found["layers"]))
        values[f"held_out/{kind}/cosine"] = found["cosine"]
        values |= {f"held_out/{kind}/layer{layer}": error for layer, error in enumerate(found["layers"], start=1)}
    if state.pairs is not None:
        scores = state.sts(state.student.embed)
        values |= {"sts/spearman": scores.spearman, "sts/pearson": scores.pearson}
    if lengths:
        values |= {f"similarity/{length}": found for length, found in _similarities(state)}
    if console is not None:
        shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items() if "layer" not in key)
        console.print(f"{name}: {shown}", highlight=False)
    return values


def _similarities(state: Distillation) -> Iterator[tuple[int, float]]:
    """Mean cosine of student and teacher embeddings of held-out passages cut to each length of the configuration."""
    if not state.texts.long:
        return
    for length in state.config.evaluation.lengths:
        rows = state.teacher.ids(state.texts.long, length)
        student, teacher = (state.embeddings(embed, rows) for embed in (state.student.embed, state.teacher.embed))
        yield length, float(sts.cosines(student, teacher).mean())


def _conclude(state: Distillation, tracker: Tracker, console: Console, before: dict[str, float], seconds: float) -> dict[str, Any]:
    """Final measurements, the saved model, table, picture and summary."""
    last, peak = state.last_step, peak_bytes()
    after = _measure(state, "trained student")
    with open(state.folder / METRICS, "a", encoding="utf-8") as metrics:
        log(metrics, tracker, last, {f"final/{name}": value for name, value in after.items()})
    state.lam.save(state.folder / MODEL)
    scores: dict[str, dict[str, float]] = {}
    if state.pairs is not None:
        teacher = state.teacher
        others = {"teacher": teacher.embed, "mean of word embeddings": teacher.embed_words, "mean of embedding layer": teacher.embed_layer}
        scores = {name: dataclasses.asdict(state.sts(embed)) for name, embed in others.items()}
        for name, values in (("untrained student", before), ("trained student", after)):
            scores[name] = {"spearman": values["sts/spearman"], "pearson": values["sts/pearson"], "pairs": len(state.pairs.scores)}
    found = {
        "steps": last, "training_seconds": seconds, "tokens_per_second": _tokens(state) / max(seconds, 1e-9), "peak_megabytes": peak / 2**20,
        "teacher_sha256": state.teacher.digest, "data": state.texts.sources, "sts": scores, "before": before, "after": after,
    }
    figure = summary.figure(report.read_metrics(state.folder / METRICS), scores)
    tracker.image("train/curve", report.save(figure, state.folder / "curve"), last)
    summary.show(console, found)
    tracker.summary({f"final/{name}": value for name, value in after.items()} | {"training_seconds": seconds})
    if state.config.tracker.artifacts != "none":
        tracker.artifact(f"lam-{state.folder.name}", state.folder / MODEL, "model", {"step": last})
    (state.folder / "summary.json").write_text(json.dumps(report.finite(found), indent=1) + "\n", encoding="utf-8")
    return found


def _tokens(state: Distillation) -> int:
    return int(sum(state.outputs.lengths[chosen].sum() for chosen in state.plan[: state.last_step]))


def _check(figures: Figures, step: int) -> None:
    if not math.isfinite(figures.loss) or not math.isfinite(figures.gradient_norm):
        raise RunError(
            f"training: not finite at step {step}: loss {figures.loss}, gradient norm {figures.gradient_norm}; lower optimiser.delta_rate "
            "or raise optimiser.warmup"
        )


def _line(figures: Figures) -> str:
    return f"loss {figures.loss:.4f}  hidden {figures.hidden:.4f}  1 - cosine {figures.embedding:.4f}"


def _how_to_look(console: Console, state: Distillation, tracker: Tracker) -> None:
    folder = state.folder
    places = [
        ("curves", f"{folder / 'curve.svg'}"), ("numbers", f"{folder / METRICS}, {folder / 'summary.json'}"),
        ("the model", f"runtime.LAM.from_pretrained('{folder / MODEL}').encode([...])"),
        ("its scores", f"groundwave evaluate task=sts model={folder / MODEL} path=CSV"),
    ]
    how_to_look(console, tracker, places)


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["distil", *sys.argv[1:]]))
