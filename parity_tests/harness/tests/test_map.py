"""A weight map is proposed from what the leaves do, verified, written, and read back by a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness import mapfile
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import run_case
from parity_tests.harness.case import Case
from parity_tests.harness.cli import main
from parity_tests.harness.convert import Concat, Constant, ConversionError, HeadPermutation, Reshape, Rule, Split, Transpose
from parity_tests.harness.propose import propose

RULES = (
    Rule("a", "b"), Rule("up.weight", "up.kernel", (Transpose((1, 0)),)), Rule("gain", "scale", (Reshape((2, 3), (6,)), HeadPermutation((1, 0)))),
    Rule(("q", "k"), ("qk",), (Concat(0, (2, 3)), Transpose((1, 0)))), Rule("both", ("left", "right"), (Split(1, (1, 2)),)),
    Rule("count", (), (Constant(0),)), Rule((), "eps", (Constant(np.array([0.5, 1.5])),)),
)


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(mapfile.text(RULES, {"head": 'emb"x'}, ["a comment"]))
    rules, ties = mapfile.load(path)
    assert ties == {"head": 'emb"x'} and mapfile.text(rules, ties, ["a comment"]) == path.read_text()
    ordered = {rule.sources + rule.targets: rule for rule in rules}
    for rule in RULES:
        other = ordered[rule.sources + rule.targets]
        assert [type(step) for step in other.operations] == [type(step) for step in rule.operations]
    array = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(ordered["gain", "scale"].forward([array])[0], RULES[2].forward([array])[0])


@pytest.mark.parametrize(("content", "words"), [
    ("nonsense", "cannot be read"), ("schema = 'x'", "has schema 'x'"), ("schema = 'parity-map/1'\nmore = 1", "has 'more'"),
    ("schema = 'parity-map/1'\n[leaves]\na = { to = 'b', do = [{ turn = 1 }] }", "operation {'turn': 1}, expected one of transpose"),
    ("schema = 'parity-map/1'\n[leaves]\na = { to = 3 }", "to = 3, expected names"), ("schema = 'parity-map/1'\n[leaves]\na = 3", "a rule with"),
    ("schema = 'parity-map/1'\n[[rule]]\nfrom = 'a'\nto = 'b'\ndo = [{ reshape = [[2], [3]] }]", "which is no such operation"),
    ("schema = 'parity-map/1'\n[leaves]\na = { to = 'b', via = 'c' }", "a rule with via"),
])
def test_a_file_that_is_no_map_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(content)
    with pytest.raises(ConversionError, match="weight map") as error:
        mapfile.load(tmp_path / "m.toml")
    assert words in str(error.value) and "\n" not in str(error.value)


def engine(names: dict[str, tuple[int, ...]], function: Callable) -> Callable[[], Engine]:
    return lambda: Engine(lambda arrays: lambda x: function(x, arrays), {name: np.ones(shape) for name, shape in names.items()})


def inputs(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(3, 11, 5))}


LEFT = engine({"w": (7, 5), "up": (7,), "down": (7,), "gain": (7,)}, lambda x, a: np.tanh(x @ a["w"].T + a["up"]) * a["gain"] - a["down"] ** 2)
# the names of "up" and "down" are exchanged, and one leaf has a name of no help
RIGHT = engine({"kernel": (5, 7), "down": (7,), "zeta": (7,), "up": (7,)},
               lambda x, a: np.tanh(x @ a["kernel"] + a["down"]) * a["zeta"] - a["up"] ** 2)


def case(reference: Callable = LEFT, candidate: Callable = RIGHT, **changes: object) -> Case:
    return Case("functions", reference, candidate, inputs, trajectory=None, regimes=("as is",), dtypes=("float64",), **changes)


def test_what_leaves_do_outweighs_their_names(tmp_path: Path) -> None:
    found = propose(case())
    assert {rule.sources: rule.targets for rule in found.rules} == {("w",): ("kernel",), ("up",): ("down",), ("down",): ("up",), ("gain",): ("zeta",)}
    assert found.loss < 1e-12 and found.by_fingerprint == 3 and found.by_name == 1
    path = tmp_path / "functions.map.toml"
    path.write_text(mapfile.text(found.rules, found.ties, found.comment("functions")))
    assert run_case(case(weights=path), tiers=["conversion", "free"]).held
    assert not run_case(case(), tiers=["free"]).held  # by names alone it cannot be


def test_leaves_that_are_truly_interchangeable_are_told_by_name_and_said() -> None:
    same = engine({"a": (7, 5), "bias_x": (7,), "bias_h": (7,)}, lambda x, a: np.tanh(x @ a["a"].T + a["bias_x"] + a["bias_h"]))
    found = propose(case(same, same))
    assert all(rule.sources == rule.targets for rule in found.rules) and "bias_x, bias_h" in found.notes[0]


@pytest.mark.parametrize(("reference", "candidate", "words"), [
    (LEFT, engine({"kernel": (5, 7), "down": (7,), "zeta": (7,)}, lambda x, a: np.tanh(x @ a["kernel"] + a["down"]) * a["zeta"]),
     r"1 leaves have no partner of their size: \w+ \(7,\) of the reference"),
    (LEFT, engine({"kernel": (5, 7), "down": (7,), "zeta": (7,), "up": (7,)}, lambda x, a: np.sin(x @ a["kernel"] + a["down"]) * a["zeta"] - a["up"]),
     "with equal weights in all leaves of one shape the outputs of the two models differ"),
    (engine({"a": (7, 5), "b": (7, 5)}, lambda x, a: (x @ a["a"].T) * (x @ a["a"].T) + 0 * a["b"].sum()),
     engine({"a": (7, 5), "b": (7, 5)}, lambda x, a: (x @ a["a"].T) * (x @ a["b"].T)), "no leaf of the candidate does what"),
])
def test_an_impossible_map_is_one_message(reference: Callable, candidate: Callable, words: str) -> None:
    with pytest.raises(ConversionError, match=words) as error:
        propose(case(reference, candidate))
    assert "\n" not in str(error.value)


MODELS = '''
import numpy as np
from parity_tests.harness.tests.test_map import pair
case = pair()
'''


def pair() -> Case:
    """Attention of width 5 over a state of 7: torch with q, k and v apart, NNX with one kernel for all three, other names, other shapes."""
    torch, nnx = pytest.importorskip("torch"), pytest.importorskip("flax.nnx")
    import jax
    import jax.numpy as jnp

    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(5, 7) for _ in range(3))
            self.out, self.gate = torch.nn.Linear(7, 5, bias=False), torch.nn.Linear(7, 5, bias=False)
            self.temperature = torch.nn.Parameter(torch.ones(2, 3))
            self.register_buffer("shift", torch.zeros(5))
            self.register_buffer("scale", torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            y = torch.softmax(q @ k.mT * self.temperature.flatten()[:3].sum(), -1) @ v
            return self.out(y) * torch.sigmoid(self.gate(y)) * self.scale + self.shift + self.temperature.square().sum()

    class Candidate(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.fused = nnx.Linear(5, 21, rngs=rngs)
            self.first, self.second = (nnx.Linear(7, 5, use_bias=False, rngs=rngs) for _ in range(2))
            self.t = nnx.Param(jnp.ones(6))
            self.one, self.two = nnx.Variable(jnp.ones(5)), nnx.Variable(jnp.ones(5))

        def __call__(self, x: jax.Array) -> jax.Array:
            v, q, k = jnp.split(self.fused(x), 3, -1)
            y = jax.nn.softmax(q @ k.mT * self.t[:3].sum(), -1) @ v
            return self.second(y) * jax.nn.sigmoid(self.first(y)) * self.one[...] + self.two[...] + jnp.square(self.t[...]).sum()

    return Case("attention", Reference, Candidate, inputs, trajectory=None, regimes=("as is",), dtypes=("float64",))


def test_a_torch_module_and_an_nnx_module_with_joined_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    assert main(["map", "models.py:case"]) == 0
    assert "written to attention.map.toml" in capsys.readouterr().out
    rules, _ = mapfile.load("attention.map.toml")
    table = {rule.targets[0]: rule.sources for rule in rules}
    assert table == {"fused.kernel": ("v.weight", "q.weight", "k.weight"), "fused.bias": ("v.bias", "q.bias", "k.bias"),
                     "first.kernel": ("gate.weight",), "second.kernel": ("out.weight",), "t": ("temperature",), "one": ("scale",), "two": ("shift",)}
    result = run_case(replace(pair(), weights="attention.map.toml"), tiers=["conversion", "free"])
    assert result.held, result.sentence
    assert main(["map", "models.py:case"]) == 2 and "exists; give another name by --out" in capsys.readouterr().err
