"""Every family of bugs is named from what it leaves behind, and nothing is named that does not explain the difference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import erf

from parity_tests.harness import report
from parity_tests.harness.adapters import opened
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import Result, run_case
from parity_tests.harness.case import Case
from parity_tests.harness.symptoms import Axes, block_of, one_pass_variance, symptoms

SIZES = {"batch": 3, "length": 11, "heads": 7, "head_dim": 5, "dim": 35}
AXES = Axes({value: name for name, value in SIZES.items()}, time=11, batch=3)
X = np.random.default_rng(0).normal(size=(3, 11, 35))


def heads(x: np.ndarray, order: list[int]) -> np.ndarray:
    return x.reshape(3, 11, 7, 5)[:, :, order].reshape(x.shape)


def at(index: tuple, factor: float = 1.01) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        made = x.copy()
        made[index] *= factor
        return made

    return change


def bfloat16(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(("family", "change"), [
    ("uniform slope", lambda x: 1.5 * x), ("uniform slope", lambda x: -x), ("ddof", lambda x: x * np.sqrt(34 / 35)),
    ("constant offset", lambda x: x + 1e-7), ("missing bias", lambda x: x - np.linspace(0.1, 0.5, 35)),
    ("slope per channel", lambda x: x * np.linspace(1.1, 1.9, 35)),
    ("permuted channels", lambda x: x[..., np.random.default_rng(1).permutation(35)]), ("permuted heads", lambda x: heads(x, [1, 0, 2, 3, 4, 5, 6])),
    ("permuted rows", lambda x: x[[1, 0, 2]]), ("reversed time", lambda x: x[:, ::-1]),
    ("shift in time", lambda x: np.concatenate([np.zeros((3, 1, 35)), x[:, :-1]], 1)),
    ("shift in time", lambda x: np.concatenate([x[:, 2:], np.ones((3, 2, 35))], 1)),
    ("averaged over the batch", lambda x: np.broadcast_to(x.mean(0), x.shape)),
    ("one channel", at((..., 4))), ("one row", at((2,))), ("last token", at((slice(None), -1))), ("first steps", at((slice(None), slice(0, 2)))),
    ("last chunk", at((slice(None), slice(8, None)))), ("one head", at((..., slice(10, 15)))),
    ("low precision", bfloat16), ("low precision", lambda x: x.astype(np.float32).astype(np.float64)),
    ("dropout", lambda x: np.where(np.random.default_rng(5).random(x.shape) < 0.1, 0.0, x / 0.9)),
    ("zero", np.zeros_like), ("NaN made", at((0, 0, 0), np.nan)),
    ("growth with t", lambda x: x + 1e-5 * np.arange(1, 12)[:, None] ** 3 * np.random.default_rng(2).normal(size=x.shape)),
])
def test_a_bug_is_told_from_the_arrays(family: str, change: Callable) -> None:
    found = symptoms(X, np.array(change(X)), AXES)
    assert found and found[0].family == family, found


def test_a_state_that_was_not_updated_and_a_nan_that_was_replaced() -> None:
    given = X[:, 0]
    assert symptoms(X[:, 1], given.copy(), AXES, given={"argument 1": given}, place=1)[0].family == "state stale"
    holes = at((1, 2, 3), np.nan)(X)
    assert symptoms(holes, np.nan_to_num(holes), AXES)[0].phrase == "values that are not finite replaced by 0"


@pytest.mark.parametrize("shape", [(3, 11, 35), (3, 7), (11, 35), (35,), (3, 5, 5), ()])
def test_a_difference_without_a_pattern_is_not_explained(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=shape)
    assert symptoms(x, x + 0.1 * rng.normal(size=shape), AXES) == []
    assert symptoms(x, x.copy(), AXES) == []
    assert symptoms(x, 1.5 * x + 0.1 * rng.normal(size=shape), AXES) == []  # a factor that leaves a fifth is none


def test_a_variance_in_one_pass_is_told_from_another_error_of_that_size() -> None:
    rng = np.random.default_rng(4)
    x, weight, bias = 300.0 + rng.normal(size=(11, 35)), rng.uniform(0.5, 1.5, 35), rng.normal(size=35)

    def norm(variance: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-5) * weight + bias

    good, fast = norm(x.var(-1, keepdims=True)), norm((x * x).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2)
    assert one_pass_variance(good, fast, x, weight=weight, bias=bias, dtype="float64").family == "one-pass variance"
    noise = good + np.std(fast - good) * rng.normal(size=good.shape)
    assert one_pass_variance(good, noise, x, weight=weight, bias=bias, dtype="float64") is None
    assert one_pass_variance(good, norm(x.var(-1, keepdims=True) + 1e-6), x - 300.0, weight=weight, bias=bias, dtype="float64") is None


def test_blocks_of_a_permutation() -> None:
    assert block_of(np.array([2, 3, 0, 1, 4, 5])) == 2 and block_of(np.array([1, 0, 2, 3])) == 1 and block_of(np.array([3, 4, 5, 0, 1, 2])) == 3


torch = pytest.importorskip("torch")


def sample_variance(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=1) + eps)


@pytest.mark.parametrize(("function", "family", "phrase", "expected"), [
    (lambda x: torch.nn.functional.layer_norm(x, (35,), eps=0.1), "ddof", "variance over n - 1", lambda x: sample_variance(x, 0.1)),
    (lambda x: torch.nn.functional.layer_norm(x, (35,), eps=0.1), "epsilon", "outside the root",
     lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)),
    (lambda x: x.mean((0, 1)), "ddof", "mean over n - 1", lambda x: x.sum((0, 1)) / 32),
    (lambda x: torch.exp(-torch.exp(x)), "decay", "sigmoid for exp", lambda x: 1 / (1 + np.exp(-x))),
    (lambda x: torch.stack(list(x.unbind(1)), 1), "shift in time", "one step late", lambda x: np.concatenate([0 * x[:, :1], x[:, :-1]], 1)),
    (lambda x: x[:, -1, 2:], "state early", "first entry for the last", lambda x: x[:, 0, 2:]),
])
def test_a_slip_at_one_place(function: Callable, family: str, phrase: str, expected: Callable) -> None:
    """Every offered change of one function that has this name computes what a port with the slip would."""
    from parity_tests.harness.adapters.torch_variants import Variations

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    model, x = Model(), torch.tensor(X)
    found = [item for item in Variations(model, "").functions(lambda: model(x), 3) if item.family == family and phrase in item.phrase]
    assert found
    made = []
    for item in found:
        with item.change(0.0):
            made.append(model(x).numpy())
    assert any(np.shape(value) == np.shape(expected(X)) and np.allclose(value, expected(X), rtol=0, atol=1e-12) for value in made)


def test_a_slip_in_a_layer_of_torch_that_is_called_by_itself() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(35, eps=0.1)

    adapter = opened(Case("norm", Model, Model, lambda seed: {"x": X}), "reference", "float64")
    found = adapter.variations("norm", frozenset()).functions(lambda: adapter.call("norm", (X,), {}), 3)
    slip = next(item for item in found if item.family == "ddof")
    assert "in forward, normalization.py" in slip.phrase
    with slip.change(0.0):
        np.testing.assert_allclose(adapter.call("norm", (X,), {}), sample_variance(X, 0.1), rtol=0, atol=1e-12)  # values of order 1


class Gated(torch.nn.Module):
    """rms(gelu(W x + b)) * sigmoid(gate), then a running mean along time."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gate, self.eps, self.floor = torch.nn.Linear(5, 7), torch.nn.Parameter(torch.ones(7)), 1e-5, 0.25
        self.order = "gated"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.proj(x))
        y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = y * torch.sigmoid(self.gate) if self.order != "plain" else y
        return torch.cumsum(y, 1) / (torch.arange(1, x.shape[1] + 1)[:, None] + self.floor)


