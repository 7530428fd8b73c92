"""Train a language model: `python -m experiments.train [model.dim=96 backend=jax ...]`.

A plain loop, the same for every framework: batch, learning rates, step; now and then statistics, validation and a checkpoint.
At the end, validation bits per byte beside those of a trigram fitted on the same bytes, a sample, curves, and where all of it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from conf.schema import TrackerConfig, TrainConfig
from experiments import checkpoint, distributed, page, report, schedule, session, settings, trackers
from experiments.data import batches
from experiments.data.tokens import END
from experiments.errors import RunError
from experiments.evaluation import Validation, seen_symbols, trigram_bits_per_byte, validate
from experiments.events import EVENTS
from experiments.folder import METRICS, how_to_look, log, progress_bar, whole_file
from experiments.lock import RunLock
from experiments.monitors import context_shift
from experiments.monitors.memory import peak_bytes
from experiments.ngram import Trigram
from experiments.opened import keep
from experiments.oversight import Oversight
from experiments.profiling import Profiler
from experiments.session import Session
from experiments.steps.base import StepResult
from experiments.tasks import long_context
from experiments.tasks import validate as validation
from experiments.trackers import Tracker


def run(config: TrainConfig, folder: Path, *, group: str | None = None) -> dict[str, Any]:
    """Train as configured in `folder` and return the summary that is also written there. `group`: the sweep's name, if any.

    Raises RunError for what the user can put right: paths, data, a checkpoint of another configuration, a folder in which another run is
    at work, losses that recovery could not cure.
    """
    processes = distributed.join(config)
    console = Console(soft_wrap=True, quiet=not processes.main)
    said: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if processes.main:
            print(f"groundwave: {message}", file=sys.stderr)
        if issubclass(category, RuntimeWarning):
            said.append(str(message))

    with processes.watched(), warnings.catch_warnings(), _locked(processes, folder) as lock:
        warnings.showwarning = show
        state = session.prepare(config, folder)
        if config.long_context:
            with processes.alike():
                long_context.fitting(state.held_out, config.evaluation.lengths)
        tracker = trackers.make(
            config.tracker if processes.main else TrackerConfig(name="none"), folder,
            settings={**dataclasses.asdict(config), "environment": state.environment, "data_sha256": state.data["sha256"]},
            name=folder.name, group=group, tags=[config.architecture, config.backend.name], run_id=state.tracker_id,
        )
        try:
            console.print(
                f"{config.architecture}, {state.parameters():,} parameters, {config.backend.name} {config.backend.dtype}; "
                f"{state.stream.tokens:,} training and {len(state.held_out):,} held-out tokens; {folder}", highlight=False,
            )
            settings.show(console, config)
            tracker.log({"data/training_tokens": state.stream.tokens, "data/held_out_tokens": len(state.held_out)}, state.start)
            oversight = Oversight(state, tracker, console, said)
            if lock.stale:
                oversight.events.add(state.start, "lock", lock.stale, counted=False)
            seconds = _loop(state, oversight, tracker, console)
            with processes.alike():
                oversight.ending.check()
            session.alone(state)
            summary = processes.share(lambda: _conclude(state, oversight, tracker, console, seconds))
            oversight.hear(oversight.ending.last)
        finally:
            tracker.finish()
    if processes.main:
        _how_to_look(console, state, tracker)
    return summary


@contextmanager
def _locked(processes: distributed.Group, folder: Path) -> Iterator[RunLock]:
    """The folder's lock, which process 0 holds for all of its group."""
    lock = RunLock(folder)
    try:
        processes.share(lambda: lock.acquire() and None)
        yield lock
    finally:
        lock.release()


