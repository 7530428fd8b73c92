"""The engine of LAM: against the torch module on awkward sizes, whatever the padding, the threads and the calls before, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cython_ext
from conf.models import LamConfig
from cython_ext.tests.examples import relative
from runtime.init import init_arrays

LamEngine = cython_ext.kernel("lam_engine").LamEngine
SIZES = ("heads", "depth", "chunk_size", "transform", "max_length", "gelu_repeats", "norm_eps", "rms_eps")
BASE = dict(vocab_size=61, dim=30, heads=3, depth=2, ffn_dim=23, max_positions=13, max_length=400, chunk_size=5)
# Widths of 1, below and above a block of 256 columns; heads of one channel; sentences on both sides of the ends of chunks and positions.
CONFIGS = [
    ({}, [16, 11, 1]),
    (dict(transform="exact", gelu_repeats=1, depth=1), [13, 14, 3]),
    (dict(dim=1, heads=1, ffn_dim=1, chunk_size=64, max_positions=2), [63, 1]),
    (dict(dim=100, heads=100, ffn_dim=257, chunk_size=63, max_positions=100), [130, 100, 101]),
    (dict(dim=63, heads=7, ffn_dim=300, chunk_size=64, max_positions=257, gelu_repeats=3), [257, 300, 63, 64, 65]),
]
# The bound that the project promises between two backends in float64, end to end.
END_TO_END = 1e-11


def made(changes=None):
    """A configuration and weights in which no leaf is zero or one."""
    config, generator = LamConfig(**{**BASE, **(changes or {})}), np.random.default_rng(4)
    return config, {key: value + 0.1 * generator.standard_normal(value.shape) for key, value in init_arrays("lam", config, 4).items()}


def engine(config, arrays, dtype="float64"):
    return LamEngine(arrays, dtype=dtype, **{name: getattr(config, name) for name in SIZES})


def sentences(config, lengths):
    """Ids (B, L), random at padded positions too, and the mask."""
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (len(lengths), max(lengths)))
    return ids, np.arange(max(lengths)) < np.array(lengths)[:, None]


@pytest.fixture
def threads():
    """set_num_threads, back to the default afterwards."""
    yield cython_ext.set_num_threads
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize("changes, lengths", CONFIGS)
def test_engine_is_the_torch_module(changes, lengths):
    torch = pytest.importorskip("torch")
    from torch_impl.lam import LAM

    config, arrays = made(changes)
    ids, mask = sentences(config, lengths)
    module = LAM(config, impl="recurrent").double()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
    with torch.no_grad():
        expected = module(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True)
        whole = module(torch.from_numpy(ids))
    encoder = engine(config, arrays)
    found = encoder(ids, mask.astype(np.int64), output_hidden_states=True)
    assert found._fields == expected._fields and len(found.hidden_states) == config.depth + 1
    pairs = zip((*found[:2], *found.hidden_states), (*expected[:2], *expected.hidden_states), strict=True)
    for value, other in pairs:
        assert value.dtype == np.float64 and value.shape == tuple(other.shape) and relative(value, other.numpy()) < END_TO_END
    assert not found.last_hidden_state[~mask].any() and not any(hidden[~mask].any() for hidden in found.hidden_states)
    assert relative(encoder(ids).last_hidden_state, whole.last_hidden_state.numpy()) < END_TO_END
    single = engine(config, arrays, "float32")(ids, mask)
    # float32: some hundred roundings through two layers that normalise; a width of one normalises away all but the rounding
    assert single.embedding.dtype == np.float32 and (config.dim == 1 or relative(single.embedding, expected.embedding.numpy()) < 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_embedding_is_the_sentences_own(dtype):
    config, arrays = made(CONFIGS[4][0])
    ids, mask = sentences(config, CONFIGS[4][1])
    encoder = engine(config, arrays, dtype)
    together = encoder(ids, mask).embedding
    ids[~mask] = 0
    assert np.array_equal(encoder(ids, mask).embedding, together)  # padding is not read
    wider = [np.pad(value, ((0, 0), (0, 37))) for value in (ids, mask)]
    assert np.array_equal(encoder(*wider).embedding, together)  # the same valid tokens, the same sums
    for row, length in enumerate(CONFIGS[4][1]):
        alone = encoder(ids[row : row + 1, :length]).embedding[0]
        assert relative(alone, together[row]) < 1e3 * np.finfo(dtype).eps  # another number of rows, other sums


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_and_earlier_calls_change_no_bit(threads, dtype):
    config, arrays = made(dict(dim=96, heads=4, ffn_dim=520, max_positions=300, chunk_size=64))
    ids, mask = sentences(config, [300, 280, 63, 64])
    encoder = engine(config, arrays, dtype)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(encoder(ids, mask))
    assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(other[:2], found[0][:2], strict=True))
    for buffer in encoder._buffers.values():
        buffer.fill(np.nan)
    assert np.array_equal(encoder(ids[:2, :7]).last_hidden_state, engine(config, arrays, dtype)(ids[:2, :7]).last_hidden_state)
    again = encoder(ids, mask)
    assert np.array_equal(again.last_hidden_state, found[0].last_hidden_state)
    assert not np.shares_memory(again.last_hidden_state, encoder(ids, mask).last_hidden_state)


def test_two_python_threads_do_not_disturb_each_other():
    config, arrays = made()
    encoder, (ids, mask) = engine(config, arrays), sentences(config, [16, 11, 1])
    expected = encoder(ids, mask).embedding, encoder(ids[:, :9]).embedding
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: encoder(ids, mask).embedding if i % 2 == 0 else encoder(ids[:, :9]).embedding, range(40)))
    assert all(np.array_equal(value, expected[i % 2]) for i, value in enumerate(found))


def test_nan_stays_nan():
    config, arrays = made()
    arrays["word_embeddings.weight"][7] = np.nan
    ids = np.full((2, 6), 5)
    ids[1, 3] = 7
    found = engine(config, arrays)(ids)
    assert np.isnan(found.embedding[1]).all() and np.isfinite(found.embedding[0]).all()


def test_the_arrays_are_copied():
    config, arrays = made()
    for value in arrays.values():
        value.flags.writeable = False
    encoder, ids = engine(config, arrays), sentences(config, [9])[0]
    before = encoder(ids).embedding
    for value in arrays.values():
        value.flags.writeable = True
        value.fill(7.0)
    assert np.array_equal(encoder(ids).embedding, before)


@pytest.mark.parametrize("ids, mask, message", [
    ([[3, 61]], None, r"input_ids .*\[0, 61\), found 61"),
    ([[3, -1]], None, r"input_ids .*\[0, 61\), found -1"),
    ([3, 4], None, r"input_ids must have shape \(batch, length\).*found \(2,\)"),
    (np.zeros((0, 4), int), None, r"input_ids must have shape .*found \(0, 4\)"),
    (np.zeros((2, 0), int), None, r"input_ids must have shape .*found \(2, 0\)"),
    ([[0.5]], None, "input_ids must be integers, found float64"),
    (np.zeros((1, 401), int), None, "at most max_length=400 tokens, found 401"),
    ([[1, 2]], [[1, 1, 1]], r"attention_mask must have the shape of input_ids, \(1, 2\), found \(1, 3\)"),
    ([[1, 2, 3]], [[1, 0, 1]], "attention_mask: row 0 has padding before a valid token"),
    ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "attention_mask: row 1 has no valid token"),
])
def test_bad_input(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        engine(*made())(ids, mask)


@pytest.mark.parametrize("change, options, error, message", [
    (lambda a: a.pop("blocks.1.ffn_out.bias"), {}, ValueError, r"missing blocks\.1\.ffn_out\.bias$"),
    (lambda a: a.update(extra=np.zeros(3)), {}, ValueError, "unused extra$"),
    (lambda a: a.update({"embedding_norm.bias": np.zeros(3)}), {}, ValueError, r"embedding_norm\.bias must have shape \(30,\), found \(3,\)"),
    (lambda a: a.pop("word_embeddings.weight"), {}, ValueError, r"word_embeddings\.weight'\] must have 2 axes, none of them empty, found none"),
    (lambda a: None, dict(heads=7), ValueError, "heads must divide the width 30, found 7"),
    (lambda a: None, dict(depth=0), ValueError, "depth must be an integer of at least 1, found 0"),
    (lambda a: None, dict(heads=True), TypeError, "heads must be an integer of at least 1, found True"),
    (lambda a: None, dict(dtype="float16"), ValueError, "dtype must be 'float32' or 'float64', found 'float16'"),
])
def test_bad_arrays_and_sizes(change, options, error, message):
    _, arrays = made()
    change(arrays)
    with pytest.raises(error, match=message):
        LamEngine(arrays, **{"heads": 3, "depth": 2, **options})


def test_no_framework_in_the_process():
    code = (
        "import sys\nimport numpy as np\nfor name in ('torch', 'jax', 'flax', 'transformers'): sys.modules[name] = None\n"
        "from cython_ext.tests.test_lam_engine import engine, made\n"
        "print(engine(*made())(np.ones((2, 9), int)).embedding.shape, 'torch_impl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cython_ext.__file__).parent.parent, check=False)
    assert done.stdout.strip() == "(2, 30) False", done.stderr
