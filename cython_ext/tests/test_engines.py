"""The three engines on random configurations against the torch modules, in any split and any batch; their memory; two of them at once.

Fixed configurations, golden files and what is refused: test_mamba_engine, test_wavecore_engine and test_lam_engine. What GroundedMamba makes of
random configurations in one call, and a token at a time, is there too.
"""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.models import LamConfig, WaveCoreConfig
from cython_ext.tests import test_lam_engine as lam
from cython_ext.tests import test_mamba_engine as mamba
from cython_ext.tests import test_wavecore_engine as core
from cython_ext.tests.examples import relative
from runtime.init import init_arrays

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
# The bound that the project promises between two backends in float64, end to end.
END_TO_END = 1e-11
# Of a row's own values in another batch: the rounding of the sums of one more block, through two layers that normalise.
OWN = 1e-12
WIDTHS = (19, 17, 22)  # observation, action and output of `test_wavecore_engine`


def randomised(name, config, seed):
    """Weights in which no leaf is zero or one."""
    generator = np.random.default_rng(seed)
    return {key: value + 0.1 * generator.standard_normal(value.shape) for key, value in init_arrays(name, config, seed).items()}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@st.composite
def encoders(draw):
    heads, width = draw(st.sampled_from([(1, 2), (2, 3), (3, 11), (2, 32), (5, 13), (1, 65)]))
    return LamConfig(
        vocab_size=draw(st.sampled_from([2, 67])), dim=heads * width, heads=heads, depth=draw(st.integers(1, 2)),
        ffn_dim=draw(st.sampled_from([1, 15, 16, 33, 130])), max_positions=draw(st.sampled_from([2, 9, 40])), max_length=64,
        chunk_size=draw(st.sampled_from([1, 3, 16, 64])), transform=draw(st.sampled_from(["lam", "exact"])),
        gelu_repeats=draw(st.integers(1, 3)), norm_eps=draw(st.sampled_from([1e-12, 1e-2])), rms_eps=draw(st.sampled_from([1e-6, 1e-2])))


