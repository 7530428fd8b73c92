"""The memory and the wave of WaveCore, compiled and in NumPy: against torch, step after step, and what both promise about odd inputs."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.tests.examples import relative
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

BOTH = pytest.mark.parametrize("room", [cython_ext, reference], ids=["kernel", "reference"])
RULES = pytest.mark.parametrize("rule", ["least_salient", "slot0"])
FUNCTIONS = [("cms", "read"), ("cms", "write"), ("cms", "write_lazy"), ("wave", "wave_step"), ("wave", "wave_scan")]
# (B, n, d, d_k): single slots and channels, sizes below, at and above the lanes of a sum.
SHAPES = [(1, 1, 1, 1), (3, 3, 5, 2), (2, 63, 100, 17), (1, 100, 257, 63), (2, 257, 3, 100)]
# (B, L, I, S)
WAVES = [(1, 1, 1, 1), (3, 3, 63, 1), (2, 5, 100, 3), (1, 7, 257, 2)]
# Two float64 forms of one formula differ by rounding alone.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; sums of a few hundred terms and an exponential of sums carry some. 9 of them were the most seen.
FLOAT32 = 30 * 2.0**-24


def drawn(*shape, seed=0, dtype="float64"):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def held(shape, dtype="float64"):
    """memory, keys and norms."""
    batch, slots, width, key = shape
    memory = drawn(batch, slots, width, dtype=dtype)
    return memory, drawn(batch, slots, key, seed=1, dtype=dtype), np.square(memory).sum(-1)


def new(shape, step, dtype="float64"):
    """value, key and gate of a step, the gate on both sides of the threshold."""
    batch, _, width, key = shape
    gate = np.random.default_rng([7, step]).uniform(0.2, 0.9, (batch, 1)).astype(dtype)
    return drawn(batch, width, seed=10 + step, dtype=dtype), drawn(batch, key, seed=40 + step, dtype=dtype), gate


def wave_arguments(shape, dtype="float64"):
    batch, length, inner, states = shape
    sequences = [drawn(batch, length, inner, seed=seed, dtype=dtype) for seed in range(4)]
    sequences[1] = np.abs(sequences[1])
    bases = [drawn(inner, states, seed=seed, dtype=dtype) for seed in range(3)]
    u, dt, b, c = sequences
    return u, drawn(batch, inner, states, seed=9, dtype=dtype), dt, b, c, *bases, drawn(inner, dtype=dtype)


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize("shape", SHAPES)
def test_read_equals_reference_and_torch(shape):
    torch = pytest.importorskip("torch")
    from torch_impl.ops import cms

    memory, keys, _ = held(shape)
    query = drawn(shape[0], shape[3], seed=3)
    for scale in (None, np.array(0.3)):
        tensors = [value if value is None else torch.as_tensor(value) for value in (query, memory, keys, scale)]
        expected = [part.numpy() for part in cms.read(*tensors)]
        for room in (cython_ext, reference):
            for found, exact in zip(room.cms.read(query, memory, keys, scale), expected, strict=True):
                assert relative(found, exact) < FLOAT64
            single = [value if value is None else value.astype(np.float32) for value in (query, memory, keys, scale)]
            for found, exact in zip(room.cms.read(*single), expected, strict=True):
                assert found.dtype == np.float32 and relative(found, exact) < FLOAT32
            lone = room.cms.read(query[0], memory[0], keys[0], scale)
            assert all(relative(found, exact[0]) < FLOAT64 for found, exact in zip(lone, expected, strict=True))


@RULES
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_thirty_steps_equal_torch(shape, lazy, rule):
    """Half a share is lost every step, so that the scale is folded three times on the way."""
    torch = pytest.importorskip("torch")
    from torch_impl.ops import cms

    options = dict(rule=rule, threshold=0.5)
    memory, keys, norms = held(shape)
    rooms = {room: [memory.copy(), keys.copy(), *([norms.copy(), np.ones(())] if lazy else [])] for room in (cython_ext, reference)}
    expected = [torch.as_tensor(value) for value in (memory, keys, *((norms, np.ones(())) if lazy else ()))]
    function = "write_lazy" if lazy else "write"
    for step in range(30):
        arguments = new(shape, step)
        expected = getattr(cms, function)(*expected, *map(torch.as_tensor, arguments), 0.5, **options)
        for room, parts in rooms.items():
            assert getattr(room.cms, function)(*parts, *arguments, 0.5, **options) is None
            assert all(relative(part, exact.numpy()) < FLOAT64 for part, exact in zip(parts, expected, strict=True)), step


@BOTH
def test_lazy_equals_full(room):
    shape, options = (2, 7, 12, 5), dict(rule="least_salient", threshold=0.5)
    memory, keys, norms = held(shape)
    full, lazy = [memory.copy(), keys.copy()], [memory.copy(), keys.copy(), norms, np.ones(())]
    for step in range(300):
        row = np.random.default_rng(step).integers(0, 7, 2)
        chosen = row, np.random.default_rng([step, 1]).random(2) < 0.5
        arguments = new(shape, step)
        room.cms.write(*full, *arguments, 0.1, **options, chosen=chosen)
        room.cms.write_lazy(*lazy, *arguments, 0.1, **options, chosen=chosen)
        if step % 50 == 49:
            assert relative(lazy[3] * lazy[0], full[0]) < 1e-11 and relative(lazy[3] * lazy[1], full[1]) < 1e-11  # the bound of the specification


@BOTH
def test_an_empty_memory_fills_in_order_and_a_gate_at_the_threshold_is_shut(room):
    memory, keys, norms, scale = np.zeros((1, 4, 3)), np.zeros((1, 4, 2)), np.zeros((1, 4)), np.ones(())
    for step in range(4):
        arguments = (np.ones((1, 3)), np.ones((1, 2)))
        room.cms.write_lazy(memory, keys, norms, scale, *arguments, np.array([[0.5]]), 0.1, rule="least_salient", threshold=0.5)
        assert np.array_equal(memory[0].any(-1), np.arange(4) < step)
        room.cms.write_lazy(memory, keys, norms, scale, *arguments, np.array([[0.6]]), 0.1, rule="least_salient", threshold=0.5)
        assert np.array_equal(memory[0].any(-1), np.arange(4) <= step) and np.array_equal(keys[0].any(-1), np.arange(4) <= step)


@BOTH
@RULES
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_never_written(room, rule, place, value):
    shape = (2, 5, 19, 3)
    memory, keys, norms = held(shape)
    arguments = [part.copy() for part in new(shape, 0)]
    arguments[2][:] = 0.8
    arguments[place][1, -1] = value
    lazy, full, scale = [memory.copy(), keys.copy(), norms.copy()], [memory.copy(), keys.copy()], np.ones(())
    room.cms.write_lazy(*lazy, scale, *arguments, 0.1, rule=rule, threshold=0.5)
    room.cms.write(*full, *arguments, 0.1, rule=rule, threshold=0.5)
    assert all(np.isfinite(part).all() for part in (*lazy, *full))
    assert same_bits([lazy[0][1]], [memory[1]]) and not np.array_equal(lazy[0][0], memory[0])
    assert relative(full[1][1], 0.9 * keys[1]) < FLOAT64


@pytest.mark.parametrize("shape", WAVES)
def test_wave_equals_reference_and_torch(shape):
    torch = pytest.importorskip("torch")
    from torch_impl.ops.wave import selective_step

    arguments = wave_arguments(shape)
    u, carry, dt, b, c, *rest = map(torch.as_tensor, arguments)
    outputs = []
    for t in range(shape[1]):
        y, carry = selective_step(u[:, t], carry, dt[:, t], b[:, t], c[:, t], *rest)
        outputs.append(y)
    expected = torch.stack(outputs, 1).numpy(), carry.numpy()
    for room in (cython_ext, reference):
        assert all(relative(a, b) < FLOAT64 for a, b in zip(room.wave.wave_scan(*arguments), expected, strict=True))
        single = room.wave.wave_scan(*(value.astype(np.float32) for value in arguments))
        assert all(a.dtype == np.float32 and relative(a, b) < FLOAT32 for a, b in zip(single, expected, strict=True))
        h, pieces = arguments[1], []
        for t in range(shape[1]):
            y, h = room.wave.wave_step(arguments[0][:, t], h, *(value[:, t] for value in arguments[2:5]), *arguments[5:])
            pieces.append(y)
        assert same_bits([np.stack(pieces, 1), h], room.wave.wave_scan(*arguments))


def test_twins_share_signature_and_docstring():
    for module, name in FUNCTIONS:
        kernel, twin = (getattr(getattr(room, module), name) for room in (cython_ext, reference))
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_what_is_only_read_gives_the_same_bits(room, layout, dtype):
    shape, lay = (3, 7, 5, 4), LAYOUTS[layout]
    memory, keys, norms = held(shape, dtype)
    query, arguments = drawn(3, 4, dtype=dtype), new(shape, 0, dtype)
    assert same_bits(room.cms.read(lay(query), lay(memory), lay(keys)), room.cms.read(query, memory, keys))
    results = []
    for given in (arguments, [lay(part) for part in arguments]):
        parts = [memory.copy(), keys.copy(), norms.copy(), np.ones((), dtype)]
        room.cms.write_lazy(*parts, *given, 0.1, rule="least_salient", threshold=0.5)
        results.append(parts)
    assert same_bits(*results)
    waves = wave_arguments((3, 4, 5, 2), dtype)
    assert same_bits(room.wave.wave_scan(*map(lay, waves)), room.wave.wave_scan(*waves))
    with pytest.raises(ValueError, match="memory is changed in place and must be C-contiguous, aligned and writeable"):
        room.cms.write(lay(memory), keys.copy(), *arguments, 0.1, rule="slot0", threshold=0.5)


def test_the_number_of_threads_changes_no_bit():
    shape = (5, 220, 300, 100)
    memory, keys, _ = held(shape, "float32")
    query, waves = drawn(5, 100, dtype="float32"), wave_arguments((5, 200, 300, 1), "float32")
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(5, memory.size + keys.size) == threads
        parts = [memory.copy(), keys.copy()]
        cython_ext.cms.write(*parts, *new(shape, 0, "float32"), 0.1, rule="least_salient", threshold=0.5)
        results.append([*cython_ext.cms.read(query, memory, keys), *parts, *cython_ext.wave.wave_scan(*waves)])
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


def arguments_of(name):
    shape = (2, 7, 12, 5)
    memory, keys, norms = held(shape)
    value, key, gate = new(shape, 0)
    if name == "read":
        return dict(query=drawn(2, 5), memory=memory, keys=keys, scale=None)
    lazy = dict(norms=norms, scale=np.ones(())) if name == "write_lazy" else {}
    return dict(memory=memory, keys=keys, **lazy, value=value, key=key, gate=gate, decay=0.1, rule="least_salient", threshold=0.5, chosen=None)


BAD = [
    ("read", "query", lambda a: a[:, :4], ValueError, r"query must have shape \(B, d_k\) = \(2, 5\), found \(2, 4\)"),
    ("read", "memory", lambda a: a[:0], ValueError, r"memory must have shape \(B, n, d\) with no axis empty, found \(0, 7, 12\)"),
    ("read", "keys", lambda a: a[:, :3], ValueError, r"keys must have shape \(B, n, d_k\) = \(2, 7, 5\), found \(2, 3, 5\)"),
    ("read", "scale", lambda a: np.ones(2), ValueError, r"scale must have shape \(\) = \(\), found \(2,\)"),
    ("write", "value", lambda a: a.astype(np.float32), TypeError, "value must be float64, found float32"),
    ("write", "gate", lambda a: a[:, 0], ValueError, r"gate must have shape \(B, 1\) = \(2, 1\), found \(2,\)"),
    ("write", "decay", lambda a: 1.0, ValueError, r"decay must lie in \(0, 1\), found 1.0"),
    ("write", "rule", lambda a: "first", ValueError, "rule must be 'slot0' or 'least_salient', found 'first'"),
    ("write", "chosen", lambda a: (np.array([0, 7]), np.array([True, True])), ValueError, r"row of chosen must lie in \[0, 7\), found \[0, 7\]"),
    ("write", "chosen", lambda a: 3, TypeError, r"chosen must be a pair \(row, open\) or None, found int"),
    ("write_lazy", "norms", lambda a: a[:, :3], ValueError, r"norms must have shape \(B, n\) = \(2, 7\), found \(2, 3\)"),
    ("write_lazy", "scale", lambda a: 1.0, TypeError, "scale must be a NumPy array without a mask, found float"),
]


@BOTH
@pytest.mark.parametrize(("name", "argument", "spoil", "error", "message"), BAD)
def test_bad_input_is_refused_by_name_and_changes_nothing(room, name, argument, spoil, error, message):
    arguments = arguments_of(name)
    before = arguments["memory"].copy()
    with pytest.raises(error, match=message):
        getattr(room.cms, name)(**{**arguments, argument: spoil(arguments[argument])})
    assert np.array_equal(arguments["memory"], before)


@BOTH
@pytest.mark.parametrize(("index", "spoil", "message"), [
    (0, lambda a: a[:, :0], r"u must have shape \(B, L, I\) with no axis empty, found \(2, 0, 5\)"),
    (1, lambda a: a[..., :1], r"carry must have shape \(B, I, S\) = \(2, 5, 3\), found \(2, 5, 1\)"),
    (5, lambda a: a[:4], r"a_raw must have shape \(I, S\) = \(5, 3\), found \(4, 3\)"),
    (8, lambda a: a[:4], r"d must have shape \(I\) = \(5,\), found \(4,\)"),
])
def test_bad_waves_are_refused_by_name(room, index, spoil, message):
    arguments = list(wave_arguments((2, 4, 5, 3)))
    arguments[index] = spoil(arguments[index])
    with pytest.raises(ValueError, match=message):
        room.wave.wave_scan(*arguments)
