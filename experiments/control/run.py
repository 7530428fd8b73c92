"""Train WaveCore to control: `groundwave control [environment.name=Reacher-v5 backend=jax ...]`.

Behaviour cloning, value and world model on recorded episodes of a scripted expert, with carried states and truncated backpropagation; then
the core is put into the environment: return of its policy beside those of the expert and of random actions, forecasts of its world model
beside persistence, its largest Lyapunov exponent, and pictures. The saved core is what `runtime.load_core` reads, on any backend.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import runtime
from conf.control_schema import ControlConfig
from experiments import environment, report, schedule, trackers
from experiments.control import dataset, pictures, steps, streams, summary
from experiments.control.environments import Environment, open_environment
from experiments.control.evaluation import EVALUATION_SEED, FORECAST_SEED, CorePolicy, Forecast, forecast, saturated
from experiments.control.experts import expert_for
from experiments.control.rollouts import Episodes, Random, Scripted, run_episodes
from experiments.control.stability import exponents
from experiments.control.windows import Rows, Windows
from experiments.errors import RunError
from experiments.folder import CHECKPOINTS, METRICS, checkpoint, describe, how_to_look, log, progress_bar, whole
from experiments.monitors.memory import peak_bytes
from experiments.trackers import Tracker
from runtime.build import check_backend

MODEL = "model"
CONTROL = "control.json"
SATURATED_AFTER = 100  # steps, as the specification counts


@dataclass
class Control:
    """A run, ready for its first step."""

    config: ControlConfig
    folder: Path
    environments: list[Environment]
    data: dataset.Dataset
    windows: Windows
    held_out: Rows
    step: steps.ControlStep
    before: dict[str, float] = field(default_factory=dict)  # what was measured of the untrained core
    losses: list[float] = field(default_factory=list)  # of every step

    @property
    def model(self) -> Any:
        """What `runtime.build` made."""
        return self.step.model


def check(config: ControlConfig) -> None:
    """Open the environment and find the expert and the backend. Raises RunError for what is missing or does not fit."""
    try:
        check_backend("wavecore", config.backend.name)
    except (ValueError, ImportError) as error:
        raise RunError(f"backend: {error}") from error
    opened = open_environment(config.environment.name)
    expert_for(opened.name, config.environment.expert)
    expected = "discrete" if opened.discrete else "continuous"
    if config.model.output_type != expected:
        raise RunError(f"model.output_type must be {expected!r} for the actions of {opened.name}, found {config.model.output_type!r}")
    needed = config.evaluation.warm_up + config.evaluation.horizon
    if needed > opened.max_steps:
        raise RunError(f"evaluation.warm_up + horizon must fit into an episode of {opened.name}, {opened.max_steps} steps, found {needed}")


def run(config: ControlConfig, folder: Path, *, group: str | None = None) -> dict[str, Any]:
    """Train and evaluate as configured in `folder` and return the summary that is also written there. `group`: the sweep's name, if any.

    Raises RunError for what the user can put right: environment, expert, paths, a loss that is not finite.
    """
    console, started = Console(soft_wrap=True), time.perf_counter()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"groundwave: {message}", file=sys.stderr)
        state = prepare(config, folder, console)
        described = environment.describe()
        describe(folder, config, described, _data(state))
        tracker = trackers.make(
            config.tracker, folder, settings={**dataclasses.asdict(config), "environment_described": described, "data": _data(state)},
            name=folder.name, group=group, tags=["wavecore", config.backend.name, state.environments[0].name], run_id=None,
        )
        try:
            state.before, forecast_before, _ = _measure(state)
            with open(folder / METRICS, "a", encoding="utf-8") as metrics:
                log(metrics, tracker, 0, state.before)
            seconds = _loop(state, tracker, console)
            found = _conclude(state, tracker, console, forecast_before, seconds, started)
        finally:
            tracker.finish()
            for opened in state.environments:
                opened.close()
    _how_to_look(console, state, tracker)
    return found


def prepare(config: ControlConfig, folder: Path, console: Console) -> Control:
    """Record or find the episodes and build the core. Raises RunError."""
    if (folder / MODEL).exists() or (folder / CHECKPOINTS).exists():
        raise RunError(f"run_dir: {folder} already holds a model; choose another folder")
    if config.backend.name != "jax" and config.backend.threads is not None:
        import torch

        torch.set_num_threads(config.backend.threads)
    settings = config.data
    options = dataset.Collection(
        config.environment.name, config.environment.expert, settings.training, settings.validation, config.seed, tuple(settings.noise),
        random_share=settings.random_share,
    )
    with console.status("episodes of the expert"):
        data = dataset.load(options, Path(settings.cache_dir))
    opened = [open_environment(config.environment.name) for _ in range(config.evaluation.episodes)]
    first = opened[0]
    model = runtime.build(
        "wavecore", config.model, obs_dim=first.obs_dim, action_dim=first.action_dim, output_dim=first.action_dim, backend=config.backend.name,
        dtype=config.backend.dtype, seed=config.seed,
    )
    training, held_out = (Rows(side, data.statistics, settings.discount) for side in (data.training, data.validation))
    windows = Windows(training, config.training.batch_size, config.training.context, config.seed)
    console.print(
        f"{first.name}: {len(data.training)} episodes, {data.training.steps:,} steps {'recorded' if data.collected else 'read'}, and "
        f"{len(data.validation)} held out; wavecore on {config.backend.name}, {sum(array.size for array in model.arrays().values()):,} parameters; "
        f"{folder}",
        highlight=False,
    )
    return Control(config, folder, opened, data, windows, held_out, steps.make(model, config))


def _loop(state: Control, tracker: Tracker, console: Console) -> float:
    """Train to the last step; the seconds of training, evaluation left out."""
    config, last, live = state.config, state.config.training.steps, console.is_terminal
    seconds, stride = 0.0, max(last // 20 // config.training.log_every, 1) * config.training.log_every
    with open(state.folder / METRICS, "a", encoding="utf-8") as metrics, progress_bar(console) as progress:
        bar = progress.add_task("training", total=last, figures="")
        for done in range(1, last + 1):
            started = time.perf_counter()
            rate = config.model.learning_rate * schedule.factor(done, last, config.optimiser.warmup, config.optimiser.floor)
            figures = state.step.step(streams.batch(state.windows.batch(done - 1), config, done), rate)
            seconds += time.perf_counter() - started
            _check_finite(figures, done)
            state.losses.append(float(f"{figures['loss']:.6g}"))
            values: dict[str, float] = {}
            if done % config.training.log_every == 0 or done == last:
                values = {f"train/{name}": value for name, value in figures.items()} | {"rate": rate}
                values |= {f"saturated/{name}": share for name, share in saturated(state.step.carried_states(), config.model).items()}
                values |= {"time/steps_per_second": done / seconds, "memory/peak_bytes": float(peak_bytes())}
            if done % config.evaluation.every == 0 and done < last:
                values |= _validate(state)
            if values:
                log(metrics, tracker, done, values)
            line = f"loss {figures['loss']:.4f}  action {figures['action']:.4f}  world model {figures['world_model']:.4f}"
            progress.update(bar, completed=done, figures=line)
            if not live and (done == last or done % stride == 0):
                console.print(f"step {done}/{last}  {line}", highlight=False)
            if done % config.checkpoint.every == 0 and done < last:
                checkpoint(state.folder, done, config.checkpoint.keep, partial(_save, state, step=done, after=_validate(state)))
    return seconds


def _validate(state: Control) -> dict[str, float]:
    """Mean parts of the loss over the held-out episodes, streamed window by window with carried states."""
    rows, config = state.held_out, state.config
    every, total, count, carried = np.arange(len(rows.episodes)), dict.fromkeys(steps.PARTS, 0.0), 0.0, None
    for begin in range(0, int(rows.episodes.lengths.max()), config.training.context):
        window = rows.window(every, np.full(len(every), begin), config.training.context)
        parts, carried = state.step.evaluate(streams.batch(window, config), carried)
        weight = float(window.mask.sum())
        total, count = {name: total[name] + weight * parts[name] for name in total}, count + weight
    return {f"validation/{name}": value / count for name, value in total.items()}


def _measure(state: Control) -> tuple[dict[str, float], Forecast, Episodes]:
    """Validation, the policy's episodes, forecasts and saturation of the core as it is."""
    config, policy = state.config.evaluation, CorePolicy(state.model, state.data.statistics)
    episodes = run_episodes(state.environments, policy, range(EVALUATION_SEED, EVALUATION_SEED + config.episodes))
    lanes = [open_environment(state.config.environment.name) for _ in range(config.starts)]
    foreseen = forecast(state.model, state.data.statistics, lanes, range(FORECAST_SEED, FORECAST_SEED + config.starts), config)
    for lane in lanes:
        lane.close()
    values = _validate(state) | {"return": float(episodes.returns.mean())}
    values |= {f"forecast/{name}": value for name, value in foreseen.figures.items()}
    return values | {f"saturated/{name}": share for name, share in policy.saturation(SATURATED_AFTER).items()}, foreseen, episodes


