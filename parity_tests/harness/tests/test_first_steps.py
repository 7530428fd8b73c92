"""What a new user meets who makes a mistake: one line that says what to do, and a command that ends as it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.harness import formats
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import run_case
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.cli import main
from parity_tests.harness.compare import Place, failed
from parity_tests.harness.explain import Diagnosis
from parity_tests.harness.locate import sentence
from parity_tests.harness.tests.test_cli import CASES

ROOT = Path(__file__).resolve().parents[3]
SLOW = CASES + '''
import time
def waiting(seed):
    print("drawn", flush=True)
    time.sleep(60)
slow = Case("slow", engine, engine, waiting, trajectory=None)
many = [Case(f"case {n}", engine, engine, inputs, trajectory=None) for n in range(3)]
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cases.py").write_text(SLOW)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "needs.py").write_text("raise ModuleNotFoundError(\"No module named 'flax'\", name='flax')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "words"), [
    ("case.py:good", "case.py does not exist (asked for case.py:good); did you mean cases.py?"),
    ("cases.py", "found 'cases.py'; its cases are bad, good, many, slow"),
    ("empty.py:good", "empty.py has no 'good'; it has no case, which is a variable that holds a parity_tests.harness.Case"),
    ("cases.py:inputs", "cases.py:inputs is a function that needs arguments, expected a Case, a list of them, or a function that makes either; its "
                        "cases are bad, good"),
    ("needs.py:case", "No module named 'flax' (needs.py, line 1); it comes with pip install 'groundwave[jax]', and a file that imports it inside"),
])
def test_a_case_that_is_not_found(place: Path, capsys: pytest.CaptureFixture, name: str, words: str) -> None:
    assert main(["run", name]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("parity: ") and error.count("\n") == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "parity_tests.harness.cli", *arguments]


def test_a_reader_who_has_seen_enough_does_not_end_the_run(place: Path) -> None:
    """`parity run | head -1`: the report is computed and written all the same, and the status is the verdict."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = " ".join(["set -o pipefail;", *command("run", "cases.py:many", "--json", "r.json", "--html", "r.html"), "| head -1"])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=place, env=environment, check=False)
    assert done.returncode == 0 and done.stdout == "case 0: parity holds\n" and done.stderr == ""
    assert len(json.loads((place / "r.json").read_text())["cases"]) == 3 and "case 2" in (place / "r.html").read_text()
    shell = " ".join([*command("report", "--schema"), "| true; echo ${PIPESTATUS[0]}"])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=place, env=environment, check=False)
    assert done.stdout in ("141\n", "0\n") and done.stderr == ""


def test_an_interrupted_run_ends_at_once_in_one_line(place: Path) -> None:
    # a job that a script put into the background ignores the signal, and so would what it starts
    process = subprocess.Popen(command("run", "cases.py:slow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "drawn\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error == "parity: interrupted\n" and time.monotonic() - begun < 30


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_runs(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:slow", "--html", "."]) == 2  # which would take a minute
    assert main(["run"]) == 2
    words = ["--html . cannot be written: Is a directory", "no CASE was given and there is no pyproject.toml in"]
    captured = capsys.readouterr()
    assert captured.out == "" and all(word in captured.err for word in words)


def test_a_report_takes_the_place_of_the_old_one_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["run", "cases.py:good", "--quiet", "--json", "r.json"]) == 0
    before = (place / "r.json").read_text()

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["run", "cases.py:good", "--quiet", "--json", "r.json"]) == 2
    assert (place / "r.json").read_text() == before and not list(place.glob(".r.*"))


def engines(function: Callable, names: dict[str, tuple[int, ...]], **settings: Any) -> Case:
    def engine() -> Engine:
        return Engine(lambda arrays: lambda x: function(x, arrays), {name: np.ones(shape) for name, shape in names.items()})

    def inputs(seed: int, batch: int = 3) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(batch, 5))}

    return Case("pair", engine, engine, inputs, **{"trajectory": None, "regimes": ("as is",), "dtypes": ("float64",), **settings})


def test_inputs_that_do_not_fit_are_shown() -> None:
    with pytest.raises(CaseError, match=r"the reference of case 'pair' cannot be run on x \(3, 5\) float64: ValueError: matmul"):
        run_case(engines(lambda x, a: x @ a["w"], {"w": (7, 5)}))
    with pytest.raises(CaseError, match=r"takes 0 positional .* it is called as inputs\(seed\), with batch= and length= where it takes them"):
        run_case(replace(engines(lambda x, a: x, {"w": (5, 7)}), inputs=lambda: {}))


