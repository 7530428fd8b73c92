"""Datasets of an erring expert: what they hold, that they are kept and found again, and the windows that training reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.control import dataset
from experiments.control.dataset import FIRST_SEED, Collection, collect, episode_seeds, load
from experiments.control.environments import open_environment
from experiments.control.experts import cart_pole, pendulum
from experiments.control.rollouts import Episodes
from experiments.control.windows import Rows, Windows
from experiments.errors import RunError

SMALL = Collection(episodes=7, validation_episodes=3, max_steps=23, noise=(0.0, 0.3), random_share=0.0, seed=3)
CART = Collection("CartPole-v1", episodes=9, validation_episodes=2, max_steps=61, noise=(0.3, 1.0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small(cache: Path) -> dataset.Dataset:
    return load(SMALL, cache)


@pytest.fixture(scope="module")
def carts(cache: Path) -> dataset.Dataset:
    return load(CART, cache)


def same(a: Episodes, b: Episodes) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def pendulums(options: Collection, seeds: list[int], lanes: int = 3) -> Episodes:
    return collect([open_environment("Pendulum-v1", max_steps=options.max_steps) for _ in range(lanes)], pendulum, options, seeds)


def test_labels_are_clean_and_actions_err(small: dataset.Dataset) -> None:
    found = small.training
    assert len(found) == 7 and found.steps == 7 * 23
    assert np.array_equal(found.targets, pendulum(found.observations))
    for episode in range(7):
        rows = found.rows(episode)
        error = np.abs(found.actions[rows] - found.targets[rows])
        assert (error.max() == 0) == (found.seeds[episode] % 2 == 0)  # sigma goes round by the seed
        assert np.array_equal(found.previous_actions[rows][1:], found.actions[rows][:-1]) and not found.previous_actions[rows][0].any()
    assert np.abs(found.actions).max() <= 1


def test_noise_is_as_wide_and_as_slow_as_asked_for() -> None:
    options = Collection(noise=(0.02,), correlation=0.8, random_share=0.0, max_steps=199)
    found = pendulums(options, list(range(31)))
    noise = (found.actions - found.targets)[:, 0].reshape(31, 199)
    free = np.abs(found.targets[:, 0].reshape(31, 199)) < 0.85  # elsewhere the bound may cut it
    assert free.sum() == 5641
    # four standard errors each: 5,641 draws of correlation 0.8 tell as much of the deviation as 1,238 free ones
    assert noise[free].std() == pytest.approx(0.02, rel=0.08)
    both = free[:, 1:] & free[:, :-1]
    assert np.corrcoef(noise[:, 1:][both], noise[:, :-1][both])[0, 1] == pytest.approx(0.8, abs=0.033)


def test_random_segments_hold_their_actions() -> None:
    options = Collection(noise=(0.0,), random_share=0.3, max_steps=97)
    found = pendulums(options, list(range(29)))
    random = (found.actions != found.targets)[:, 0].reshape(29, 97)
    share = random.mean(1)
    # a segment that begins within the share is finished: at most 20 steps over it
    assert share.min() >= 0.3 and share.max() < 0.3 + 21 / 97
    starts = (random[:, 1:] & ~random[:, :-1]).sum()
    assert 5 <= random.sum() / starts < 40
    actions = found.actions.reshape(29, 97)
    inside = random[:, 1:] & random[:, :-1]
    assert 0.5 < (actions[:, 1:] == actions[:, :-1])[inside].mean() < 0.8  # held for 3 steps on average: 2 of 3 repeat
    assert found.actions[random.reshape(-1)].std() == pytest.approx(3**-0.5, rel=0.1)  # uniform in [-1, 1]; 331 draws, 4 standard errors


def test_discrete_actions_err_by_chance(carts: dataset.Dataset) -> None:
    found = carts.training
    assert np.array_equal(found.targets, cart_pole(found.observations)) and np.array_equal(found.actions.sum(1), np.ones(found.steps))
    lanes = [open_environment("CartPole-v1", max_steps=61) for _ in range(4)]
    # half of the random choices are the expert's own; four standard errors of 1,345 and 527 rows
    for sigma, expected, bound in ((0.0, 0.0, 0.0), (0.4, 0.2, 0.044), (1.0, 0.5, 0.088)):
        made = collect(lanes, cart_pole, replace(CART, noise=(sigma,), random_share=0.0), list(range(24)))
        wrong = (made.actions != made.targets).any(1).mean()
        assert abs(wrong - expected) <= bound


def test_an_episode_does_not_depend_on_what_runs_beside_it() -> None:
    options = Collection(max_steps=31)
    together, apart = pendulums(options, [4, 9, 2, 7], lanes=3), pendulums(options, [4, 9, 2, 7], lanes=1)
    other = pendulums(replace(options, seed=1), [4, 9, 2, 7])
    assert same(together, apart)
    assert np.array_equal(other.observations[other.offsets[:-1]], apart.observations[apart.offsets[:-1]])
    assert not np.array_equal(other.actions, apart.actions)


def test_seeds_are_apart() -> None:
    sides = [side for seed in (0, 1, 5) for side in episode_seeds(Collection(seed=seed, episodes=301, validation_episodes=41))]
    seeds = [seed for side in sides for seed in side]
    assert len(seeds) == len(set(seeds)) == 3 * 342 and min(seeds) >= FIRST_SEED


def test_dataset_is_written_once_and_found_again(small: dataset.Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(path.name for path in small.folder.iterdir())
    assert small.collected and files == ["config.json", "training.safetensors", "validation.safetensors"]
    described = json.loads((small.folder / "config.json").read_text())
    assert described["dataset"]["environment"] == "Pendulum-v1" and "gymnasium" in described["dataset"]["versions"]
    assert described["training"] == {"steps": 161, "mean_return": pytest.approx(float(small.training.returns.mean()))}
    training, validation = (set(side.seeds.tolist()) for side in (small.training, small.validation))
    assert len(training) == 7 and len(validation) == 3 and not training & validation
    monkeypatch.setattr(dataset, "collect", lambda *_: pytest.fail("collected again"))
    again = load(SMALL, cache)
    assert not again.collected and again.folder == small.folder and same(again.training, small.training) and same(again.validation, small.validation)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_every_option_and_the_expert_decide_the_folder(small: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(dataset, "_read", lambda folder, _: found.append(folder.name) or (small.training, small.validation))
    expert = tmp_path / "my_expert.py"
    monkeypatch.syspath_prepend(tmp_path)
    expert.write_text("from experiments.control.experts import pendulum\ndef act(seen):\n    return pendulum(seen)\n")
    for change in (
        {}, {"episodes": 8}, {"validation_episodes": 4}, {"seed": 4}, {"noise": (0.3, 0.0)}, {"correlation": 0.8}, {"random_share": 0.1},
        {"max_steps": 24}, {"expert": "my_expert:act"},
    ):
        load(replace(SMALL, **change), tmp_path)
    expert.write_text(expert.read_text() + "# changed\n")
    load(replace(SMALL, expert="my_expert:act"), tmp_path)
    assert found[0] == small.folder.name and len(set(found)) == len(found) == 10
    load(replace(SMALL, environment="Pendulum"), tmp_path)
    assert found[-1] == small.folder.name  # the name without a version is another way to say the same


def damage_bytes(folder: Path) -> str:
    path = folder / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    return "training.safetensors is altered"


def damage_length(folder: Path) -> str:
    path = folder / "validation.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return "validation.safetensors is truncated"


def damage_listing(folder: Path) -> str:
    (folder / "config.json").write_text('{"dataset": ')
    return "config.json is not JSON"


def damage_whole(folder: Path) -> str:
    (folder / "training.safetensors").unlink()
    return "training.safetensors, which is not there"


@pytest.mark.parametrize("damage", [damage_bytes, damage_length, damage_listing, damage_whole])
def test_a_broken_dataset_is_named_and_collected_again(small: dataset.Dataset, tmp_path: Path, damage: Any) -> None:
    folder, lines = load(SMALL, tmp_path).folder, []
    message = damage(folder)
    again = load(SMALL, tmp_path, lines.append)
    assert len(lines) == 1 and message in lines[0] and str(folder) in lines[0] and "\n" not in lines[0]
    assert again.collected and same(again.training, small.training)
    assert not load(SMALL, tmp_path, lines.append).collected and len(lines) == 1


def test_another_process_may_be_faster(small: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, first = dataset._read, []

    def slow(folder: Path, described: dict[str, Any]) -> tuple[Episodes, Episodes]:
        if not first:
            first.append(folder)
            dataset._write(folder, described, open_environment("Pendulum-v1", max_steps=23), pendulum, SMALL)  # the other one
            written.append((folder / "config.json").stat().st_ino)
            raise ValueError("not there yet")
        return read(folder, described)

    written: list[int] = []
    monkeypatch.setattr(dataset, "_read", slow)
    found = load(SMALL, tmp_path, lambda line: None)
    assert same(found.training, small.training) and (found.folder / "config.json").stat().st_ino == written[0]
    assert [path.name for path in tmp_path.iterdir()] == [found.folder.name]


def test_what_cannot_be_collected_or_written_gives_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match=r"cannot write control data into .*file/control-[0-9a-f]{16}: Not a directory"):
        load(SMALL, blocked)
    with pytest.raises(RunError, match="Acrobot-v1 has no scripted expert"):
        load(replace(SMALL, environment="Acrobot-v1"), tmp_path)
    for change, message in (
        ({"episodes": 0}, "episodes must be in 1"), ({"validation_episodes": 0}, "validation_episodes must be"), ({"seed": -1}, "seed must be"),
        ({"noise": ()}, "noise must hold"), ({"noise": (0.1, -1.0)}, r"none below 0, found \[0\.1, -1\.0\]"),
        ({"correlation": 1.0}, "correlation must be"), ({"random_share": 1.5}, "random_share must be"), ({"max_steps": 0}, "max_steps must be"),
    ):
        with pytest.raises(RunError, match=message):
            replace(SMALL, **change)
    assert list(tmp_path.iterdir()) == [blocked]


def test_statistics_are_of_the_training_rows(small: dataset.Dataset, carts: dataset.Dataset) -> None:
    for found in (small, carts):
        normal = found.statistics.observations(found.training.observations)
        assert normal.dtype == np.float32
        assert np.allclose(normal.mean(0), 0, atol=1e-5) and np.allclose(normal.std(0), 1, rtol=1e-5)  # float32
        assert np.allclose(found.statistics.raw(normal), found.training.observations, atol=1e-5)
        assert np.sqrt(np.square(found.statistics.rewards(found.training.outcomes)).mean()) == pytest.approx(1, rel=1e-5)
    still = replace(small.training, observations=np.full_like(small.training.observations, 5), outcomes=np.zeros_like(small.training.outcomes))
    found = dataset.statistics(still)
    assert np.array_equal(found.observation_std, np.ones(3)) and np.array_equal(found.reward_rms, [1])
    assert not found.observations(still.observations).any()


def test_windows_go_on_where_the_lane_was(carts: dataset.Dataset) -> None:
    episodes, batch, context = carts.training, 4, 11
    assert len(set(episodes.lengths % context)) > 1  # or the mask would not be tried
    windows = Windows(Rows(episodes, carts.statistics, 0.9), batch, context, seed=2)
    before = None
    rows_seen = np.zeros(episodes.steps, dtype=int)
    for step in range(60):
        found = windows.batch(step)
        assert found.observations.shape == (context, batch, 4) and found.mask.shape == (context, batch)
        for lane in range(batch):
            episode, time = int(found.episode[lane]), int(found.time[lane])
            count = min(context, int(episodes.lengths[episode]) - time)
            assert count > 0 and np.array_equal(found.mask[:, lane], np.arange(context) < count)
            rows = slice(episodes.offsets[episode] + time, episodes.offsets[episode] + time + count)
            rows_seen[rows] += 1
            assert (found.observations[count:, lane] == found.observations[count - 1, lane]).all()
            for name in ("previous_actions", "targets", "actions"):
                assert np.array_equal(getattr(found, name)[:count, lane], getattr(episodes, name)[rows])
            for name in ("observations", "next_observations"):
                assert np.array_equal(getattr(found, name)[:count, lane], carts.statistics.observations(getattr(episodes, name)[rows]))
            assert np.array_equal(found.rewards[:count, lane], carts.statistics.rewards(episodes.rewards[rows]))
            assert np.allclose(found.values[:count, lane], 0.1 * episodes.values(0.9)[rows] / carts.statistics.reward_rms, rtol=1e-6)
            if step == 0:
                assert found.fresh[lane]
            elif found.fresh[lane]:
                assert time == 0 and before.time[lane] + context >= episodes.lengths[before.episode[lane]]
            else:
                assert (episode, time) == (before.episode[lane], before.time[lane] + context)
        before = found
    assert rows_seen.min() >= 1


def test_windows_depend_on_seed_and_step_alone(small: dataset.Dataset) -> None:
    rows = Rows(small.training, small.statistics, 0.9)
    one, other = Windows(rows, 3, 5, seed=1), Windows(rows, 3, 5, seed=2)
    places = [(one.batch(step).episode.tolist(), one.batch(step).time.tolist()) for step in range(40)]
    resumed = Windows(rows, 3, 5, seed=1)
    for step in (39, 17, 0):
        found, expected = resumed.batch(step), one.batch(step)
        assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in found.__dataclass_fields__)
    assert [(other.batch(step).episode.tolist(), other.batch(step).time.tolist()) for step in range(40)] != places
    assert one.steps_per_epoch == 7 * 5 // 3
    assert sorted(one.batch(0).time) == [0, 5, 15]  # 0, 1/3 and 2/3 of five windows
    starts = [episode for step in range(40) for episode, fresh in zip(one.batch(step).episode, one.batch(step).fresh, strict=True) if fresh]
    assert sorted(starts[:7]) == sorted(starts[7:14]) == list(range(7)) and starts[:7] != starts[7:14]


def test_whole_episodes_and_unusable_windows(carts: dataset.Dataset) -> None:
    rows = Rows(carts.training, carts.statistics, 0.9)
    found = rows.whole([5, 2])
    lengths = carts.training.lengths[[5, 2]]
    assert np.array_equal(found.mask.sum(0), lengths) and len(found.mask) == max(lengths) and found.fresh.all()
    assert np.array_equal(found.targets[: lengths[1], 1], carts.training.targets[carts.training.rows(2)])
    later = rows.window([5, 2], [3, 0], 4)
    assert later.fresh.tolist() == [False, True] and np.array_equal(later.targets[:, 0], carts.training.targets[carts.training.rows(5)][3:7])
    for arguments, message in (((10, 5), "batch_size=10 lanes need at least as many episodes, found 9"), ((3, 0), "at least 1, found 3 and 0")):
        with pytest.raises(RunError, match=message):
            Windows(rows, *arguments, seed=0)
    with pytest.raises(RunError, match="discount must be in"):
        Rows(carts.training, carts.statistics, 1.0)
