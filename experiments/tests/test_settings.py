"""The configuration that a run shows at its start."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from conf.schema import TrackerConfig
from experiments import cli, settings


@pytest.mark.parametrize(
    "overrides", [[], ["model=deltanet_lm_tiny"], ["model=gru_tiny", "backend=torch"], ["model=transformer_tiny", "backend=jax"]]
)
def test_default_run_of_every_architecture_differs_in_nothing_but_what_was_chosen(overrides: list[str]) -> None:
    config = replace(cli.validate(cli.composed(overrides)), tracker=TrackerConfig())
    chosen = {"architecture": "grounded_mamba"} if overrides else {}
    assert settings.differences(config) == chosen | ({"backend.name": "torch_compiled"} if len(overrides) > 1 else {})


def test_what_differs_is_said_with_its_default() -> None:
    config = cli.validate(cli.composed(["model.dim=96", "optimiser.ssm.rate=0.25", "data.path=conf", "tracker=none"]))
    assert settings.differences(config).items() >= {"model.dim": 128, "optimiser.ssm.rate": 0.5, "data.path": None, "tracker.name": "wandb"}.items()
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True, soft_wrap=True)
    settings.show(console, config)
    lines = console.export_text(clear=False).splitlines()
    assert lines[-1].startswith("differs from the default run, whose value is in brackets: ") and "model.dim=96 (128)" in lines[-1]
    optimiser = next(line for line in lines if line.startswith("optimiser"))
    assert "rate=0.02 " in optimiser and "ssm.rate=0.25" in optimiser
    assert any(line.startswith("run ") and "seed=0" in line for line in lines) and not any("comparison" in line for line in lines)
    styled = console.export_text(styles=True)
    assert "\x1b[1;33mdim=96" in styled and "\x1b[2mdepth=4" in styled  # bold and yellow; dim


def test_values_are_said_as_in_an_override() -> None:
    assert [settings.said(value) for value in (None, True, 0.5, [1, "a"], "two words", "plain")] == [
        "null", "true", "0.5", '[1,"a"]', '"two words"', "plain",
    ]
