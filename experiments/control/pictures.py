"""What there is to look at: an episode as GIF and as a strip of pictures, states and the memory's attention over time.

A picture that cannot be made costs one line of warning, never the run: `render_episode` returns what it could write.
Letters: T steps, D width of a state, M slots of a memory level.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from experiments.control.environments import open_environment
from experiments.control.rollouts import Policy, run_episodes
from experiments.errors import RunError

STATES = {"s": "fast state s", "w": "wave state w", "p": "particle state p"}
_SATURATED = ("#00c853", "#d500f9")  # at the lower, at the upper limit: colours that the map of the values does not have
_LINES = 128


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def record(name: str, policy: Policy, seed: int, max_steps: int | None = None) -> tuple[list[np.ndarray], float, float | None]:
    """Pictures before every step of the policy's episode of `seed`, its return, and the seconds of a step where the environment tells.

    Raises RunError where nothing can be drawn.
    """
    environment = open_environment(name, pictures=True, max_steps=max_steps)
    frames: list[np.ndarray] = []
    try:
        episode = run_episodes([environment], policy, [seed], seen=lambda lane: frames.append(environment.picture()))
    finally:
        environment.close()
    return frames, float(episode.returns[0]), environment.seconds


def render_episode(
    folder: Path, name: str, policy: Policy, seed: int, *, max_steps: int | None = None, told: Callable[[str], None] = _warn
) -> dict[str, Path]:
    """episode.gif and episode.png (a strip) in `folder`, by the names "gif" and "strip"; empty, and one line `told`, where there is no picture."""
    written: dict[str, Path] = {}
    try:
        frames, _, seconds = record(name, policy, seed, max_steps)
        written["strip"] = write_strip(frames, folder / "episode.png", seconds)
        written["gif"] = write_gif(frames, folder / "episode.gif", seconds)
    except (RunError, OSError, ImportError) as error:
        told(f"groundwave: no pictures of the episode: {error}")
    return written


def write_gif(frames: Sequence[np.ndarray], path: Path, seconds: float | None = None, *, width: int = 240, most: int = 120) -> Path:
    """An endless GIF of at most `most` frames, `width` pixels wide, that takes as long as the episode did (0.05 s a step if not known)."""
    every = -(-len(frames) // most)
    images = [_scaled(frame, width) for frame in frames[::every]]
    # one palette for all frames, or a still background flickers
    palette = images[len(images) // 2].quantize(64)
    images = [image.quantize(palette=palette, dither=0) for image in images]
    # viewers slow down frames that are shorter than 20 ms
    duration = max(20, round(1000 * every * (seconds or 0.05)))
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False)
    return path


def write_strip(frames: Sequence[np.ndarray], path: Path, seconds: float | None = None, *, count: int = 10, width: int = 160) -> Path:
    """A PNG of `count` pictures, evenly spaced over the episode, side by side, each with its time below it."""
    from PIL import Image, ImageDraw

    places = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    images = [_scaled(frames[place], width) for place in places]
    gap, height, text = 4, images[0].height, 16
    strip = Image.new("RGB", (len(images) * (width + gap) - gap, height + text), "white")
    draw = ImageDraw.Draw(strip)
    for index, (place, image) in enumerate(zip(places, images, strict=True)):
        left = index * (width + gap)
        strip.paste(image, (left, 0))
        draw.rectangle((left, 0, left + width - 1, height - 1), outline="lightgray")
        label = f"step {place}" if seconds is None else f"{place * seconds:.2f} s"
        draw.text((left + width / 2, height + text / 2), label, fill="black", anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)
    return path


def states_figure(states: Mapping[str, np.ndarray], limit: float, seconds: float | None = None) -> Figure:
    """Heat maps of the states over time, entries at +-`limit` in colours of their own, and below them the fraction of such entries.

    `states`: "s", "w", "p" -> (T, D) of one episode after each step; `limit` 0 means that the states are not clipped.
    """
    names = [name for name in STATES if name in states]
    if not names:
        raise RunError(f"the figure of states needs some of {', '.join(STATES)}, found {', '.join(states) or 'none'}")
    values = {name: np.asarray(states[name], dtype=np.float64) for name in names}
    steps = len(values[names[0]])
    times, label = _times(steps, seconds)
    bound = limit or max(float(np.nanmax(np.abs(value))) for value in values.values()) or 1.0
    shades = colormaps["RdBu_r"].with_extremes(under=_SATURATED[0], over=_SATURATED[1], bad="black")
    figure = Figure(figsize=(9, 2.1 * len(names) + 2), layout="constrained")
    rows = figure.subplots(len(names) + 1, 1, sharex=True, squeeze=False, height_ratios=[1.0] * len(names) + [0.8])[:, 0]
    edge = np.nextafter(bound, 0) if limit else bound
    image = None
    for axes, name in zip(rows, names, strict=False):
        value = values[name]
        image = axes.imshow(
            value.T, aspect="auto", origin="lower", interpolation="nearest", cmap=shades, vmin=-edge, vmax=edge,
            extent=(times[0], times[-1], -0.5, value.shape[1] - 0.5),
        )
        axes.set_ylabel("unit")
        axes.set_title(f"{STATES[name]}, RMS {np.sqrt(np.nanmean(value * value)):.2f}", fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=list(rows[:-1]), extend="both" if limit else "neither")
    bar.set_label(f"value; green, magenta: at -{limit:g}, +{limit:g}" if limit else "value; not clipped")
    lowest = rows[-1]
    centres = (times[:-1] + times[1:]) / 2
    for name, colour in zip(names, ("tab:blue", "tab:orange", "black"), strict=False):
        share = 100 * (np.abs(values[name]) >= limit).mean(1) if limit else np.zeros(steps)
        lowest.plot(centres, share, color=colour, label=f"{name}, mean {share.mean():.0f} %")
    lowest.set_ylim(-2, 102)
    lowest.set_ylabel("units at limit (%)")
    lowest.set_xlabel(label)
    lowest.grid(alpha=0.3)
    lowest.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper right")
    return figure


def attention_figure(attention: Sequence[np.ndarray], seconds: float | None = None) -> Figure:
    """Heat map of the attention over each memory level's slots, by time. `attention`: per level (T, M), rows that sum to one.

    Of a level with more slots than lines can be told apart, each line shows the largest weight among a few neighbours.
    """
    if not attention:
        raise RunError("the figure of attention needs at least one level")
    times, label = _times(len(attention[0]), seconds)
    figure = Figure(figsize=(9, 2.1 * len(attention) + 0.6), layout="constrained")
    rows = figure.subplots(len(attention), 1, sharex=True, squeeze=False)[:, 0]
    for level, (axes, given) in enumerate(zip(rows, attention, strict=True)):
        weights = np.asarray(given, dtype=np.float64)
        slots = weights.shape[1]
        together = -(-slots // _LINES)
        lines = np.maximum.reduceat(weights, np.arange(0, slots, together), axis=1)
        image = axes.imshow(
            lines.T, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis", norm=PowerNorm(0.5, 0, max(float(weights.max()), 1e-9)),
            extent=(times[0], times[-1], -0.5, lines.shape[1] * together - 0.5),
        )
        axes.set_ylim(-0.5, slots - 0.5)
        axes.set_ylabel("slot" if together == 1 else f"slot, largest of {together}")
        title = f"level {level}: {slots} slots, {_effective(weights):.1f} of them in use on average (exp of the entropy)"
        axes.set_title(title, fontsize=10, loc="left")
        figure.colorbar(image, ax=axes).set_label("attention weight\n(root scale)")
    rows[-1].set_xlabel(label)
    return figure


def save(figure: Figure, path: Path, told: Callable[[str], None] = _warn) -> Path | None:
    """Write a PNG; None, and one line `told`, where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        told(f"groundwave: no figure {path}: {error.strerror or error}")
        return None
    return path


def _times(steps: int, seconds: float | None) -> tuple[np.ndarray, str]:
    """Edges (T + 1,) of the steps and the label of their axis."""
    return np.arange(steps + 1) * (seconds or 1.0), "time (s)" if seconds else "time (steps)"


def _effective(weights: np.ndarray) -> float:
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(1)
    return float(np.exp(entropy).mean())


def _scaled(frame: np.ndarray, width: int) -> Any:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame))
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
