"""The debug configurations: one batch by heart, three steps, the profiler's table, the learning-rate finder."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conf.debug_schema import DebugConfig, RateFinderConfig
from conf.schema import TrainConfig
from experiments import cli, rate_finder, report, train
from experiments.errors import RunError
from experiments.profiling import Operator, own_time, table
from experiments.rate_finder import RESULT, by_group, diverged, ramp, read, smooth
from experiments.tests import tiny
from experiments.tests.faults import settings
from experiments.tests.test_train import smoke

SMALL = [
    "model.dim=12", "model.depth=1", "model.ssm_dim=5", "model.rwkv_heads=3", "model.memory_size=7", "model.memory_writes=3",
    "model.retrieval_heads=2", "training.batch_size=2", "training.context=13", "evaluation.tokens=210", "evaluation.final_tokens=210",
    "evaluation.batch_size=3",
]


def arguments(text: Path, debug: str, *more: str) -> list[str]:
    return [f"debug={debug}", f"data.path={text}", "data.validation_fraction=0.3", "backend=torch_compiled", "tracker=none", *SMALL, *more]


def run_of(backend: str, text: Path, **sections: Any) -> TrainConfig:
    """A short run; in JAX of a GRU, which compiles in seconds."""
    if backend == "jax":
        sections |= {"architecture": "gru", "model": replace(tiny.gru().model, depth=1), "loss": tiny.gru().loss}
    return settings(backend, text, **sections)


def test_one_batch_is_learnt_by_heart(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(text, "overfit_batch", "optimiser.rate=5e-2", "training.log_every=1", f"run_dir={tmp_path}/run")
    assert cli.main(["train", *given]) == 0
    rows = [row["train/cross_entropy"] for row in report.read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/cross_entropy" in row]
    assert rows[0] > 4 and rows[-1] < 0.05 and len(rows) < 300
    assert "learnt by heart: cross-entropy 0.0" in capsys.readouterr().out


def test_batch_that_is_not_learnt_is_a_failure(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every gradient frozen out by a rate near zero."""
    given = arguments(text, "overfit_batch", "optimiser.rate=1e-9", "training.steps=12", f"run_dir={tmp_path}/run")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *given])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("groundwave: debug.overfit_batch")]
    assert "nats per token after 12 steps, expected below debug.target=0.05" in line and not (tmp_path / "run" / "summary.json").exists()


def test_three_steps_of_the_configured_run(text: Path, tmp_path: Path) -> None:
    given = arguments(text, "three_steps", "evaluation.lengths=[40]", "evaluation.chunk=30", "evaluation.sample_tokens=3")
    config = cli.validate(cli.composed(given))
    assert (config.training.steps, config.training.last_step) == (2000, 3)
    summary = train.run(config, tmp_path)
    assert summary["steps"] == 3 and "long_context" in summary and (tmp_path / "sample.txt").exists()


@pytest.mark.parametrize("backend", ["torch_compiled", "jax"])
def test_profiler_names_what_takes_the_time(backend: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_of(backend, text, debug=DebugConfig(profile_steps=2, profile_after=1, operators=4))
    train.run(replace(config, training=replace(config.training, stop_at=4)), tmp_path)
    operators = json.loads((tmp_path / "profile" / "operators.json").read_text())
    names = [operator["name"] for operator in operators]
    seconds = [operator["seconds"] for operator in operators]
    assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) < 60
    assert len(names) == len(set(names)) > 4 and all(operator["calls"] > 0 for operator in operators)
    if backend == "jax":
        assert any("fusion" in name for name in names) and list(tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz"))
    else:
        assert {"aten::mm", "groundwave::wkv", "groundwave::wkv_backward"} <= set(names) and (tmp_path / "profile" / "trace.json").stat().st_size > 0
        assert next(operator["calls"] for operator in operators if operator["name"] == "groundwave::wkv") == 2  # one block, two steps
    shown = capsys.readouterr().out
    assert "Operators that took longest, 2 steps" in shown and names[0][:20] in shown


def test_own_time_leaves_out_what_is_inside() -> None:
    def event(name: str | None, begin: float, length: float, thread: int = 1) -> dict[str, object]:
        return {"ph": "X", "pid": 1, "tid": thread, "ts": begin, "dur": length, "args": {"hlo_op": name} if name else {}}

    events = [
        event("while.3", 0.0, 10.0), event("dot.1", 1.0, 2.0), event("dot.2", 4.0, 5.0), event("add.7", 5.0, 1.0), event("dot.1", 10.0, 3.0),
        event("while.3", 0.0, 4.0, thread=2), event(None, 0.0, 99.0), {"ph": "M", "pid": 1, "name": "process_name"},
    ]
    found = {operator.name: (operator.calls, round(operator.seconds * 1e6, 9)) for operator in own_time(events)}
    assert found == {"while": (2, 7.0), "dot": (3, 9.0), "add": (1, 1.0)}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table([Operator("dot", 3, 9e-6)], total=own_time(events), steps=1))
    assert "52.9 %" in console.export_text()  # 9 of 17


