"""The ways back through the memory and the wave of WaveCore, compiled and in NumPy: against autograd of torch and finite differences."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.tests.examples import central_differences, poisoned_buffers, relative
from cython_ext.tests.test_cms import BOTH, RULES, SHAPES, WAVES, drawn, held, new, wave_arguments
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

FUNCTIONS = [
    ("cms", "read_backward"), ("cms", "write_backward"), ("cms", "write_lazy_backward"), ("wave", "wave_step_backward"),
    ("wave", "wave_scan_backward"),
]
# Two float64 forms of one formula differ by rounding alone.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; sums of a few hundred terms and an exponential of sums carry some, more so where they cancel, as a softmax's
# gradient does. 18 of them were the most seen (the gradient of a scale), in the kernel and in NumPy alike.
FLOAT32 = 40 * 2.0**-24
WAVE_NAMES = ("u", "carry", "dt", "b", "c", "a_raw", "b_base", "c_base", "d")
SIZES = [*SHAPES, (2, 9, 33, 7)]
# (B, L, I, S): channels of one block, of one and a bit, of several
LONGER_WAVES = [*WAVES, (2, 63, 65, 1), (1, 100, 5, 3), (1, 257, 3, 1)]


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


def reading(shape, scaled, dtype="float64"):
    """Gradients of attention and content, then query, memory, keys and a scale or None, by name."""
    batch, slots, width, key = shape
    memory, keys, _ = held(shape, dtype)
    return {
        "grad_attention": drawn(batch, slots, seed=20, dtype=dtype), "grad_content": drawn(batch, width, seed=21, dtype=dtype),
        "query": drawn(batch, key, seed=3, dtype=dtype), "memory": memory, "keys": keys, "scale": np.array(0.3, dtype) if scaled else None,
    }


def writing(shape, lazy, step=0, scale=0.3, dtype="float64"):
    """Gradients of memory and keys, then the arrays of a write, by name: gates on both sides of the threshold."""
    memory, keys, norms = held(shape, dtype)
    parts = {"memory": memory, "keys": keys} | ({"norms": norms, "scale": np.array(scale, dtype)} if lazy else {})
    gradients = {f"grad_{name}": drawn(*parts[name].shape, seed=30, dtype=dtype) for name in ("memory", "keys")}
    return gradients | parts | dict(zip(("value", "key", "gate"), new(shape, step, dtype), strict=True))


def waving(shape, dtype="float64"):
    batch, length, inner, states = shape
    gradients = drawn(batch, length, inner, seed=50, dtype=dtype), drawn(batch, inner, states, seed=51, dtype=dtype)
    return dict(zip(("grad_y", "grad_h", *WAVE_NAMES), (*gradients, *wave_arguments(shape, dtype)), strict=True))


def single(arguments):
    return {name: None if array is None else array.astype(np.float32) for name, array in arguments.items()}


def autograd(function, names, arguments, gradients, **options):
    """The gradient by every argument of `names`, of the sum of the outputs of a torch op times `gradients`; zero where torch has none."""
    import torch

    tensors = {name: None if array is None else torch.as_tensor(array.copy()) for name, array in arguments.items()}
    wanted = [tensors[name].requires_grad_() for name in names if tensors[name] is not None]
    outputs = function(*tensors.values(), **options)
    loss = sum((part * torch.as_tensor(gradient)).sum() for part, gradient in zip(outputs, gradients, strict=False))
    return [part.numpy() for part in torch.autograd.grad(loss, wanted, materialize_grads=True)]




@pytest.mark.parametrize("shape", SIZES)
def test_read_equals_autograd(shape):
    pytest.importorskip("torch")
    from torch_impl.ops import cms

    for scaled in (True, False):
        arguments = {name: None if array is None else array.astype(np.float32).astype(np.float64) for name, array in reading(shape, scaled).items()}
        gradients, inputs = list(arguments.values())[:2], dict(list(arguments.items())[2:])
        expected = autograd(cms.read, inputs, inputs, gradients)
        for room in (cython_ext.cms, reference.cms):
            found = room.read_backward(*arguments.values())
            assert (found[3] is None) == (not scaled)
            assert all(relative(a, b) < FLOAT64 for a, b in zip(found[:len(expected)], expected, strict=True))
            found = room.read_backward(*single(arguments).values())
            assert all(a.dtype == np.float32 and relative(a, b) < FLOAT32 for a, b in zip(found[:len(expected)], expected, strict=True))
            lone = room.read_backward(*(array if array is None else array[0] if array.ndim else array for array in arguments.values()))
            assert all(relative(a, b[0]) < FLOAT64 for a, b in zip(lone[:3], expected, strict=False))


@RULES
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_write_equals_autograd(shape, lazy, rule):
    """Open and shut gates, a scale that is kept and one that is folded."""
    pytest.importorskip("torch")
    from torch_impl.ops import cms

    function, options = "write_lazy" if lazy else "write", dict(rule=rule, threshold=0.5)
    opened = set()
    for step, scale in enumerate((0.3, 2.0**-10, 0.7)):
        arguments = writing(shape, lazy, step, scale)
        opened |= set((arguments["gate"] > 0.5).ravel().tolist())
        arguments = {name: array.astype(np.float32).astype(np.float64) for name, array in arguments.items()}
        gradients, inputs = list(arguments.values())[:2], dict(list(arguments.items())[2:])
        names = [name for name in inputs if name not in ("norms", "scale")]
        expected = autograd(lambda *tensors: getattr(cms, function)(*tensors, 0.25, **options), names, inputs, gradients)
        for room in (cython_ext.cms, reference.cms):
            back = getattr(room, f"{function}_backward")
            assert all(relative(a, b) < FLOAT64 for a, b in zip(back(*arguments.values(), 0.25, **options), expected, strict=True))
            *found, gate = back(*single(arguments).values(), 0.25, **options)
            assert all(a.dtype == np.float32 and relative(a, b) < FLOAT32 for a, b in zip(found, expected[:4], strict=True))
            # the gradient of a gate is a sum of terms that cancel: its rounding is measured against them
            terms = np.hypot(*(np.linalg.norm(expected[i] * arguments[name] / arguments["gate"]) for i, name in ((2, "value"), (3, "key"))))
            assert gate.dtype == np.float32 and np.linalg.norm(gate - expected[4]) <= FLOAT32 * terms
            lone = back(*(array[0] if array.ndim else array for array in arguments.values()), 0.25, **options)
            assert all(relative(a, b[0]) < FLOAT64 for a, b in zip(lone, expected, strict=True))
    assert opened == {True, False}


@pytest.mark.parametrize("shape", LONGER_WAVES)
def test_wave_equals_autograd(shape):
    torch = pytest.importorskip("torch")
    from torch_impl.ops.wave import selective_step

    def scan(u, carry, dt, b, c, *rest):
        outputs = []
        for t in range(u.shape[1]):
            y, carry = selective_step(u[:, t], carry, dt[:, t], b[:, t], c[:, t], *rest)
            outputs.append(y)
        return torch.stack(outputs, 1), carry

    arguments = {name: array.astype(np.float32).astype(np.float64) for name, array in waving(shape).items()}
    gradients, inputs = list(arguments.values())[:2], dict(list(arguments.items())[2:])
    expected = autograd(scan, inputs, inputs, gradients)
    for room in (cython_ext.wave, reference.wave):
        found = room.wave_scan_backward(*arguments.values())
        assert all(relative(a, b) < FLOAT64 for a, b in zip(found, expected, strict=True))
        found = room.wave_scan_backward(*single(arguments).values())
        assert all(a.dtype == np.float32 and relative(a, b) < FLOAT32 for a, b in zip(found, expected, strict=True))
        if shape[1] == 1:
            cut = {name: array[:, 0] if name in ("grad_y", "u", "dt", "b", "c") else array for name, array in arguments.items()}
            found = room.wave_step_backward(*cut.values())
            assert all(a.shape == cut[name].shape and relative(a, b.reshape(a.shape)) < FLOAT64
                       for name, a, b in zip(WAVE_NAMES, found, expected, strict=True))


def scalar_of(function, gradients, **options):
    """The sum of what `function` gives, or of the first arrays that it changes in place, times `gradients`."""
    def scalar(inputs):
        copies = [array if array is None else array.copy() for array in inputs.values()]
        outputs = function(*copies, **options)
        return sum((part * gradient).sum() for part, gradient in zip(copies if outputs is None else outputs, gradients, strict=False))

    return scalar


@BOTH
def test_gradients_equal_finite_differences(room):
    """The forward of the same room; a rule that chooses by norms, which the small steps of a difference do not turn over, in both forms."""
    cases = [("cms", "read", reading((2, 3, 4, 2), True), {}), ("wave", "wave_scan", waving((2, 3, 2, 2)), {})]
    for lazy in (False, True):
        for scale in (0.3, 2.0**-10):
            options = dict(decay=0.25, rule="least_salient", threshold=0.5)
            cases.append(("cms", "write_lazy" if lazy else "write", writing((3, 3, 4, 2), lazy, 0, scale), options))
    for module, function, arguments, options in cases:
        gradients, inputs = list(arguments.values())[:2], dict(list(arguments.items())[2:])
        forward, back = getattr(getattr(room, module), function), getattr(getattr(room, module), f"{function}_backward")
        names = [name for name in inputs if name not in ("norms", "scale") or function == "read"]
        scalar = scalar_of(forward, gradients, **options)
        for name, found in zip(names, back(*arguments.values(), **options), strict=True):
            # the error of a difference is near 1e-10, and 2**10 times that by value and key, whose gradient a folded scale multiplies
            assert relative(found, central_differences(scalar, inputs, name)) < 1e-7, (function, name)


def test_twins_share_signature_and_docstring():
    for module, name in FUNCTIONS:
        kernel, twin = (getattr(getattr(room, module), name) for room in (cython_ext, reference))
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


def ways_back(shape=(3, 7, 12, 5), dtype="float64"):
    """(module, function, arguments, options) of every way back; the wave has the batch of `shape` and its width as channels."""
    rule = dict(decay=0.1, rule="least_salient", threshold=0.5)
    waves = waving((shape[0], 4, shape[2], 2), dtype)
    cut = {name: array[:, 0] if name in ("grad_y", "u", "dt", "b", "c") else array for name, array in waves.items()}
    return [
        ("cms", "read_backward", reading(shape, True, dtype), {}), ("cms", "write_backward", writing(shape, False, dtype=dtype), rule),
        ("cms", "write_lazy_backward", writing(shape, True, dtype=dtype), rule), ("wave", "wave_scan_backward", waves, {}),
        ("wave", "wave_step_backward", cut, {}),
    ]


def ways_there(shape, dtype):
    """The same of what they are the ways back of."""
    return [
        (module, name.removesuffix("_backward"), dict(list(arguments.items())[2:]), options)
        for module, name, arguments, options in ways_back(shape, dtype)
    ]


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_nothing_given_is_changed(room, layout, dtype):
    for module, name, arguments, options in ways_back(dtype=dtype):
        function, before = getattr(getattr(room, module), name), {name: array.copy() for name, array in arguments.items()}
        plain = function(*arguments.values(), **options)
        laid = [LAYOUTS[layout](array) if array.ndim else array for array in arguments.values()]
        assert same_bits(function(*laid, **options), plain)
        assert same_bits(arguments.values(), before.values())


@BOTH
def test_buffers_full_of_nan_change_nothing(room, monkeypatch):
    expected = [getattr(getattr(room, module), name)(*arguments.values(), **options) for module, name, arguments, options in ways_back()]
    poisoned = poisoned_buffers(monkeypatch)
    for (module, name, arguments, options), exact in zip(ways_back(), expected, strict=True):
        assert same_bits(getattr(getattr(room, module), name)(*arguments.values(), **options), exact)
    assert poisoned


@BOTH
@pytest.mark.parametrize("lazy", [False, True])
def test_a_row_that_is_not_written_passes_its_gradient_and_gives_none(room, lazy):
    """A shut gate, a value and a key that are not finite: what was there keeps its gradient, and nothing else gets one."""
    function = room.cms.write_lazy_backward if lazy else room.cms.write_backward
    for name, spoil in (("gate", 0.2), ("value", np.nan), ("key", np.inf)):
        arguments = writing((2, 3, 5, 2), lazy)
        arguments["gate"][:] = 0.9
        arguments[name][0] = spoil
        to_memory, to_keys, *rest = function(*arguments.values(), 0.25, rule="least_salient", threshold=0.5)
        kept = 1.0 if lazy else 0.75
        assert np.array_equal(to_memory[0], kept * arguments["grad_memory"][0]) and np.array_equal(to_keys[0], kept * arguments["grad_keys"][0])
        assert not any(part[0].any() for part in rest) and all(part[1].any() for part in rest)


@BOTH
def test_chosen_rows_are_taken(room):
    arguments, chosen = writing((3, 4, 5, 2), True), (np.array([2, 0, 1]), np.array([True, False, True]))
    to_memory, _, to_value, _, _ = room.cms.write_lazy_backward(
        *arguments.values(), 0.25, rule="least_salient", threshold=0.5, chosen=chosen)
    changed = (to_memory != arguments["grad_memory"]).any(-1)
    assert changed.tolist() == [[False, False, True, False], [False] * 4, [False, True, False, False]]
    assert to_value.any(-1).tolist() == [True, False, True]


def test_nan_stays_nan():
    for room in (cython_ext, reference):
        for module, name, arguments, options in ways_back():
            arguments[next(iter(arguments))][0] = np.nan
            assert np.isnan(getattr(getattr(room, module), name)(*arguments.values(), **options)[0][0]).any()


def test_the_number_of_threads_changes_no_bit():
    shape, rule = (5, 220, 300, 100), dict(decay=0.1, rule="least_salient", threshold=0.5)
    arguments = [reading(shape, True, "float32"), writing(shape, False, dtype="float32"), writing(shape, True, dtype="float32")]
    waves = waving((5, 20, 300, 1), "float32")
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(5, arguments[0]["memory"].size) == threads
        assert threads_for(5, 30 * waves["u"].size) == threads
        results.append([
            *cython_ext.cms.read_backward(*arguments[0].values()), *cython_ext.cms.write_backward(*arguments[1].values(), **rule),
            *cython_ext.cms.write_lazy_backward(*arguments[2].values(), **rule), *cython_ext.wave.wave_scan_backward(*waves.values()),
        ])
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


BAD = [
    (0, "grad_attention", lambda a: a[:, :3], ValueError, r"grad_attention must have shape \(B, n\) = \(3, 7\), found \(3, 3\)"),
    (0, "grad_content", lambda a: a.astype(np.float32), TypeError, "grad_content must be float64, found float32"),
    (0, "memory", lambda a: a[:0], ValueError, r"memory must have shape \(B, n, d\) with no axis empty, found \(0, 7, 12\)"),
    (1, "grad_memory", lambda a: a[:2], ValueError, r"grad_memory must have shape \(B, n, d\) = \(3, 7, 12\), found \(2, 7, 12\)"),
    (1, "gate", lambda a: a[:, 0], ValueError, r"gate must have shape \(B, 1\) = \(3, 1\), found \(3,\)"),
    (2, "grad_keys", lambda a: None, TypeError, "grad_keys must be a NumPy array without a mask, found NoneType"),
    (2, "norms", lambda a: a[:, :3], ValueError, r"norms must have shape \(B, n\) = \(3, 7\), found \(3, 3\)"),
    (2, "scale", lambda a: np.ones(2), ValueError, r"scale must have shape \(\) = \(\), found \(2,\)"),
    (3, "u", lambda a: a[:, :0], ValueError, r"u must have shape \(B, L, I\) with no axis empty, found \(3, 0, 12\)"),
    (3, "grad_y", lambda a: a[:, :1], ValueError, r"grad_y must have shape \(B, L, I\) = \(3, 4, 12\), found \(3, 1, 12\)"),
    (4, "grad_h", lambda a: a[..., :1], ValueError, r"grad_h must have shape \(B, I, S\) = \(3, 12, 2\), found \(3, 12, 1\)"),
    (4, "u", lambda a: a[:0], ValueError, r"u must have shape \(B, I\) with no axis empty, found \(0, 12\)"),
]


@BOTH
@pytest.mark.parametrize(("call", "argument", "spoil", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(room, call, argument, spoil, error, message):
    module, name, arguments, options = ways_back()[call]
    with pytest.raises(error, match=message):
        getattr(getattr(room, module), name)(*{**arguments, argument: spoil(arguments[argument])}.values(), **options)
