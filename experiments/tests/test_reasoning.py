"""Induction and recall: what solves them scores everything, what cannot scores chance, and a model learns them from their own labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import runtime
from experiments.steps import make
from experiments.steps.base import IGNORED
from experiments.tasks import reasoning
from experiments.tests import tiny


def reader(find: Callable[[list[int], int], int | None]) -> Callable[[np.ndarray], tuple[np.ndarray, None]]:
    """A model that looks for the next token of every prefix with `find`; where it finds none all tokens are as likely."""

    def call(ids: np.ndarray) -> tuple[np.ndarray, None]:
        logits = np.zeros((*ids.shape, tiny.VOCABULARY))
        for row, tokens in enumerate(ids.tolist()):
            for place in range(len(tokens)):
                found = find(tokens, place)
                if found is not None:
                    logits[row, place, found] = 1.0
        return logits, None

    return call


def after_last(width: int) -> Callable[[list[int], int], int | None]:
    """What came after the last `width` tokens where they stood before: an induction head."""

    def find(tokens: list[int], place: int) -> int | None:
        wanted = tokens[place - width + 1 : place + 1]
        return next((tokens[i + width] for i in range(place - width + 1) if tokens[i : i + width] == wanted and i + width <= place), None)

    return find


@pytest.mark.parametrize(("name", "width"), [("induction", 1), ("recall", 2)])
def test_an_induction_head_solves_and_ignorance_has_chance(name: str, width: int) -> None:
    puzzles = reasoning.TASKS[name](40, 3)
    solved = reasoning.score(reader(after_last(width)), puzzles, batch_size=16)
    assert (solved.accuracy, solved.error, solved.sequences, solved.above_chance) == (1.0, 0.0, 40, True)
    blind = reasoning.score(reader(lambda tokens, place: None), puzzles)
    assert blind.accuracy == pytest.approx(puzzles.chance) and puzzles.chance == 1 / 8 and not blind.above_chance


@pytest.mark.parametrize("name", reasoning.TASKS)
def test_counting_letters_does_not_beat_chance(name: str) -> None:
    """Constant tastes among letters, the letter seen most or least, first or last: all within four standard errors of chance."""
    puzzles = reasoning.TASKS[name](600, 5)
    taste = np.random.default_rng(0).normal(size=tiny.VOCABULARY)

    def seen(ids: np.ndarray, weight: float, decay: float) -> tuple[np.ndarray, None]:
        counts = np.zeros((*ids.shape, tiny.VOCABULARY))
        running = np.zeros((len(ids), tiny.VOCABULARY))
        for place in range(ids.shape[1]):
            running *= decay
            running[np.arange(len(ids)), ids[:, place]] += 1
            counts[:, place] = weight * running + 1e-6 * taste
        return counts, None

    models = [
        lambda ids: (np.broadcast_to(taste, (*ids.shape, tiny.VOCABULARY)), None), lambda ids: seen(ids, 1.0, 1.0), lambda ids: seen(ids, -1.0, 1.0),
    ]
    models += [lambda ids: seen(ids, 1.0, 0.9), lambda ids: seen(ids, -1.0, 0.9)]
    for model in models:
        found = reasoning.score(model, puzzles)
        assert abs(found.accuracy - found.chance) < 4 * found.error and not found.above_chance
        assert 0 < found.error < 0.02


@pytest.mark.parametrize("name", reasoning.TASKS)
def test_options_and_labels_are_the_answers(name: str) -> None:
    puzzles = reasoning.TASKS[name](30, [1, 2])
    assert np.array_equal(puzzles.options[..., 0], puzzles.ids[:, puzzles.positions + 1])
    options = np.sort(puzzles.options, axis=-1)
    assert (options[..., 1:] > options[..., :-1]).all()  # no option twice
    batch = puzzles.batch()
    assert batch.fresh and np.array_equal(batch.labels[:, puzzles.positions], puzzles.options[..., 0])
    assert (np.delete(batch.labels, puzzles.positions, axis=1) == IGNORED).all()
    again, other = reasoning.TASKS[name](30, [1, 2]), reasoning.TASKS[name](30, [1, 3])
    assert np.array_equal(again.ids, puzzles.ids) and not np.array_equal(other.ids, puzzles.ids)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_step_is_scored_and_trained_on_the_answers(backend: str) -> None:
    """An untrained model stands at chance; trained on one batch of puzzles it knows their answers, by heart."""
    settings = tiny.gru(backend)
    step = make(runtime.build("gru", settings.model, backend, dtype="float64"), settings)
    puzzles = reasoning.recall(6, 0)
    before = reasoning.score(step.model, reasoning.recall(64, 1))
    assert abs(before.accuracy - before.chance) < 4 * before.error
    first = [step.step(puzzles.batch(), dict.fromkeys(("ssm", "rwkv", "norm", "other"), 0.02)).losses["cross_entropy"] for _ in range(120)]
    assert first[-1] < 0.5 * first[0] and reasoning.score(step.model, puzzles).accuracy > 0.6