def _conclude(
    state: Control, tracker: Tracker, console: Console, forecast_before: Forecast, seconds: float, started: float
) -> dict[str, Any]:
    """Final measurements, the saved core, pictures, tables and summary."""
    config, last, before = state.config, state.config.training.steps, state.before
    with console.status("evaluation"):
        after, foreseen, episodes = _measure(state)
        if config.evaluation.lyapunov_steps:
            after |= exponents(state.model, state.data.statistics, episodes, config)
        others = {
            name: float(run_episodes(state.environments, policy, range(EVALUATION_SEED, EVALUATION_SEED + config.evaluation.episodes)).returns.mean())
            for name, policy in (("expert", Scripted(expert_for(state.environments[0].name, config.environment.expert))),
                                 ("random", Random(state.environments[0], config.seed)))
        }
    way = others["expert"] - others["random"]
    found: dict[str, Any] = {
        "environment": state.environments[0].name, "backend": config.backend.name, "steps": last, "training_seconds": seconds,
        "returns": {
            **others, "untrained": before["return"], "policy": after["return"], "episodes": config.evaluation.episodes,
            "fraction": (after["return"] - others["random"]) / way if way else math.nan,
        },
        "horizon": config.evaluation.horizon, "before": before, "after": after, "peak_megabytes": peak_bytes() / 2**20,
    }
    final = {f"final/{name}": value for name, value in after.items()} | {"final/fraction": found["returns"]["fraction"]}
    with open(state.folder / METRICS, "a", encoding="utf-8") as metrics:
        log(metrics, tracker, last, final | {name: value for name, value in after.items() if name.startswith("validation/")})
    whole(state.folder / MODEL, partial(_save, state, step=last, after=after))
    for name, path in _pictures(state, forecast_before, foreseen).items():
        tracker.image(name, path, last)
    tracker.table("returns", ["policy", "return"], [[name, found["returns"][name]] for name in ("random", "untrained", "policy", "expert")], last)
    found["seconds"] = time.perf_counter() - started
    summary.show(console, found)
    tracker.summary(final | {"training_seconds": seconds})
    if config.tracker.artifacts != "none":
        tracker.artifact(f"wavecore-{state.folder.name}", state.folder / MODEL, "model", {"step": last, "backend": config.backend.name})
    (state.folder / "summary.json").write_text(json.dumps(report.finite(found), indent=1) + "\n", encoding="utf-8")
    return found