def _loop(state: Session, oversight: Oversight, tracker: Tracker, console: Console) -> float:
    """Train to the last step; the seconds of training, those before a resume included."""
    config, last = state.config, oversight.ending.last
    settings = config.evaluation
    with state.group.alike():  # those of the end as well: what is wrong with them is said before the first step
        lanes, _ = (batches.lanes(state.held_out, tokens, settings.batch_size) for tokens in (settings.tokens, settings.final_tokens))
    seconds, saved = state.seconds, None
    live, profiler = console.is_terminal, Profiler(config, state.folder, console, state.start, state.group.main)
    stride = max(last // 20 // config.training.log_every, 1) * config.training.log_every  # some twenty lines where there is no bar
    place = state.folder / METRICS if state.group.main else os.devnull
    with open(place, "a", encoding="utf-8") as metrics, progress_bar(console) as progress:
        bar = progress.add_task("training", total=last, completed=state.start, figures="")
        window_tokens, window_seconds = 0, 0.0
        for done in range(state.start + 1, last + 1):
            details = done % config.training.monitor_every == 0
            rates = schedule.rates(done, config.training.steps, config.optimiser)
            with profiler.around(done), state.group.alike():
                started = time.perf_counter()
                result, rates = oversight.step(state.stream.batch(done - 1), rates, done, details=details)
                elapsed = time.perf_counter() - started
            seconds, window_seconds, window_tokens = seconds + elapsed, window_seconds + elapsed, window_tokens + _tokens(config)
            logged = done % config.training.log_every == 0 or done == last
            values: dict[str, float] = _figures(result, rates) if logged or details else {}
            if logged:
                values |= {"time/tokens_per_second": window_tokens / window_seconds, "memory/peak_bytes": float(peak_bytes())}
                window_tokens, window_seconds = 0, 0.0
            if details:
                values |= oversight.look(result, done)
            if done % config.evaluation.every == 0 and done < last:
                measured = _validate(state, lanes)
                found = state.group.share(lambda measured=measured: measured)  # what is decided by it is the same everywhere
                values |= _validation(found)
                oversight.validated(done, found.bits_per_byte)
                values |= oversight.drift(done)
                oversight.golden(done, seconds, found.bits_per_byte)
            last = oversight.ending.last
            if values:
                log(metrics, tracker, done, values)
            if logged:
                speed = f"{values['time/tokens_per_second']:.0f} tokens/s"
                figures = f"loss {result.losses['loss']:.3f}  {values['train/bits_per_token']:.3f} bits  {speed}"
                progress.update(bar, figures=figures)
                if not live and ("validation/bits_per_byte" in values or done == last or done % stride == 0):
                    held = f"  validation {values['validation/bits_per_byte']:.3f} bits/byte" if "validation/bits_per_byte" in values else ""
                    console.print(f"step {done}/{last}  {figures}{held}", highlight=False)
            progress.update(bar, completed=done)
            if done == last:
                oversight.settle(done, lanes[:, : config.training.context + 1])
            if done % config.checkpoint.every == 0 or done == last:
                saved = oversight.save(done, seconds, last=done == last) or saved
                if saved and config.tracker.artifacts == "all" and done < last:
                    _artifact(tracker, state, saved, done)
            if done == last:
                break
    if saved and config.tracker.artifacts != "none":
        _artifact(tracker, state, saved, last)
    return seconds


def _conclude(state: Session, oversight: Oversight, tracker: Tracker, console: Console, seconds: float) -> dict[str, Any]:
    """Final validation, trigram, long context, sample, pictures and summary."""
    config, folder, last = state.config, state.folder, oversight.ending.last
    peak = peak_bytes()
    lanes = batches.lanes(state.held_out, config.evaluation.final_tokens, config.evaluation.batch_size)
    final = _validate(state, lanes)
    if not math.isfinite(final.bits_per_byte):
        raise RunError(f"training: the model at the end gives {final.bits_per_byte} bits per byte on held-out text; lower optimiser.rate")
    drifted = oversight.drift(last)
    # The golden checkpoint is chosen by one measure: validation over as many tokens as during training.
    same = config.evaluation.tokens == config.evaluation.final_tokens
    during = final if same else _validate(state, batches.lanes(state.held_out, config.evaluation.tokens, config.evaluation.batch_size))
    oversight.golden(last, seconds, during.bits_per_byte)
    seen = seen_symbols(state.stream.seen(last), state.tokenizer)
    baseline = trigram_bits_per_byte(Trigram.fit(seen), lanes, state.tokenizer)
    summary: dict[str, Any] = {
        "steps": last,
        "parameters": state.parameters(),
        "bytes_seen": sum(int((run < 256).sum()) for run in seen),
        "validation_bits_per_byte": final.bits_per_byte,
        "trigram_bits_per_byte": baseline,
        "validation_perplexity": final.perplexity,
        "validation_bytes": final.bytes,
        "training_seconds": seconds,
        "tokens_per_second": last * _tokens(config) / max(seconds, 1e-9),
        "peak_megabytes": peak / 2**20,
        **oversight.summary(),
    }
    values = {"final/bits_per_byte": final.bits_per_byte, "final/perplexity": final.perplexity, "final/trigram_bits_per_byte": baseline}
    with open(folder / METRICS, "a", encoding="utf-8") as metrics:
        log(metrics, tracker, last, values | drifted)
    if config.long_context:
        rows = long_context.run(state.step, state.held_out, config.evaluation.lengths, config.evaluation.chunk, config.evaluation.streams)
        summary["long_context"] = [dataclasses.asdict(row) for row in rows]
        report.print_long_context(console, rows)
        tracker.table("long_context/table", rows[0].columns(), [row.values() for row in rows], last)
        tracker.image("long_context/plot", report.save(report.long_context_figure(rows), folder / "long_context"), last)
        if config.evaluation.puzzles:
            summary |= _examine(state, lanes, final, tracker, console, last)
    if config.evaluation.sample_tokens:
        text = _sample(state)
        (folder / "sample.txt").write_text(text, encoding="utf-8")
        tracker.text("sample", text, last)
        console.rule("sample")
        console.print(text, markup=False, highlight=False)
        console.rule()
    figure = report.loss_figure(report.read_metrics(folder / METRICS), baseline)
    tracker.image("train/curve", report.save(figure, folder / "curve"), last)
    report.print_summary(console, summary)
    # The last step's numbers are in the summary of W&B already, under the names of its curves.
    tracker.summary({name: value for name, value in summary.items() if not isinstance(value, list)})
    (folder / "summary.json").write_text(json.dumps(report.finite(summary), indent=1) + "\n", encoding="utf-8")
    made = page.page([page.read(folder)])
    try:
        whole_file(folder / page.PAGE, made)
    except RunError as error:
        warnings.warn(f"the run's page: {error}", RuntimeWarning, stacklevel=2)
    tracker.html("report", made, last)
    return summary


def _examine(state: Session, lanes: np.ndarray, final: Validation, tracker: Tracker, console: Console, last: int) -> dict[str, float]:
    """What the states are good for, and the tasks of reasoning: a table, and the numbers for the summary."""
    config = state.config
    found = validation.run(
        state.step, lanes, state.held_out, state.tokenizer, config.training.context, config.evaluation.puzzles, config.monitors, measured=final
    )
    report.print_validation(console, found.rows())
    tracker.table("validate/table", ["measure", "figures", "says"], [list(row) for row in found.rows()], last)
    keep(state.folder, "validate", {"rows": [list(row) for row in found.rows()], "validate": dataclasses.asdict(found)})
    return found.statistics()


def _sample(state: Session) -> str:
    settings = state.config.evaluation
    prompt = np.concatenate([[END], state.tokenizer.encode(settings.sample_prompt)]).astype(np.int64)[None]
    model, seed = state.step.model, state.config.seed
    if settings.context_shift is None:
        ids = model.generate(prompt, settings.sample_tokens, temperature=settings.temperature, top_k=settings.top_k, seed=seed)
    else:
        ids, _ = context_shift.generate(
            model, prompt, settings.sample_tokens, settings.temperature, settings.top_k, seed, threshold=settings.context_shift
        )
    return state.tokenizer.decode(np.asarray(ids)[0].tolist())


def _tokens(config: TrainConfig) -> int:
    return config.training.batch_size * config.training.context


def _figures(result: StepResult, rates: Mapping[str, float]) -> dict[str, float]:
    return (
        {f"train/{name}": value for name, value in result.losses.items()}
        | {"train/bits_per_token": result.losses["cross_entropy"] / math.log(2), "gradient/norm": result.gradient_norm}
        | {f"rate/{group}": value for group, value in rates.items()}
        | {f"gate/{layer}": float(value) for layer, value in enumerate(result.gate)}
    )


def _validate(state: Session, lanes: np.ndarray) -> Validation:
    found = validate(state.step, lanes, state.tokenizer, state.config.training.context, state.config.evaluation.context_shift)
    return state.group.share(lambda: found)  # what is decided by it is decided alike


def _validation(found: Validation) -> dict[str, float]:
    return {"validation/bits_per_byte": found.bits_per_byte, "validation/perplexity": found.perplexity, "validation/resets": float(found.resets)}


def _artifact(tracker: Tracker, state: Session, saved: Path, step: int) -> None:
    tracker.artifact(f"{state.config.architecture}-{state.folder.name}", saved, "checkpoint", {"step": step, "backend": state.config.backend.name})


def _how_to_look(console: Console, state: Session, tracker: Tracker) -> None:
    folder = state.folder
    places = [
        ("report", f"{folder / page.PAGE}"), ("numbers", f"{folder / METRICS}, {folder / EVENTS}, {folder / 'summary.json'}"),
        ("checkpoints", f"{folder / checkpoint.FOLDER}, the best one in {folder / checkpoint.GOLDEN}"),
        ("the model", f"runtime.load('{_newest(folder)}/model', backend='{state.config.backend.name}')"),
    ]
    how_to_look(console, tracker, places)


def _newest(folder: Path) -> Path:
    return max((folder / checkpoint.FOLDER).glob("step-*"), default=folder)


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