def curve(rates: np.ndarray, best: float, bad: float) -> list[float]:
    """A loss that falls around `best` and rises steeply beyond `bad`."""
    return [2.0 + 3.5 / (1 + (rate / best) ** 2) + (rate / bad) ** 2 for rate in rates.tolist()]


def test_readings_of_a_curve() -> None:
    config = RateFinderConfig(low=1e-6, high=10.0, steps=141, smoothing=0.0)
    rates = ramp(config)
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(10.0) and np.ptp(np.diff(np.log(rates))) < 1e-12
    losses = curve(rates, 1e-3, 1.0)
    end = next(number for number in range(1, len(losses) + 1) if diverged(losses[:number], config))
    found = read(rates[:end], losses[:end], config)
    # steepest in log(rate): where rate = best; divergence: half of the fall of 3.5 above the bottom, (rate / bad)^2 = 1.75
    assert found.steepest == pytest.approx(1e-3, rel=0.2) and found.diverged_at == pytest.approx(1.32, rel=0.13)
    assert found.tenth == pytest.approx(found.diverged_at / 10) and found.suggestion == pytest.approx(math.sqrt(found.steepest * found.tenth))
    early = read(rates[: end - 30], losses[: end - 30], config)
    assert early.diverged_at is None and early.tenth == pytest.approx(rates[end - 31] / 10)
    broken = [*losses[:80], math.nan]
    assert diverged(broken, config) and read(rates[:81], broken, config).diverged_at == rates[80]


def test_noise_is_neither_a_fall_nor_a_divergence() -> None:
    config = RateFinderConfig(steps=100)
    flat = (5.5 + 0.1 * np.random.default_rng(0).standard_normal(100)).tolist()
    assert not any(diverged(flat[:number], config) for number in range(1, 101))
    found = read(ramp(config), flat, config)
    assert found.steepest is None and found.diverged_at is None and found.suggestion is None
    np.testing.assert_allclose(smooth([2.0, 4.0], 0.5), [2.0, (0.25 * 2 + 0.5 * 4) / 0.75])
    with pytest.raises(RunError, match=r"rate_finder\.low: the loss is nan at the lowest rate already, found low=1e-05"):
        read(ramp(config)[:1], [math.nan], config)


@pytest.mark.parametrize("backend", ["torch_compiled", "jax"])
@pytest.mark.usefixtures("drawn")
def test_finder_on_a_model(backend: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_of(backend, text, rate_finder=RateFinderConfig(enabled=True, low=1e-4, high=100.0, steps=40))
    given: list[dict[str, float]] = []
    original = rate_finder.by_group
    monkeypatch.setattr(rate_finder, "by_group", lambda rate, optimiser: given.append(original(rate, optimiser)) or given[-1])
    result = rate_finder.run(config, tmp_path)
    written = json.loads((tmp_path / RESULT).read_text())
    assert written["suggestion"] == result["suggestion"] and 1e-4 < result["suggestion"] < result["diverged_at"] < 100.0
    assert len(written["losses"]) == len(written["rates"]) == len(given) < 40 and min(result["losses"]) < 0.8 * result["losses"][0]
    assert given[3]["ssm"] == pytest.approx(0.5 * written["rates"][3]) and by_group(1.0, config.optimiser)["other"] == 1.0
    assert (tmp_path / "rate_finder.png").stat().st_size > 0 and not list(tmp_path.glob("checkpoints*")) and not list(tmp_path.glob("golden*"))
    assert f"suggestion: optimiser.rate={result['suggestion']:.2g}" in capsys.readouterr().out


def test_finder_that_finds_nothing_says_so(text: Path, tmp_path: Path) -> None:
    config = settings("torch_compiled", text, rate_finder=RateFinderConfig(enabled=True, low=1e-12, high=1e-9, steps=12))
    with pytest.raises(RunError, match=r"rate_finder: the loss fell at no rate from 1e-12 to 1e-09"):
        rate_finder.run(config, tmp_path)
    assert json.loads((tmp_path / RESULT).read_text())["suggestion"] is None and (tmp_path / "rate_finder.png").exists()


def test_finder_is_reached_by_its_configuration(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(rate_finder, "run", lambda config, folder: calls.append(folder))
    assert cli.main(["train", *arguments(text, "find_rate"), f"output_dir={tmp_path}"]) == 0
    assert calls[0].name.endswith("-rates-torch_compiled-seed0")


def test_configuration_of_a_debug_run_is_that_of_the_schema(text: Path) -> None:
    assert smoke(text).debug == DebugConfig() and tiny.config().rate_finder == RateFinderConfig()
    assert cli.validate(cli.composed(["debug=find_rate"])).rate_finder == RateFinderConfig(enabled=True)
