"""Pictures: an episode as GIF and strip, figures of states and attention, and one line of warning where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.control import pictures
from experiments.control.experts import pendulum
from experiments.control.rollouts import Scripted, run_episodes
from experiments.errors import RunError


def frames(count: int) -> list[np.ndarray]:
    """A block that goes from left to right on white, (30, 50, 3)."""
    made = np.full((count, 30, 50, 3), 255, dtype=np.uint8)
    for index in range(count):
        left = 1 + 40 * index // max(count - 1, 1)
        made[index, 10:20, left : left + 8] = (200, 30, 30)
    return list(made)


def centre(image: Image.Image) -> float:
    """Mean column of what is not nearly white, as a fraction of the width."""
    dark = np.asarray(image.convert("RGB")).min(-1) < 120
    return float(np.nonzero(dark)[1].mean() / dark.shape[1])


def test_episode_is_drawn_in_both_forms(tmp_path: Path) -> None:
    told: list[str] = []
    written = pictures.render_episode(tmp_path / "new", "Pendulum-v1", Scripted(pendulum), 4, max_steps=9, told=told.append)
    assert not told and {name: path.name for name, path in written.items()} == {"strip": "episode.png", "gif": "episode.gif"}
    with Image.open(written["gif"]) as gif:
        assert gif.size == (240, 240) and 2 <= gif.n_frames <= 9
    with Image.open(written["strip"]) as strip:
        assert strip.size == (9 * 164 - 4, 176)
    seen, total, seconds = pictures.record("Pendulum-v1", Scripted(pendulum), 4, max_steps=9)
    assert len(seen) == 9 and seen[0].shape == (500, 500, 3) and not np.array_equal(seen[0], seen[8]) and seconds == 0.05
    episode = run_episodes([pictures.open_environment("Pendulum-v1", max_steps=9)], Scripted(pendulum), [4])
    assert total == episode.returns[0]  # drawing changes nothing


def test_gif_keeps_the_order_and_the_time(tmp_path: Path) -> None:
    path = pictures.write_gif(frames(31), tmp_path / "a.gif", 0.04, width=100, most=11)
    with Image.open(path) as gif:
        assert gif.size == (100, 60) and gif.n_frames == 11 and gif.info["loop"] == 0
        places, durations = [], []
        for index in range(11):
            gif.seek(index)
            places.append(centre(gif))
            durations.append(gif.info["duration"])
    assert places == sorted(places) and places[0] < 0.12 and places[-1] > 0.88
    assert durations == [120] * 11  # every third frame of 40 ms
    with Image.open(pictures.write_gif(frames(1), tmp_path / "one.gif")) as gif:
        assert gif.n_frames == 1


def test_strip_shows_evenly_spaced_frames(tmp_path: Path) -> None:
    path = pictures.write_strip(frames(31), tmp_path / "a.png", 0.1, count=4, width=100)
    with Image.open(path) as strip:
        assert strip.size == (4 * 104 - 4, 60 + 16)
        cuts = [strip.crop((104 * index + 2, 2, 104 * index + 98, 58)) for index in range(4)]
        assert [centre(cut) for cut in cuts] == pytest.approx([0.09, 0.36, 0.63, 0.9], abs=0.03)  # frames 0, 10, 20, 30
        assert np.asarray(strip.crop((0, 62, 416, 76)).convert("L")).min() < 100  # the times
    with Image.open(pictures.write_strip(frames(2), tmp_path / "b.png", count=4, width=100)) as strip:
        assert strip.size == (2 * 104 - 4, 76)


@pytest.mark.parametrize("trouble", ["environment", "renderer", "folder"])
def test_no_picture_is_one_line_and_no_crash(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_screen(self: Any) -> None:
        raise OSError("no screen\nat all")

    name, folder = "Pendulum-v1", tmp_path / "out"
    if trouble == "environment":
        name = "Pendulun-v1"
    elif trouble == "renderer":
        monkeypatch.setattr("gymnasium.envs.classic_control.pendulum.PendulumEnv.render", no_screen)
    else:
        folder.write_text("a file")
    told: list[str] = []
    assert pictures.render_episode(folder, name, Scripted(pendulum), 4, max_steps=3, told=told.append) == {}
    assert len(told) == 1 and told[0].startswith("groundwave: no pictures of the episode: ") and "\n" not in told[0]
    assert {"environment": "doesn't exist", "renderer": "no screen", "folder": "out"}[trouble] in told[0]


@pytest.mark.usefixtures("drawn")
def test_states_figure_marks_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states = {"s": rng.uniform(-9, 9, (21, 13)), "w": rng.uniform(-1, 1, (21, 11)), "p": rng.uniform(-9, 9, (21, 7))}
    states["s"][5:] = 10.0
    states["p"][:, 0] = -10.0
    figure = pictures.states_figure(states, 10.0, 0.05)
    maps, lines = figure.axes[:3], figure.axes[3].lines
    assert [axes.get_title(loc="left").split(",")[0] for axes in maps] == ["fast state s", "wave state w", "particle state p"]
    image = maps[0].images[0]
    shown = image.to_rgba(image.get_array())[..., :3]
    assert np.allclose(shown[:, 5:], image.cmap.get_over()[:3]) and not np.isclose(shown[:, :5], image.cmap.get_over()[:3]).all(-1).any()
    below = maps[2].images[0]
    assert np.allclose(below.to_rgba(below.get_array())[0, :, :3], below.cmap.get_under()[:3])
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([100, 0, 100 / 7]) and lines[0].get_ydata()[0] == 0
    assert lines[0].get_xdata()[[0, -1]] == pytest.approx([0.025, 1.025]) and figure.axes[3].get_xlabel() == "time (s)"
    assert maps[0].get_ylabel() == "unit" and figure.axes[3].get_ylabel() == "units at limit (%)"
    assert pictures.save(figure, tmp_path / "new" / "states.png").stat().st_size > 10_000
    free = pictures.states_figure({"s": 30 * states["s"]}, 0.0)
    assert free.axes[1].get_xlabel() == "time (steps)" and not free.axes[1].lines[0].get_ydata().any()
    with pytest.raises(RunError, match="needs some of s, w, p, found x"):
        pictures.states_figure({"x": states["s"]}, 10.0)


@pytest.mark.usefixtures("drawn")
def test_attention_figure_shows_every_peak(tmp_path: Path) -> None:
    small, large = np.full((17, 5), 0.2), np.zeros((17, 301))
    large[np.arange(17), 200 + np.arange(17)] = 1.0
    figure = pictures.attention_figure([small, large], 0.02)
    first, second = figure.axes[:2]
    assert "5 slots, 5.0 of them" in first.get_title(loc="left") and "301 slots, 1.0 of them" in second.get_title(loc="left")
    assert first.images[0].get_array().shape == (5, 17) and first.get_ylabel() == "slot"
    shown = np.asarray(second.images[0].get_array())
    assert shown.shape == (101, 17) and second.get_ylabel() == "slot, largest of 3"
    assert np.array_equal(shown.argmax(0), (200 + np.arange(17)) // 3) and shown.max() == 1
    assert second.get_xlabel() == "time (s)" and second.get_xlim() == pytest.approx((0, 0.34)) and second.get_ylim() == (-0.5, 300.5)
    assert pictures.save(figure, tmp_path / "attention.png").is_file()
    with pytest.raises(RunError, match="at least one level"):
        pictures.attention_figure([])


@pytest.mark.usefixtures("drawn")
def test_figure_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    figure = pictures.attention_figure([np.full((3, 2), 0.5)])
    assert pictures.save(figure, tmp_path / "file" / "a.png", told.append) is None
    assert len(told) == 1 and told[0].startswith("groundwave: no figure ") and "\n" not in told[0]
