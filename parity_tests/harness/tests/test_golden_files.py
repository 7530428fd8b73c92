"""Golden files: written by a reference, read in its place, on a machine without its framework; whatever is wrong with one is a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness import formats, golden
from parity_tests.harness.answers import Golden, GoldenError
from parity_tests.harness.case import Case, CaseError, Trajectory
from parity_tests.harness.cli import main
from parity_tests.harness.loading import load
from parity_tests.harness.recording import Recording
from parity_tests.harness.structures import Arrays, StructureError

# h_t = tanh(w (x_t + h_{t-1})), a norm before it; neither framework is imported before a factory needs it
CASES = '''
import numpy as np
from parity_tests.harness import Case, StateProtocol, Trajectory

def reference():
    import torch

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.w = torch.nn.LayerNorm(5), torch.nn.Linear(5, 5)

        def forward(self, x, h=None):
            h, x, out = x.new_zeros(x.shape[0], 5) if h is None else h, self.norm(x), []
            for t in range(x.shape[1]):
                h = torch.tanh(self.w(x[:, t] + h))
                out.append(h)
            return torch.stack(out, 1), h

    return Cell()

def candidate(eps=1e-5):
    import jax.numpy as jnp
    from flax import nnx

    class Cell(nnx.Module):
        def __init__(self):
            self.norm = nnx.LayerNorm(5, epsilon=eps, use_fast_variance=False, rngs=nnx.Rngs(0))
            self.w = nnx.Linear(5, 5, rngs=nnx.Rngs(0))

        def __call__(self, x, h=None):
            h, x, out = jnp.zeros((x.shape[0], 5), x.dtype) if h is None else h, self.norm(x), []
            for t in range(x.shape[1]):
                h = jnp.tanh(self.w(x[:, t] + h))
                out.append(h)
            return jnp.stack(out, 1), h

    return Cell()

def inputs(seed, batch=3, length=3):
    return {"x": np.random.default_rng(seed).normal(size=(batch, length, 5))}

case = Case("cell", reference, candidate, inputs, states=StateProtocol(split_length=2), trajectory=Trajectory(steps=3, length=2),
            regimes=("as is", "carried state"), dtypes=("float64",))
wrong = Case("cell", reference, lambda: candidate(1e-6), inputs)
'''
# a framework that is blocked cannot be imported by anything
BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names!r})); from parity_tests.harness.cli import main; sys.exit(main({arguments!r}))"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("golden")
    (folder / "port.py").write_text(CASES)
    assert main(["golden", f"{folder / 'port.py'}:case", "--out", str(folder / "cell.npz")]) == 0
    return folder


def case_of(place: Path, name: str = "case") -> Case:
    return load(f"{place / 'port.py'}:{name}")[0]


def test_the_arrays_have_names_that_say_what_they_are(place: Path) -> None:
    held = formats.load(place / "cell.npz")
    assert {"meta", "weights/norm.weight", "weights/w.bias", "as is/inputs/x", "as is/calls/0000 norm/outputs", "carried state/states",
            "as is/gradients/parameters/w.weight", "training/losses"} <= set(held)
    made = json.loads(str(held["meta"]))
    assert made["schema"] == "parity-golden/1" and made["provenance"]["policy"]["versions"]["torch"] and "time" in made["provenance"]
    digests = [(value.shape, value.tobytes()) for name, value in held.items() if name != "meta"]
    assert len(digests) == len(set(digests))  # nothing is held twice


def test_a_file_stands_for_the_reference_that_wrote_it(place: Path) -> None:
    case = case_of(place)
    live, read = Recording(case), Golden(case, place / "cell.npz")
    assert read.kind == live.kind and read.leaves == live.leaves and read.order() == live.order()
    for regime in live.regimes:
        assert np.array_equal(read.inputs(regime)["x"], live.inputs(regime)["x"])
        for dtype in case.dtypes:
            assert np.array_equal(read.run(regime, dtype).outputs[0], live.run(regime, dtype).outputs[0])
        for left, right in zip(read.forced(regime), live.forced(regime), strict=True):
            assert left.path == right.path and np.array_equal(left.outputs, right.outputs) and np.array_equal(left.args[0], right.args[0])


def blocked(names: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCKED.format(names=names, arguments=list(arguments))], capture_output=True, text=True, cwd=ROOT,
                          check=False)


def test_the_candidate_is_proved_without_torch(place: Path) -> None:
    pytest.importorskip("flax")
    done = blocked(("torch",), "golden", f"{place / 'port.py'}:case", "--check", str(place / "cell.npz"), "--json", str(place / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    tiers = {tier["name"]: tier for tier in json.loads((place / "report.json").read_text())["cases"][0]["tiers"]}
    left = {name for name, tier in tiers.items() if tier["skipped"]}
    assert left == {"voting", "rounding", "observability"} and all(tier["checks"] for name, tier in tiers.items() if name not in left)
    assert "compared to cell.npz, which a torch reference of case 'cell' wrote at" in done.stdout
    other = blocked(("torch",), "run", f"{place / 'port.py'}:case")
    assert other.returncode == 2 and "the reference of case 'cell' cannot be made: ModuleNotFoundError: " in other.stderr
    assert "it comes with pip install 'groundwave[torch]', and a file that imports it inside the functions that make" in other.stderr


def test_the_reference_is_proved_without_jax(place: Path) -> None:
    done = blocked(("jax", "flax", "optax"), "golden", f"{place / 'port.py'}:case", "--check", str(place / "cell.npz"), "--side", "reference")
    assert done.returncode == 0 and "cell: parity holds" in done.stdout, done.stdout + done.stderr
    assert "worst float64 0 of" in done.stdout  # the same program on the same numbers


def test_a_bug_is_found_where_it_is(place: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("flax")
    command = ["golden", f"{place / 'port.py'}:wrong", "--check", str(place / "cell.npz"), "--tier", "forced", "--tier", "gradients"]
    assert main(command) == 1
    assert "cell: parity does not hold: parts at norm: relative L2 " in capsys.readouterr().out


def test_inputs_that_have_changed_since_are_not_passed_over(place: Path) -> None:
    pytest.importorskip("flax")
    case = case_of(place)
    other = replace(case, inputs=lambda seed, batch=3, length=3: {"x": case.inputs(seed + 1, batch, length)["x"]})
    words = r"on other inputs than those of .*cell.npz: its inputs have changed since, make the file again"
    with pytest.raises(CaseError, match=words):
        golden.check(place / "cell.npz", other).run(["splits"])
    result = golden.check(place / "cell.npz", other).run(["optimiser"])
    assert not result.held and re.search(words, result.sentence)
    assert golden.check(place / "cell.npz", other).run(["free"]).held  # which takes the inputs of the file


def test_an_engine_against_an_engine(tmp_path: Path) -> None:
    from parity_tests.harness.tests.test_bad_inputs import engines

    case = engines(np.tanh, trajectory=Trajectory(steps=2), dtypes=("float64", "float32"))
    golden.write(tmp_path / "e.npz", case)
    held = formats.load(tmp_path / "e.npz")
    assert held["as is/float32/outputs"].dtype == np.float32
    result = golden.check(tmp_path / "e.npz", case).run()
    assert result.held and next(tier for tier in result.tiers if tier.name == "rounding").checks
    wrong = engines(np.tanh, lambda y: np.tanh(y) * 1.001)
    assert "a uniform factor of 1.001" in golden.check(tmp_path / "e.npz", wrong).run(["free"]).sentence
    coarse = engines(np.tanh, lambda y: np.tanh(y + y.dtype.type(1e-4 if y.dtype == np.float32 else 0)), dtypes=case.dtypes)
    result = golden.check(tmp_path / "e.npz", coarse).run(["free", "rounding"])
    assert result.tiers[0].held and "float32 error" in result.sentence


def test_two_files_are_compared_with_their_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held = formats.load(place / "cell.npz")
    formats.save(tmp_path / "other.npz", {**held, "meta": np.asarray(str(held["meta"]) + " ")})
    assert main(["diff", str(place / "cell.npz"), str(place / "cell.npz")]) == 0
    assert main(["diff", str(place / "cell.npz"), str(tmp_path / "other.npz")]) == 1
    out = capsys.readouterr().out
    assert f"1 of {len(held)} arrays differ" in out and "another text" in out


def test_a_file_that_is_none_is_one_line(tmp_path: Path, place: Path) -> None:
    held = formats.load(place / "cell.npz")
    made = json.loads(str(held["meta"]))
    contents = {
        "is no golden file of schema parity-golden/1": {"w": np.ones(3)},
        "its schema is 'parity-golden/9'": {**held, "meta": np.asarray(json.dumps({**made, "schema": "parity-golden/9"}))},
        "the array 'as is/inputs/x' is not there": {name: value for name, value in held.items() if name != "as is/inputs/x"},
        "KeyError: 'weights/norm.bias'": {name: value for name, value in held.items() if name != "weights/norm.bias"},
        "ValueError: transform of regime 'as is' must be one of": {**held, "meta": np.asarray(str(held["meta"]).replace(
            '"transform": null', '"transform": "upside down"', 1))},
        "KeyError: 'leaves'": {"meta": np.asarray(json.dumps({name: value for name, value in made.items() if name != "leaves"}))},
    }
    for words, arrays in contents.items():
        formats.save(tmp_path / "f.npz", arrays)
        with pytest.raises(GoldenError) as caught:
            Golden(case_of(place), tmp_path / "f.npz")
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "golden needs either --out FILE.npz, which writes the file, or --check FILE.npz, which compares to it"),
    (["--out", "a.npz", "--tier", "free"], "--tier belongs to --check"), (["--check", "a.npz", "--regime", "as is"], "--regime belongs to --out"),
    (["--out", "a.npz", "--side", "reference"], "--side belongs to --check"), (["--out", "a.txt"], "a golden file is an .npz"),
    (["--out", "no/such/a.npz"], "the folder no/such does not exist"), (["--check", "absent.npz"], "absent.npz does not exist"),
    (["--out", "a.npz", "--regime", "as was"], "unknown regime 'as was'"),
])
def test_a_wrong_command_line(place: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str) -> None:
    assert main(["golden", f"{place / 'port.py'}:case", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("parity: ") and error.count("\n") == 1


Pair = namedtuple("Pair", "a b")


@dataclass
class Held:
    """A container of a user's own."""

    a: np.ndarray
    b: int


