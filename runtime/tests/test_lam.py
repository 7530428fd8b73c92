"""`LAM`: sentences to embeddings, alike on every backend, from directories of our own and of others, and what is refused."""

import json
import re
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import runtime
from runtime import LAM, encoding, public
from runtime.files import digest, pending_path, write_arrays
from runtime.tokenizer import tokenize

NEEDED = {"cython": ["cython_ext.lam_engine"], "torch": ["torch"], "jax": ["jax", "flax"]}
# Unit rows in other batches: the same sums in another order, through two layers that normalise.
ROUNDING = {"float32": 1e-5, "float64": 1e-13}


@pytest.fixture(params=NEEDED)
def backend(request):
    for package in NEEDED[request.param]:
        pytest.importorskip(package)
    return request.param


@pytest.fixture(scope="session")
def make(lam_config, lam_arrays, tokenizer_text):
    """A function that makes the tiny LAM on a backend, one for each backend and dtype."""
    from tokenizers import Tokenizer

    made = {}

    def make(backend, dtype="float32"):
        if (backend, dtype) not in made:
            model = runtime.build("lam", lam_config, backend, lam_arrays, dtype)
            made[backend, dtype] = LAM(model, Tokenizer.from_str(tokenizer_text))
        return made[backend, dtype]

    return make


@pytest.fixture
def saved(make, tmp_path):
    pytest.importorskip("torch")
    make("torch").save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def public_directory(lam_arrays, tokenizer_text, tmp_path):
    """A directory as others publish it; the function returned writes `arrays`, under the public names, into its weights."""
    (tmp_path / "config.json").write_text('{"architectures": ["DeltaNetLAM"], "hidden_size": 30}')
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)

    def write(change=lambda arrays: None):
        arrays = {key: value.astype(np.float32) for key, value in public.export("lam", lam_arrays).items()}
        change(arrays)
        write_arrays(tmp_path / "model.safetensors", arrays)
        return tmp_path

    return write


def distance(a, b):
    """Largest distance between rows."""
    return np.linalg.norm(a - b, axis=-1).max()


def test_unit_rows_whatever_the_batch(backend, make, sentences):
    lam = make(backend)
    embeddings = lam.encode(sentences, batch_size=7)
    assert embeddings.shape == (24, 30) and embeddings.dtype == np.float32 and lam.backend == backend
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=0, atol=30 * np.finfo(np.float32).eps)  # a sum of 30 squares
    similarity = embeddings @ embeddings.T
    different = np.array([[a != b for a in sentences] for b in sentences])
    assert similarity[different].max() < 0.999  # or no comparison below could fail
    order = np.random.default_rng(1).permutation(24)
    assert distance(lam.encode([sentences[index] for index in order], batch_size=7), embeddings[order]) < ROUNDING["float32"]
    for index in (0, 2, 8):
        single = lam.encode(sentences[index])
        assert single.shape == (30,) and single.dtype == np.float32
        assert distance(single, embeddings[index]) < ROUNDING["float32"]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-11)])
def test_backends_agree(make, sentences, dtype, bound):
    """float64 to the bound that the project promises end to end; float32 to 100 of its roundings."""
    for package in {name for names in NEEDED.values() for name in names}:
        pytest.importorskip(package)
    first, *others = (make(backend, dtype).encode(sentences, batch_size=7) for backend in NEEDED)
    assert first.dtype == dtype and all(other.dtype == dtype and distance(other, first) < bound for other in others)


def test_means_over_tokens(backend, make, sentences):
    lam = make(backend, "float64")
    means, units = lam.encode(sentences, batch_size=7, normalize=False), lam.encode(sentences, batch_size=7)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    assert norms.min() > 0.1 and np.abs(norms - 1).max() > 0.1
    assert distance(means / norms, units) < ROUNDING["float64"]


def test_the_embedding_is_that_of_the_model(make, sentences):
    pytest.importorskip("torch")
    lam = make("torch", "float64")
    ids = tokenize(lam.tokenizer, [sentences[3]], 30)[0][0]
    output = lam.model(ids[None])
    assert distance(lam.encode(sentences[3]), output.embedding[0]) < ROUNDING["float64"]
    among_longer = lam.encode([sentences[1], sentences[3], ""], normalize=False)[1]
    assert distance(among_longer, output.last_hidden_state[0].mean(0)) < 10 * ROUNDING["float64"]  # of norms to 10


def test_what_sentences_may_be(make, backend):
    lam = make(backend)
    texts = ["the man", "a horse", "", "river", "a", "the", "of"]
    expected = lam.encode(texts, batch_size=7)
    assert all(np.array_equal(lam.encode(given, batch_size=7), expected) for given in (tuple(texts), iter(texts), np.array(texts)))
    assert abs(np.linalg.norm(expected[2]) - 1) < 1e-6 and np.isfinite(expected).all()
    for normalize in (True, False):
        nothing = lam.encode([], normalize=normalize)
        assert nothing.shape == (0, 30) and nothing.dtype == np.float32


