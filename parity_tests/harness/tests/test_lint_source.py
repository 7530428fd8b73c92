"""What the source of both sides leaves to the frameworks is named where they differ, with both places, and nothing else is."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from parity_tests.harness import Case, lint_source, run_case
from parity_tests.harness.adapters.base import Node


def spread(x: torch.Tensor) -> torch.Tensor:
    return x / x.std(-1, keepdim=True)


class Careless(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(spread(self.proj(x)))


class Careful(Careless):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        return torch.nn.functional.gelu(y / y.std(-1, keepdim=True, correction=0), approximate="tanh")


class Port(nnx.Module):
    def __init__(self) -> None:
        self.proj = nnx.Linear(5, 7, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.proj(x)
        return jax.nn.gelu(y / jnp.std(y, -1, keepdims=True))


class Trained(torch.nn.Module):
    def fit(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        torch.optim.AdamW(self.parameters(), lr=1e-3)


class TrainedPort(nnx.Module):
    def fit(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def line(thing: type, text: str) -> str:
    lines, first = inspect.getsourcelines(thing)
    return f"test_lint_source.py:{first + next(index for index, row in enumerate(lines) if text in row)}"


def found(reference: type, candidate: type) -> list[str]:
    return lint_source.defaults([Node("", "Model", cls=reference)], [Node("", "Model", cls=candidate)])


def test_a_function_that_a_method_calls_is_read() -> None:
    std, gelu = found(Careless, Port)
    assert std.startswith("torch's var and std divide by n - 1, jnp's by n") and std.endswith(f"({line(spread, 'std')} and {line(Port, 'std')})")
    assert gelu.startswith("torch's gelu is exact") and gelu.endswith(f"({line(Careless, 'gelu')} and {line(Port, 'gelu')})")


def test_what_is_written_out_is_not_spoken_of() -> None:
    assert lint_source.defaults([Node("", "Model", cls=Careful)], [Node("", "linear", cls=nnx.Linear)]) == []
    assert found(Careful, Port) == []  # and what Careful overrides is not read


def test_optimisers_and_clipping() -> None:
    decay, clip = found(Trained, TrainedPort)
    assert "1e-2 in torch and by 1e-4 in optax" in decay and "norm + 1e-6" in clip


def test_an_id_outside_the_table() -> None:
    """The line says what the frameworks do, so both are asked."""
    with pytest.raises(IndexError):
        torch.nn.Embedding(5, 3)(torch.tensor([5]))
    assert np.isnan(nnx.Embed(5, 3, rngs=nnx.Rngs(0))(jnp.array([5]))).all()
    node = Node("e", "embedding")
    assert lint_source.defaults([node], [node]) == [
        "an id outside the table raises in torch's Embedding and gives NaN in Flax's Embed: check ids before the model"]


def test_a_class_without_source_says_nothing() -> None:
    made = type("Made", (torch.nn.Module,), {"__module__": "__main__"})
    assert found(made, Port) == []


def test_a_battery_shows_them() -> None:
    result = run_case(Case("careless", Careless, Port, lambda seed: {"x": np.random.default_rng(seed).normal(size=(3, 5))}), tiers=["free"])
    assert not result.held and any(text.startswith("torch's gelu is exact") for text in result.lint)