def _pictures(state: Control, before: Forecast, after: Forecast) -> dict[str, Path]:
    """Figures and a rendered episode in the run's folder, by their names in the tracker. What cannot be drawn is said in one line."""
    folder, config = state.folder, state.config
    drawn = {
        "train/curve": report.save(summary.curves(report.read_metrics(folder / METRICS)), folder / "curve"),
        "forecast/horizons": report.save(summary.forecasts(before, after), folder / "forecast"),
    }
    policy = CorePolicy(state.model, state.data.statistics, record=True)
    seed = EVALUATION_SEED
    if config.evaluation.pictures:
        written = pictures.render_episode(folder, config.environment.name, policy, seed)
        drawn |= {f"episode/{kind}": path for kind, path in written.items() if kind == "strip"}  # of a GIF W&B keeps the first picture
    if not policy.thoughts:  # nothing could be drawn, or should be
        run_episodes(state.environments[:1], policy, [seed])
    seconds, thoughts = state.environments[0].seconds, policy.thoughts
    series = {name: np.stack([thought[name] for thought in thoughts]) for name in ("s", "w", "p")}
    levels = [np.stack(level) for level in zip(*(thought["attention"] for thought in thoughts), strict=True)]
    drawn["states"] = report.save(pictures.states_figure(series, config.model.state_saturation_limit, seconds), folder / "states")
    drawn["attention"] = report.save(pictures.attention_figure(levels, seconds), folder / "attention")
    return drawn


def _save(state: Control, target: Path, *, step: int, after: dict[str, float]) -> None:
    """The core with its manifest and proof of learning, and what it takes to use it in its environment."""
    losses = {name: {part: values[f"validation/{part}"] for part in steps.PARTS} for name, values in (("before", state.before), ("after", after))}
    runtime.save_core(
        state.model, target, training={"steps": step, "final_loss": state.losses[-1], "text_samples": 0},
        proof={
            "loss_before": losses["before"]["loss"], "loss_after": losses["after"]["loss"], "curve": state.losses, "validation": losses,
            "data": _data(state), "seed": state.config.seed,
        },
    )
    statistics = {item.name: getattr(state.data.statistics, item.name).tolist() for item in dataclasses.fields(state.data.statistics)}
    described = {"environment": state.environments[0].name, "statistics": statistics}
    (target / CONTROL).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _check_finite(figures: dict[str, float], step: int) -> None:
    wrong = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise RunError(f"training: not finite at step {step}: {', '.join(wrong)}; lower model.learning_rate or raise optimiser.warmup")


def _data(state: Control) -> dict[str, Any]:
    training, held_out = state.data.training, state.data.validation
    return {
        "name": state.data.folder.name, "environment": state.environments[0].name, "versions": state.environments[0].versions,
        "training_episodes": len(training), "training_steps": training.steps, "validation_episodes": len(held_out),
        "training_return": float(training.returns.mean()),
    }


def _how_to_look(console: Console, state: Control, tracker: Tracker) -> None:
    folder = state.folder
    places = [
        ("curves", f"{folder / 'curve.svg'}, {folder / 'forecast.svg'}"),
        *([("an episode", f"{folder / 'episode.gif'}, {folder / 'episode.png'}")] if (folder / "episode.gif").exists() else []),
        ("its thoughts", f"{folder / 'states.png'}, {folder / 'attention.png'}"), ("numbers", f"{folder / METRICS}, {folder / 'summary.json'}"),
        ("the core", f"runtime.load_core('{folder / MODEL}', backend='{state.config.backend.name}')"),
    ]
    how_to_look(console, tracker, places)