def test_trees_keep_their_containers() -> None:
    array = np.arange(6.0).reshape(2, 3)
    tree = {"x": [array, None, (1, 2.5, "s", True)], "pair": Pair(array.T, np.float32(3)), 7: Held(array, 4)}
    held = Arrays()
    structure = json.loads(json.dumps(held.take("as is/args", tree)))
    back = held.give(structure)
    assert list(held.held) == ["as is/args/x.0", "as is/args/pair.a", "as is/args/pair.b"] or len(held.held) == 3
    assert list(back) == ["x", "pair", 7] and back["x"][1:] == [None, (1, 2.5, "s", True)] and np.array_equal(back["x"][0], array)
    assert type(back["pair"]).__name__ == "Pair" and np.array_equal(back["pair"].a, array.T) and back["pair"].b.dtype == np.float32
    assert back[7].b == 4 and type(back[7]) is type(held.give(structure)[7])
    for bad in ({"x": object()}, {(1, 2): array}, np.array([object()])):
        with pytest.raises(StructureError):
            held.take("p", bad)
    for bad in ({}, 3, {"other": []}, {"array": "absent"}):
        with pytest.raises(StructureError):
            held.give(bad)


def test_a_call_that_cannot_be_written_is_said() -> None:
    torch = pytest.importorskip("torch")

    class Inner(torch.nn.Module):
        def forward(self, x: object, how: object) -> object:
            return x * 2.0

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.w = Inner(), torch.nn.Linear(5, 5)

        def forward(self, x: object) -> object:
            return self.w(self.inner(x, how=object()))

    case = Case("odd", Outer, Outer, lambda seed: {"x": np.random.default_rng(seed).normal(size=(3, 5))}, regimes=("as is",), dtypes=("float64",),
                trajectory=None)
    _, notes = golden.record(case)
    assert notes == ["as is: the call of inner is left out: it holds a builtins.object", "as is: layer inner is left out: it holds a builtins.object"]
