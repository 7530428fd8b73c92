"""The measurement of one step of WaveCore: what it writes, what its profile says, and that the lazy step copies no level of the memory."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from conf.models import WaveCoreConfig
from experiments.tasks import core_step
from jax_impl.functional import WaveCoreModel

SMALL = WaveCoreConfig(
    d_s=26, d_w=24, d_p=14, d_e=21, d_k=6, d_c=22, num_levels=2, cms_sizes=(23, 38), cms_dims=(27, 58), cms_decays=(0.1, 0.05))


def test_command_measures_both_and_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert core_step.main(["--tier", "v2.0", "--rounds", "3", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["core_step"]
    assert found["parameter_bytes"] == 4 * 954_697 and found["memory_bytes"] == 4 * (32 * 96 + 64 * 160 + 128 * 288)
    lazy, full = (found["timings"][name] for name in ("lazy", "full"))
    assert found["ratio"] == full["median"] / lazy["median"]
    for name, timing in found["timings"].items():
        assert 0 < timing["shortest"] <= timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
        assert timing["parameter_bytes_per_second"] == pytest.approx(found["parameter_bytes"] / timing["median"], rel=1e-12)
        profile, operations = found["profile"][name], found["operations"][name]
        assert set(profile) == {*core_step.PARTS, "rest"} and all(profile[part] > 0 for part in core_step.PARTS)
        assert sum(profile.values()) == pytest.approx(sum(seconds for *_, seconds in operations), rel=1e-9)
    assert found["memory_copies"]["lazy"] == []
    assert f"full / lazy = {found['ratio']:.3f}" in capsys.readouterr().out


def test_command_refuses_too_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        core_step.main(["--rounds", "1"])
    assert "needs --rounds of at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [None, 3])
def test_the_lazy_step_writes_its_memory_in_place(batch: int | None) -> None:
    model = WaveCoreModel(SMALL, 5, 3, 2)
    state, rows = model.init_state(batch), () if batch is None else (batch,)
    arguments = (jax.eval_shape(model.init), state, *(jnp.zeros((*rows, width)) for width in (5, 3, 1)))
    def copies(donated: tuple[int, ...]) -> list[str]:
        return core_step.memory_copies(jax.jit(model.step, donate_argnums=donated).lower(*arguments).compile().as_text(), state)

    assert copies((1,)) == []
    if batch is None:
        assert len(copies(())) >= 4  # the caller keeps his state: memories and keys of two levels