def twin(bug: str) -> Callable[[], Engine]:
    """`Gated` in NumPy, with a bug."""
    def build(arrays: dict) -> Callable:
        def function(x: np.ndarray) -> np.ndarray:
            y = x @ arrays["proj.weight"].T + (0.0 if bug == "bias" else arrays["proj.bias"])
            y = 0.5 * y * (1.0 + (np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)) if bug == "gelu" else erf(y / np.sqrt(2.0))))
            y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + (1e-6 if bug == "epsilon" else 1e-5))
            gate = 1.0 / (1.0 + np.exp(-arrays["gate"]))
            gate = 1.0 - gate if bug == "inverted" else np.roll(gate, 1) if bug == "rolled" else gate
            y = y if bug == "plain" else y * gate
            y = y * np.random.default_rng(0).uniform(0.9, 1.1, y.shape) if bug == "noise" else y
            y = np.cumsum(y, 1) / (np.arange(1, x.shape[1] + 1)[:, None] + (0.31 if bug == "constant" else 0.25))
            return y.astype(np.float32).astype(x.dtype) if bug == "cast" else y

        return function

    return lambda: Engine(build, {"proj.weight": np.zeros((7, 5)), "proj.bias": np.zeros(7), "gate": np.zeros(7)})


def outcome(bug: str) -> Result:
    def inputs(seed: int, batch: int = 3, length: int = 11) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(batch, length, 5))}

    case = Case("gated", Gated, twin(bug), inputs, regimes=("as is",), dtypes=("float64",), sizes={"batch": 3, "length": 11})
    return run_case(case, tiers=["free"])


@pytest.mark.parametrize(("bug", "family", "words"), [
    ("bias", "missing bias", "missing bias (proj.bias)"), ("gelu", "gelu", "tanh for erf in gelu in forward, test_diagnose.py"),
    ("epsilon", "epsilon", "eps 1e-06 for 1e-05"), ("inverted", "inverted gate", "1 - sigmoid for sigmoid"),
    ("plain", "setting", "order 'plain' for 'gated'"), ("constant", "setting", "floor 0.31 for 0.25"),
    ("cast", "low precision", "a silent cast to float32"),
])
def test_the_reference_with_the_bug_reproduces_the_candidate(bug: str, family: str, words: str) -> None:
    result = outcome(bug)
    assert result.diagnosis.family == family and words in result.diagnosis.phrase, result.sentence
    assert f"; looks like: {result.diagnosis.phrase} [" in result.sentence and result.tiers[0].sentence == result.sentence


def test_a_bias_for_which_the_candidate_has_no_place() -> None:
    made = Engine(lambda arrays: lambda x: x @ arrays["weight"].T, {"weight": np.zeros((7, 5))})
    result = run_case(Case("biased", lambda: torch.nn.Linear(5, 7), lambda: made, lambda seed: {"x": np.ones((2, 5))}, trajectory=None))
    assert result.diagnosis.family == "missing bias" and "looks like: missing bias (bias), for which" in result.sentence


@pytest.mark.parametrize("bug", ["noise", "rolled"])
def test_what_nothing_explains_is_said(bug: str) -> None:
    result = outcome(bug)
    if bug == "noise":
        assert result.diagnosis.family == "" and f"; none of {result.diagnosis.tried} repairs reproduces it [" in result.sentence
    else:  # the product with another gate is a factor per channel, which is all that can be said of it
        assert result.diagnosis.family == "slope per channel"
    back = report.from_json(report.to_json([result]))[0]
    assert back.diagnosis == result.diagnosis and back.tiers[0].diagnosis == result.diagnosis
    assert outcome("none").diagnosis is None
