"""Long context: perplexities against a plain computation, and each verdict in both directions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import runtime
from experiments import report
from experiments.errors import RunError
from experiments.steps import make
from experiments.tasks import long_context
from experiments.tasks.long_context import Row
from experiments.tests import tiny


def rows() -> list[Row]:
    """A model that gets better with length, uses its context and stays healthy."""
    base = Row(1024, 6.0, 5.9, 1e4, 1.0, 0.9, 20.0, 300.0, 6.5, 4.0, 0, 8)
    return [base, replace(base, tokens=4096, perplexity=5.8, reset_perplexity=6.4), replace(base, tokens=16384, perplexity=5.9, reset_perplexity=6.4)]


MEMORY = {1024: 3.0, 4096: 3.1, 16384: 3.3}
BROKEN = {
    "perplexity does not rise": dict(perplexity=6.11, reset_perplexity=6.9),
    "context is used": dict(perplexity=5.9, reset_perplexity=5.95),
    "states are healthy": dict(unhealthy=1),
    "memory is flat": dict(),
}


def test_a_healthy_model_holds_everywhere() -> None:
    found = long_context.verdicts(rows(), 512, MEMORY)
    assert [each.name for each in found] == list(BROKEN) and all(each.held for each in found)
    assert "5.8000 at 4096 tokens, 5.9000 at 16384: x 1.0172" in found[0].text and "+0.20 MB" in found[3].text
    alone = long_context.verdicts(rows()[:1], 512)
    assert [each.name for each in alone] == ["context is used", "states are healthy"]
    assert [each.name for each in long_context.verdicts(rows()[:1], 1024)] == ["states are healthy"]


@pytest.mark.parametrize("name", BROKEN)
def test_each_verdict_fails_by_itself(name: str) -> None:
    *others, last = rows()
    memory = MEMORY | ({16384: 5.2} if name == "memory is flat" else {})
    found = long_context.verdicts([*others, replace(last, **BROKEN[name])], 512, memory)
    assert [each.name for each in found if not each.held] == [name]


@pytest.mark.parametrize("change", [dict(largest_norm=math.nan), dict(autocorrelation=0.9995)])
def test_states_that_are_not_finite_or_stand_still_are_not_healthy(change: dict[str, float]) -> None:
    *others, last = rows()
    assert [each.name for each in long_context.verdicts([*others, replace(last, **change)], 512) if not each.held] == ["states are healthy"]


@pytest.mark.parametrize("chunk", [40, 64])
def test_perplexities_are_those_of_a_plain_pass(chunk: int) -> None:
    settings = tiny.gru()
    step = make(runtime.build("gru", settings.model, "torch", dtype="float64"), settings)
    stream = np.random.default_rng(5).integers(97, 123, size=401)
    found, streams = long_context.perplexities(step, stream, [50, 130], chunk, 8)
    assert streams == 3
    lanes = np.stack([stream[start : start + 131] for start in (0, 130, 260)])
    for length in (50, 130):
        ids, labels = lanes[:, :length].copy(), lanes[:, 1 : length + 1].copy()
        assert found[length][0] == pytest.approx(math.exp(step.evaluate(ids, labels, None)[0] / ids.size), rel=1e-12)
        reset = sum(step.evaluate(ids[:, low : low + chunk].copy(), labels[:, low : low + chunk].copy(), None)[0] for low in range(0, length, chunk))
        assert found[length][2] == pytest.approx(math.exp(reset / ids.size), rel=1e-12)
    assert long_context.perplexities(step, stream, [50], chunk, 2)[1] == 2
    measured = long_context.run(step, stream, [130, 50, 10**6], chunk, 8)
    assert [row.tokens for row in measured] == [50, 130] and measured[1].perplexity == found[130][0] and measured[0].streams == 3
    assert measured[1].largest_norm > 0 and measured[1].unhealthy == 0
    with pytest.raises(RunError, match="the shortest length is 500"):
        long_context.fitting(stream, [500, 600])


def test_states_that_blow_up_are_seen() -> None:
    """A WKV memory that grows by a tenth at every token: norms pass the bound, and a verdict says so."""
    settings = tiny.config()
    model = replace(settings.model, depth=1, decay="direct", normalised_key=False, readout_norm=False)
    arrays = runtime.init.init_arrays("grounded_mamba", model, 0)
    arrays |= {name: np.full_like(value, 1.1) for name, value in arrays.items() if name.endswith("time_decay")}
    step = make(runtime.build("grounded_mamba", model, backend="torch", dtype="float64", arrays=arrays), replace(settings, model=model))
    stream = np.random.default_rng(5).integers(97, 123, size=401)
    (row,) = long_context.run(step, stream, [400], 50)
    assert row.unhealthy > 0 and row.largest_norm > 100
    assert "states are healthy" in [each.name for each in long_context.verdicts([row], 50) if not each.held]


def test_a_flat_line_is_seen_below_the_edge_of_its_panel() -> None:
    """Peak memory hardly changes with the length: without room above, its line lay on the axis."""
    memory = report.long_context_figure(rows()).axes[-1]
    assert memory.get_title() == "peak memory, MB" and memory.get_ylim() == pytest.approx((0, 1.15 * 300.0))
