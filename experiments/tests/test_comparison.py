"""The comparison: four models in three steps each, stopped and gone on with, its table, its pilots, and what it refuses."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TrainConfig
from experiments import cli, comparison, comparison_measure, comparison_speed, comparison_table, trackers, train
from experiments.errors import RunError
from experiments.tests.test_train import SHORT

SIZES = "model.dim=12 model.depth=1"
MODELS = {
    "grounded_mamba_tiny": f"{SIZES} model.ssm_dim=5 model.rwkv_heads=3 model.memory_size=7 model.memory_writes=3 model.retrieval_heads=2",
    "deltanet_lm_tiny": f"{SIZES} model.heads=3 model.ffn_dim=11", "transformer_tiny": f"{SIZES} model.heads=3 model.ffn_dim=11 model.window=9",
    "gru_tiny": SIZES,
}


class Recorder(trackers.Tracker):
    """Keeps what it is given."""

    made: list[tuple[str, str | None]]
    tables: list[tuple[str, list[str], list[list[Any]]]]
    images: list[Path]
    summaries: list[dict[str, Any]]

    def table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self.tables.append((name, list(columns), list(rows)))

    def image(self, name: str, path: Path, step: int) -> None:
        self.images.append(path)

    def summary(self, values: Any) -> None:
        self.summaries.append(dict(values))


def settings(text: Path, *overrides: str) -> TrainConfig:
    short = [item for item in SHORT if not item.startswith("model.")]
    models = ",".join(f'"{label} {fields}"' for label, fields in MODELS.items())
    return cli.validate(cli.composed([
        "experiment=compare", f"data.path={text}", "data.validation_fraction=0.3", "tracker=none", "long_context=false", *short,
        f"comparison.models=[{models}]", "comparison.seeds=[0,1]", "comparison.pilot_rates=[0.01]", "comparison.generated_tokens=3",
        "comparison.memory_tokens=61", "comparison.puzzles=8", "comparison.puzzle_steps=2", "comparison.puzzle_batch=3", *overrides,
    ]))


@pytest.mark.usefixtures("drawn")
def test_four_models_are_compared_and_a_stopped_comparison_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after the fifth run was trained, before it was measured: nothing that is there is trained or measured again."""
    config, trained, measured = settings(text, "optimiser.rate=0.3"), [], []
    original, measure, streaming = train.run, comparison.measure, comparison_measure.streaming

    def here(model: Path, config: TrainConfig) -> dict[str, float]:
        """One process of its own is enough to see that it works."""
        if config.architecture == "gru":
            return streaming(model, config)
        return comparison_measure.stream(comparison_measure._load(model, config), config.comparison.memory_tokens, config.evaluation.chunk)

    monkeypatch.setattr(comparison_measure, "streaming", here)
    monkeypatch.setattr(comparison_speed, "take_turns", functools.partial(comparison_speed.take_turns, rounds=3))

    def run(config: TrainConfig, folder: Path, *, group: str | None = None) -> dict[str, Any]:
        trained.append((folder.name, group))
        return original(config, folder, group=group)

    def stop(model: Path, config: TrainConfig, *, memory: bool) -> dict[str, Any]:
        measured.append((config.architecture, config.seed))
        if len(measured) == 5:
            raise KeyboardInterrupt
        return measure(model, config, memory=memory)

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(comparison, "measure", stop)
    folder = tmp_path / "compare"
    with pytest.raises(KeyboardInterrupt):
        comparison.run(config, folder)
    assert not (folder / "comparison.json").exists()
    names = [f"{label}-seed{seed}" for label in MODELS for seed in (0, 1)]
    assert trained == [(name, "compare") for name in names[:5]]
    first = (folder / names[0] / "measured.json").read_bytes()
    Recorder.made, Recorder.tables, Recorder.images, Recorder.summaries = [], [], [], []

    def make(tracker: Any, run_dir: Path, **options: Any) -> trackers.Tracker:
        Recorder.made.append((options["name"], options["group"]))
        return Recorder() if options["name"] == "compare-table" else trackers.Tracker()

    monkeypatch.setattr(trackers, "make", make)
    results = comparison.run(config, folder)
    assert json.loads((folder / "speeds.json").read_text())["seeds"].keys() == {"0", "1"}
    assert trained == [(name, "compare") for name in names] and len(measured) == 9 and measured[4] == measured[5] == ("transformer", 0)
    assert (folder / names[0] / "measured.json").read_bytes() == first
    assert Recorder.made == [(name, "compare") for name in names[5:]] + [("compare-table", "compare")]
    assert [(result["label"], result["seed"], result["backend"]) for result in results] == [
        (label, seed, "torch_compiled" if label in ("grounded_mamba_tiny", "deltanet_lm_tiny") else "torch") for label in MODELS for seed in (0, 1)
    ]
    for result in results:
        assert result["rate"] == 0.01 and result["steps"] == 3 and 5 < result["validation_bits_per_byte"] < 9
        assert result["architecture"] in result["label"]
        assert result["training_tokens_per_second"] > 0 and result["generated_tokens_per_second"] > 0
        assert all(result[task]["sequences"] == 8 and 0 <= result[task]["accuracy"] <= 1 for task in ("induction", "recall", "recall_trained"))
        assert ("memory_megabytes" in result) == (result["seed"] == 0)
    carried = {result["label"]: result["state_kilobytes"] * 1024 for result in results if result["seed"] == 0}
    assert carried == {  # float32 of one block
        "grounded_mamba_tiny": 4 * (5 + 3 * 4 * 4), "deltanet_lm_tiny": 4 * (3 * 3 * 12 + 3 * 4 * 4), "transformer_tiny": 4 * (2 * 9 * 12 + 1),
        "gru_tiny": 4 * 12,
    }
    held = json.loads((folder / "comparison.json").read_text())
    bits = [result["validation_bits_per_byte"] for result in results if result["label"] == "gru_tiny"]
    row = held["table"]["gru_tiny"]["validation_bits_per_byte"]
    assert row["values"] == bits and row["mean"] == pytest.approx(sum(bits) / 2)
    assert row["standard_deviation"] == pytest.approx(abs(bits[0] - bits[1]) / math.sqrt(2)) and row["standard_deviation"] > 0
    assert held["settings"]["tokens"] == 3 * 3 * 17 and held["settings"]["chances"] == {"induction": 0.125, "recall": 0.125}
    assert len(held["runs"]) == 8
    page = (folder / "comparison.md").read_text()
    assert all(f"| {label} | " in page for label in MODELS) and f"{sum(bits) / 2:.3f} ± {abs(bits[0] - bits[1]) / math.sqrt(2):.3f}" in page
    largest = max(result[task]["error"] for result in results for task in ("induction", "recall", "induction_trained", "recall_trained"))
    assert f"induction 12.5 %, recall 12.5 %; the standard error of one run is at most {100 * largest:.1f} %" in page
    assert "seeds 0, 1" in page and "2 further steps" in page
    assert (folder / "comparison.svg").stat().st_size and Recorder.images == [folder / "comparison.png"]
    (name, columns, rows), = Recorder.tables
    assert (name, len(rows)) == ("comparison/runs", 8) and len(columns) == len(rows[0]) and rows[0][:2] == ["grounded_mamba_tiny", 0]
    assert Recorder.summaries[0]["gru_tiny/validation_bits_per_byte"] == row["mean"]
    assert not list(folder.rglob(".writing-*")) and "Comparison: mean" in capsys.readouterr().out

    asked: list[set[str]] = []
    monkeypatch.setattr(comparison_speed, "speeds", lambda models: asked.append(set(models)) or {label: {"x": 1.0} for label in models})
    comparison._add_speeds(results, config, folder)
    assert not asked  # speeds that are there are not measured again, others of another setting are
    comparison._add_speeds(results, replace(config, comparison=replace(config.comparison, generated_tokens=5)), folder)
    assert asked == [set(MODELS)] * 2 and results[0]["x"] == 1.0
    with pytest.raises(RunError, match=r"grounded_mamba_tiny-seed0 is of another configuration: optimiser\.rate was 0\.01, is 0\.3; choose another"):
        comparison.run(replace(config, comparison=replace(config.comparison, pilot_rates=[])), folder)