def test_bad_input(make):
    pytest.importorskip("torch")
    lam = make("torch")
    with pytest.raises(TypeError, match=r"sentences\[1\] must be a str, found int"):
        lam.encode(["the man", 7])
    with pytest.raises(TypeError, match="sentences must be a str or a list of str, found int"):
        lam.encode(7)
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, found {size}"):
            lam.encode(["the man"], batch_size=size)
    for length in (0, 31, 8.0):
        with pytest.raises(ValueError, match=f"max_length must be an integer from 1 to 30, found {length}"):
            lam.encode(["the man"], max_length=length)
    with pytest.raises(TypeError, match="under the name 'lam', found LAM"):
        LAM(lam, lam.tokenizer)


def test_truncation_warns_once_and_counts(make):
    pytest.importorskip("torch")
    lam = make("torch")
    words = ["the", "man", "plays", "guitar", "near", "of", "river", "house", "garden", "slowly", "today"]
    with pytest.warns(UserWarning, match=r"^2 of 3 sentences have more than max_length=8 tokens and were truncated$") as caught:
        cut = lam.encode([" ".join(words), " ".join(words[:6]), " ".join(words[:7])], max_length=8)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert distance(cut, np.array([lam.encode(" ".join(words[:6]))] * 3)) < ROUNDING["float32"]
    with pytest.warns(UserWarning, match="1 of 1 sentences have more than max_length=30 tokens"):
        lam.encode("horse " * 29)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lam.encode("horse " * 28)


class Recorder:
    """A model that notes the shapes that it is given."""

    def __init__(self, model):
        self.model, self.shapes = model, []
        self.config, self.dtype = model.config, model.dtype

    def __call__(self, ids, mask):
        self.shapes.append(ids.shape)
        return self.model(ids, mask)


def test_shapes_are_few_where_they_are_compiled_and_tokens_bounded(make, sentences, monkeypatch):
    pytest.importorskip("torch")
    lam = make("torch")
    recorder = Recorder(lam.model)
    monkeypatch.setattr(lam, "model", recorder)
    embeddings = lam.encode(sentences, batch_size=7)
    lengths = sorted((len(text.split()) + 2 for text in sentences), reverse=True)
    assert recorder.shapes == [(7, lengths[0]), (7, lengths[7]), (7, lengths[14]), (3, lengths[21])]  # no row, no column too many
    recorder.shapes.clear()
    monkeypatch.setattr(lam, "backend", "jax")
    assert distance(lam.encode(sentences, batch_size=7), embeddings) < ROUNDING["float32"]
    assert recorder.shapes == [(7, 30), (7, 16), (7, 16), (7, 16)]
    assert encoding.plan([90] * 400, 1000)[0].rows == encoding.BATCH_TOKENS // 90


def test_progress_bar(make, sentences, capsys):
    pytest.importorskip("torch")
    for show in (None, False, True):
        make("torch").encode(sentences, batch_size=2, show_progress_bar=show)
        assert ("100%" in capsys.readouterr().err) is (show is True)


def test_save_on_one_load_on_every_other(backend, make, sentences, tmp_path):
    for dtype in ("float32", "float64"):
        lam = make(backend, dtype)
        lam.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        expected = lam.encode(sentences, batch_size=7)
        for other in ("torch", backend):
            loaded = LAM.from_pretrained(tmp_path, backend=other, strict=True)
            assert (loaded.backend, loaded.model.dtype, loaded.config) == (other, dtype, lam.config)
            assert distance(loaded.encode(sentences, batch_size=7), expected) < 100 * ROUNDING[dtype]  # as test_backends_agree
    assert LAM.from_pretrained(tmp_path, backend="torch", dtype="float32").encode(["a"]).dtype == np.float32
    assert runtime.load(tmp_path, backend="torch").config == lam.config


def test_a_saved_model_with_a_tokenizer_put_beside_it(make, tokenizer_text, tmp_path):
    pytest.importorskip("torch")
    runtime.save(make("torch").model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor vocab\.txt"):
        LAM.from_pretrained(tmp_path, backend="torch")
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)
    assert np.array_equal(LAM.from_pretrained(tmp_path, backend="torch").encode("the man"), make("torch").encode("the man"))


def test_a_set_whose_files_were_not_yet_renamed(saved):
    path = saved / "tokenizer.json"
    path.rename(pending_path(saved, path.name, digest(path)))
    assert LAM.from_pretrained(saved, backend="torch").encode("the man").shape == (30,)


def test_an_altered_set_is_refused(saved):
    path = saved / "tokenizer.json"
    path.write_text(path.read_text().replace('"horse"', '"zebra"'))
    with pytest.raises(ValueError, match=r"tokenizer\.json is altered"):
        LAM.from_pretrained(saved, backend="torch")