def test_an_unread_weight_has_a_way_out() -> None:
    result = run_case(engines(lambda x, a: x @ a["w"], {"w": (5, 7), "spare": (3,)}))
    assert "it is untested; give inputs that reach it, or a reason in unobservable={...}" in result.sentence


def test_a_function_without_weights_is_compared_and_said_to_have_none() -> None:
    result = run_case(engines(lambda x, a: x * 2.0, {}))
    assert result.held and result.tiers[0].skipped == "neither side has a weight"
    assert result.tiers[-1].skipped == "the reference has no weight that could be moved"


def test_leaves_that_are_left_over_on_both_sides_come_with_advice() -> None:
    case = engines(lambda x, a: x @ next(iter(a.values())), {"dense": (5, 7)})
    other = replace(case, candidate=engines(lambda x, a: x @ next(iter(a.values())), {"proj": (5, 7)}).reference)
    last = run_case(other).sentence.splitlines()[-1]
    assert last.startswith("  modules of other names are paired by names={...} of the case, single leaves by weights=[Rule(...)]; `parity map`")
    turned = replace(case, reference=engines(lambda x, a: x, {"kernel": (5, 7)}).reference,
                     candidate=engines(lambda x, a: x, {"weight": (7, 5)}).reference)
    assert "make the torch module the reference and the Flax module the candidate" in run_case(turned).sentence


def test_tiers_that_did_not_run_for_one_reason_share_a_line(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:good"]) == 0
    assert "\n  splits: not run: the model carries no state\n" not in capsys.readouterr().out
    (place / "lost.py").write_text(CASES + "lost = Case('lost', engine, lambda: Engine(lambda a: lambda x: x, {'v': np.ones(3)}), inputs)\n")
    assert main(["run", "lost.py:lost"]) == 1
    out = capsys.readouterr().out
    assert "  coverage, forced, free, voting, rounding, gradients, splits, optimiser, effects, observability: not run: the weights could not" in out


def test_a_model_in_the_place_of_its_factory() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(CaseError, match=r"reference of case 'x' is a Linear, expected a function that makes it: reference=lambda: Linear\(...\)"):
        Case("x", torch.nn.Linear(5, 7), lambda: None, lambda seed: {})
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    for model in (nnx.Linear(5, 7, rngs=nnx.Rngs(0)), linen.Dense(7)):
        with pytest.raises(CaseError, match="expected a function that makes it: candidate=lambda"):
            Case("x", torch.nn.Identity, model, lambda seed: {})


def test_what_a_torch_module_writes_to_is_named() -> None:
    torch = pytest.importorskip("torch")

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(5))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return x * self.w

    case = replace(engines(lambda x, a: x * a["w"], {"w": (5,), "calls": ()}), reference=Counting)
    sentence = run_case(case, tiers=["effects"]).sentence
    assert "reference: weights or buffers changed during the call: calls; give new values back instead of writing" in sentence


def test_a_linen_port_is_converted_with_its_collection(place: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    case = "import numpy as np, torch\nfrom flax import linen\nfrom parity_tests.harness import Case\n" \
           "case = Case('dense', lambda: torch.nn.Linear(5, 7), lambda: linen.Dense(7), lambda seed: {'x': np.ones((3, 5))})\n"
    (place / "port.py").write_text(case)
    arrays = {"weight": np.arange(35.0).reshape(7, 5), "bias": np.arange(7.0)}
    formats.save(place / "t.safetensors", arrays)
    there = ["--case", "port.py:case", "--to", "candidate"]
    for name, keys in (("f.msgpack", {"params.kernel", "params.bias"}), ("f.npz", {"kernel", "bias"})):
        assert main(["convert", "t.safetensors", name, *there]) == 0
        assert set(formats.load(place / name)) == keys
        assert main(["convert", name, "back.npz", "--case", "port.py:case", "--to", "reference"]) == 0
        assert {key: value.tobytes() for key, value in formats.load(place / "back.npz").items()} == {key: v.tobytes() for key, v in arrays.items()}


def test_a_diagnosis_that_tried_nothing_says_nothing() -> None:
    check = failed(Place("free", "", "as is", "float64"), 1, "none of 3 values is finite, in both: nothing can be compared")
    assert "repairs" not in sentence([check], {}, Diagnosis("", "", 1.0, 0))
    assert "none of 7 repairs reproduces it" in sentence([check], {}, Diagnosis("", "", 1.0, 7))