def test_the_pilot_takes_the_best_rate_that_stays_finite(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(text, "comparison.pilot_rates=[0.001,0.01,0.1,1.0]", "comparison.pilot_steps=7", "comparison.seeds=[4,2]")
    member = comparison.members(config)[3]
    found: dict[float, float | Exception] = {0.001: 3.0, 0.01: 2.5, 0.1: 2.7, 1.0: RunError("training: not finite at step 2")}
    seen = []

    def run(config: TrainConfig, folder: Path, *, group: str | None = None) -> dict[str, Any]:
        seen.append((config.optimiser.rate, config.training.steps, config.seed, folder.name, group, config.tracker.name))
        outcome = found[config.optimiser.rate]
        if isinstance(outcome, Exception):
            raise outcome
        return {"validation_bits_per_byte": outcome}

    monkeypatch.setattr(train, "run", run)
    assert comparison._pilot(member, tmp_path, comparison.Console(quiet=True)) == 0.01
    assert seen == [(rate, 7, 5, f"gru_tiny-rate{rate:g}", None, "none") for rate in found]
    found |= dict.fromkeys((0.001, 0.01, 0.1), RunError("training: not finite at step 1"))
    with pytest.raises(RunError, match=r"gru_tiny does not stay finite at any of 0\.001, 0\.01, 0\.1, 1$"):
        comparison._pilot(member, tmp_path, comparison.Console(quiet=True))
    found[0.01] = RunError("checkpoint: cannot write")  # not of the rate: not to be passed over
    with pytest.raises(RunError, match="cannot write"):
        comparison._pilot(member, tmp_path, comparison.Console(quiet=True))


def test_pilot_runs_are_real_runs(text: Path, tmp_path: Path) -> None:
    config = settings(text, "comparison.pilot_rates=[0.01,1e30]", "comparison.pilot_steps=2", "optimiser.warmup=0")
    assert comparison._pilot(comparison.members(config)[3], tmp_path, comparison.Console(quiet=True)) == 0.01
    assert (tmp_path / "pilot" / "gru_tiny-rate0.01" / "summary.json").is_file()


@pytest.mark.parametrize(("wanted", "names"), [
    ("torch_compiled", ["torch_compiled", "torch_compiled", "torch", "torch"]), ("jax_compiled", ["jax_compiled", "jax_compiled", "jax", "jax"]),
    ("jax", ["jax"] * 4),
])
def test_members_share_all_but_the_model(text: Path, wanted: str, names: list[str]) -> None:
    config = settings(text, f"backend={wanted}", "backend.dtype=float64", "training.context=13")
    found = comparison.members(config)
    assert [member.label for member in found] == list(MODELS) and [member.config.backend.name for member in found] == names
    for member in found:
        own = member.config
        assert (own.model.dim, own.model.depth, own.backend.dtype, own.training) == (12, 1, "float64", config.training)
        assert own.loss == replace(config.loss, state_penalty=["ssm"] if own.architecture == "grounded_mamba" else [])


def test_the_compared_models_are_of_one_size() -> None:
    from runtime.arrays import parameter_count

    config = cli.validate(cli.composed(["experiment=compare"]))
    sizes = [parameter_count(member.config.architecture, member.config.model) for member in comparison.members(config)]
    assert len(sizes) == 4 and max(sizes) / min(sizes) < 1.02 and config.comparison.seeds == [0, 1, 2]


def test_a_failed_measurement_of_memory_is_one_line(text: Path, tmp_path: Path) -> None:
    config = comparison.members(settings(text))[3].config
    with pytest.raises(RunError, match=r"measurement of memory ended with status 1: .*nothing"):
        comparison_measure.streaming(tmp_path / "nothing", config)


def test_spread_and_figure() -> None:
    one = comparison_table.Spread((0.1,))
    assert math.isnan(one.deviation) and one.text(comparison_table.COLUMNS[5]) == "10.0"
    assert comparison_table.Spread((1.0, 3.0, 2.0)).text(comparison_table.COLUMNS[0]) == "2.000 ± 1.000"
    results = [{"label": "a", "seed": seed, "induction": {"accuracy": 0.2 + seed}, "memory_megabytes": None} for seed in (0, 1)]
    assert comparison_table.number(results[0], "memory_megabytes") is None and comparison_table.number(results[0], "induction.error") is None
    assert comparison_table.spreads(results, "a").keys() == {"induction.accuracy"}
    drawn = comparison_table.figure(results, {"induction": 0.125})
    (axes,) = drawn.axes
    assert axes.get_title() == "induction, %" and [list(line.get_ydata()) for line in axes.lines] == [
        [20.0, 120.0], [70.0, 70.0], [12.5, 12.5]]
    assert not axes.collections
    for result in results:
        result["induction"]["error"] = 0.03
    (axes,) = comparison_table.figure(results, {"induction": 0.125}).axes
    (bars,) = axes.collections
    assert [list(bar[:, 1]) for bar in bars.get_segments()] == [pytest.approx([17, 23]), pytest.approx([117, 123])]