def test_public_directories(public_directory, lam_arrays, make, sentences):
    torch = pytest.importorskip("torch")
    directory = public_directory()
    lam = LAM.from_pretrained(directory, backend="torch")
    assert lam.config.gelu_repeats == 2 and lam.config.max_positions == 13 and lam.model.dtype == "float32"
    assert lam.config.chunk_size == 64  # the public code's, whatever the model was that went in
    embeddings = lam.encode(sentences)
    arrays = public.export("lam", lam_arrays)
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()
    from_bin = LAM.from_pretrained(directory, backend="torch")
    assert from_bin.model.dtype == "float64"
    assert distance(from_bin.encode(sentences), embeddings) < ROUNDING["float32"]
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        LAM.from_pretrained(directory, backend="torch")


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("deltanet_layers.0.o_norm.weight"), r"missing: deltanet_layers\.0\.o_norm\.weight$"),
    (lambda a: a.update({"teacher_model.adapter.weight": np.zeros(3)}), r"unmapped: teacher_model\.adapter\.weight$"),
    (lambda a: a.update({"deltanet_layers.0.b_proj.weight": np.zeros((3, 31))}), r"delta\.b_proj\.weight is \(3, 31\), expected \(3, 30\)"),
])
def test_public_weights_that_do_not_fit(public_directory, change, message):
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        LAM.from_pretrained(public_directory(change), backend="torch")


def test_directories_that_are_no_lam(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nothing is downloaded"):
        LAM.from_pretrained("sentence-transformers/nowhere")
    with pytest.raises(FileNotFoundError, match="no directory"):
        LAM.from_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="backend must be one of 'cython', 'torch', 'jax', found 'torch_compiled'"):
        LAM.from_pretrained(saved, backend="torch_compiled")
    other = runtime.build("deltanet_lm", runtime.arrays.NAMES["deltanet_lm"](vocab_size=11, dim=6, depth=1, heads=2, ffn_dim=5))
    runtime.save(other, tmp_path / "other")
    with pytest.raises(ValueError, match="holds a 'deltanet_lm', expected a 'lam'"):
        LAM.from_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        LAM.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("asked, absent, used, reasons", [
    ("cython", ["cython_ext.delta_rule"], "torch", {"cython": "needs the compiled kernels: .*is not built"}),
    ("cython", ["cython_ext.lam_engine", "torch"], "jax", {"cython": "needs the compiled kernels", "torch": r"needs torch: .*groundwave\[torch\]"}),
    ("jax", ["flax"], "cython", {"jax": r"needs flax: pip install 'groundwave\[jax\]'"}),
    ("jax", ["jax", "cython_ext.delta_rule"], "torch", {"jax": "needs jax", "cython": "needs the compiled kernels"}),
    ("torch", ["torch"], "cython", {"torch": "needs torch"}),
])
def test_a_backend_that_cannot_be_loaded_gives_way_with_a_warning(saved, monkeypatch, asked, absent, used, reasons):
    for package in ("torch", "jax", "flax", *NEEDED["cython"]):
        pytest.importorskip(package)
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    for module in absent:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.warns(RuntimeWarning) as caught:
        lam = LAM.from_pretrained(saved, backend=asked)
    assert lam.backend == lam.model.backend == used
    assert [warning.filename for warning in caught] == [__file__] * len(reasons)
    for warning, (failed, reason) in zip(caught, reasons.items(), strict=True):
        assert re.match(f"LAM's backend '{failed}' cannot be loaded, '{used}' is used instead: .*{reason}", str(warning.message))
    with pytest.raises(ImportError, match=f"'{asked}' {reasons[asked]}"):
        LAM.from_pretrained(saved, backend=asked, strict=True)


def test_no_backend_at_all(saved, monkeypatch):
    for module in ("torch", "jax", "cython_ext.lam_engine"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = r"'jax': .*needs jax.*'cython': .*needs the compiled kernels.*'torch': .*needs torch"
    with pytest.raises(ImportError, match=f"no backend that can be loaded: {reasons}"):
        LAM.from_pretrained(saved, backend="jax")


def test_nothing_else_gives_way(saved, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("runtime.lam.build", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="out of memory"):
            LAM.from_pretrained(saved)


def test_from_teacher(make_teacher, sentences, tmp_path):
    torch_arrays = make_teacher(tmp_path)
    lam, again, other = (LAM.from_teacher(tmp_path, backend="torch", seed=seed, strict=True) for seed in (4, 4, 5))
    assert lam.config.gelu_repeats == 1 and lam.config.max_length == 32768
    held, initial = lam.model.arrays(), runtime.init.init_arrays("lam", lam.config, 4)
    assert np.array_equal(held["blocks.1.ffn_in.weight"], torch_arrays["encoder.layer.1.intermediate.dense.weight"])
    assert np.array_equal(held["blocks.1.delta.q_proj.weight"], initial["blocks.1.delta.q_proj.weight"].astype(np.float32))
    embeddings = lam.encode(sentences)
    assert np.array_equal(again.encode(sentences), embeddings) and distance(other.encode(sentences), embeddings) > 1e-3
    lam.save(tmp_path / "student")
    assert np.array_equal(LAM.from_pretrained(tmp_path / "student", backend="torch").encode(sentences), embeddings)
    assert json.loads((tmp_path / "student" / "config.json").read_text())["config"]["gelu_repeats"] == 1
    with pytest.raises(FileExistsError, match="will not replace"):
        lam.save(tmp_path)
    assert LAM.from_teacher(tmp_path, backend="torch", dtype="float64").encode("").dtype == np.float64