@SETTINGS
@given(encoders(), st.integers(0, 99), st.lists(st.integers(1, 41), min_size=1, max_size=4), st.integers(0, 3))
def test_lam_on_random_configurations_in_any_batch(config, seed, lengths, padding):
    torch = pytest.importorskip("torch")
    from torch_impl.lam import LAM

    arrays, generator = randomised("lam", config, seed), np.random.default_rng(seed)
    mask = np.arange(max(lengths) + padding) < np.array(lengths)[:, None]
    ids = generator.integers(0, config.vocab_size, mask.shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = LAM(config, impl="recurrent").double()
        module.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
        expected = module(torch.from_numpy(ids), torch.from_numpy(mask))
    encoder = lam.engine(config, arrays)
    found = encoder(ids, mask)
    assert relative(found.last_hidden_state, expected.last_hidden_state.numpy()) < END_TO_END
    assert relative(found.embedding, expected.embedding.numpy()) < END_TO_END
    order = generator.permutation(len(lengths))
    turned = encoder(ids[order], mask[order])
    for row, length in enumerate(lengths):
        assert relative(encoder(ids[row : row + 1, :length]).embedding[0], found.embedding[row]) < OWN
        assert relative(turned.embedding[int(np.flatnonzero(order == row)[0])], found.embedding[row]) < OWN
    assert all(np.array_equal(value, arrays[name]) for name, value in encoder.arrays().items())


@st.composite
def cores(draw):
    levels = draw(st.integers(1, 3))
    states, selective = draw(st.sampled_from([1, 3])), draw(st.booleans())
    sizes = st.sampled_from([1, 3, 16, 33])
    return WaveCoreConfig(
        d_s=draw(sizes), d_w=states * draw(st.sampled_from([1, 5, 22])) if selective else draw(st.sampled_from([4, 19])), d_p=draw(sizes),
        d_e=draw(st.sampled_from([4, 11, 65])), d_k=draw(sizes), d_c=draw(sizes), num_levels=levels,
        cms_sizes=tuple(draw(st.sampled_from([1, 3, 17])) for _ in range(levels)), cms_dims=tuple(draw(sizes) for _ in range(levels)),
        cms_decays=(0.4, 0.2, 0.05)[:levels], mamba_state_dim=states if selective else 1, use_mamba_wave=selective,
        heads=draw(st.sampled_from([("action",), ("value", "world_model"), ("action", "value", "world_model")])),
        output_type=draw(st.sampled_from(["continuous", "discrete"])), cms_write=draw(st.sampled_from(["least_salient", "slot0"])),
        state_saturation_limit=draw(st.sampled_from([0.0, 1.0, 10.0])), salience_threshold=draw(st.sampled_from([0.2, 0.5])))


@SETTINGS
@given(cores(), st.integers(0, 99), st.sampled_from([None, 1, 3]), st.lists(st.integers(1, 8), max_size=3, unique=True))
def test_wavecore_on_random_configurations_in_any_split(config, seed, batch, cuts):
    torch = pytest.importorskip("torch")
    from torch_impl.wavecore import WaveCore

    config, inputs = config.sized(*WIDTHS), core.observed(9, batch)
    arrays = randomised("wavecore", config, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = WaveCore(config, *WIDTHS).double()
        module.load_state_dict({key: torch.as_tensor(value) for key, value in arrays.items()})
        y, state, info = module.rollout(module.init_state(batch), *map(torch.as_tensor, inputs))
    expected = core.flat(info) | ({} if y is None else {"y": y})
    found = core.engine(config, arrays, "float64", batch=batch)
    pieces = []
    for low, high in pairwise([0, *sorted(cuts), 9]):
        outputs, values = found.rollout(*(value[low:high] for value in inputs))
        pieces.append(core.flat(values) | ({} if outputs is None else {"y": outputs}))
    assert pieces[0].keys() == expected.keys()
    for key, value in expected.items():
        assert relative(np.concatenate([piece[key] for piece in pieces]), value.numpy()) < END_TO_END, key
    parts = found.state_arrays()
    for kind in ("memories", "keys", "norms", "scales"):
        assert all(relative(parts[f"{kind}.{level}"], part.numpy()) < END_TO_END for level, part in enumerate(getattr(state, kind)))


@SETTINGS
@given(mamba.configs(), st.integers(0, 99), st.sampled_from([1, 3]), st.lists(st.integers(1, 18), max_size=4, unique=True), st.data())
def test_grounded_mamba_on_random_configurations_in_any_split(config, seed, batch, cuts, data):
    """Every piece by a call, by `prefill`, or a token at a time by `decode`, as it is drawn."""
    weights, ids = mamba.weights_of(config, seed), mamba.ids_of(config, batch, 19, seed)
    logits, expected = mamba.torch_results(config, weights, ids)
    engine = mamba.engine_of(config, weights)
    states = engine.init_states(batch)
    for low, high in pairwise([0, *sorted(cuts), 19]):
        way = data.draw(st.sampled_from(["call", "prefill", "decode"]))
        if way == "call":
            found, states = engine(ids[:, low:high], states)
            assert relative(found, logits[:, low:high]) < END_TO_END
            last = found[:, -1]
        elif way == "prefill":
            last, states = engine.prefill(ids[:, low:high], states)
        else:
            for token in ids[:, low:high].T:
                last = engine.decode(token, states)
        assert relative(last, logits[:, high - 1]) < END_TO_END
    mamba.assert_close((last, states), (logits[:, -1], expected), END_TO_END)


def test_ten_thousand_sentences_in_constant_memory():
    config, arrays = lam.made(dict(depth=1, dim=6, heads=2))
    encoder, (ids, mask) = lam.engine(config, arrays, "float32"), lam.sentences(config, [7, 4])
    for _ in range(500):
        encoder(ids, mask)
    before = resident()
    for _ in range(10_000):
        found = encoder(ids, mask)
    assert resident() - before < 1 << 20
    assert np.isfinite(found.embedding).all()


def test_two_engines_of_a_kind_in_two_python_threads():
    """Sizes above those from which a kernel wakes threads of its own. WaveCore's are in test_wavecore_engine."""
    config, arrays = lam.made(dict(dim=96, heads=4, ffn_dim=520, max_positions=300, chunk_size=64))
    encoders = [lam.engine(config, arrays, dtype) for dtype in ("float32", "float64")]
    ids, mask = lam.sentences(config, [150, 130])
    model = mamba.GroundedMambaConfig(vocab_size=300, dim=128, depth=1, rwkv_heads=2, memory_size=70)
    decoders = [mamba.engine_of(model, mamba.weights_of(model, seed)) for seed in (1, 2)]
    tokens = mamba.ids_of(model, 2, 60)
    jobs = [lambda one=one: one(ids, mask).embedding for one in encoders] + [lambda one=one: one(tokens)[0] for one in decoders]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        futures = [(at, pool.submit(jobs[at])) for at in (0, 1, 2, 3) * 4]
        assert all(np.array_equal(future.result(), expected[at]) for at, future in futures)
