"""The compiled hierarchical delta rule as a torch op: equal to both torch forms, compilable, and honest about when it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cython_ext
from cython_ext.tests.examples import converted, delta_arguments
from torch_impl.ops import compiled
from torch_impl.ops.delta_rule import hierarchical_delta_rule

NAME = "hierarchical_delta_rule"
# Two float64 forms of one formula differ by some tens of roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; either form carries 7 of them at most (see the kernel's own tests), and three times that is allowed to each.
FLOAT32 = 2 * 21 * 2.0**-24

SHAPES = [(1, 1, 1, 5, 64), (3, 2, 3, 6, 7), (2, 3, 65, 5, 64), (3, 2, 100, 9, 16)]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def tensors(shape=(2, 3, 19, 5, 7), dtype="float64", initial_state=True, masked=True):
    return converted(torch.from_numpy, delta_arguments(shape, dtype, initial_state, masked))


def each(function, arguments):
    """`arguments` with `function` applied to every floating tensor, those in tuples too."""
    def change(value):
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: change(value) for name, value in arguments.items()}


def leaves(arguments):
    found: list[Tensor] = []
    each(found.append, arguments)
    return found


def run(function, arguments, **changes):
    o, (fast, slow) = function(**{**arguments, **changes})
    return [o, fast, slow]


def close(found, expected, bound):
    norm = torch.linalg.vector_norm
    return all(a.dtype == b.dtype and norm(a - b) < bound * norm(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("transform", ["lam", "exact"])
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_both_torch_forms(shape, dtype, bound, initial_state, transform):
    for masked in (True, False):
        arguments = tensors(shape, dtype, initial_state, masked)
        compiled.reset_kernel_calls()
        found = run(compiled.hierarchical_delta_rule, arguments, transform=transform)
        assert compiled.kernel_calls(NAME) == compiled.kernel_calls() == 1
        for impl in ("recurrent", "chunked"):
            assert close(found, run(hierarchical_delta_rule, arguments, transform=transform, impl=impl), bound)
        assert compiled.kernel_calls() == 1  # the torch forms run no kernel


@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(initial_state, masked):
    arguments = tensors((2, 3, 11, 5, 4), initial_state=initial_state, masked=masked)
    states = list(arguments.pop("initial_state") or ())
    size = arguments.pop("chunk_size")
    *inputs, mask = arguments.values()
    inputs = [list(value) if isinstance(value, tuple) else value for value in inputs]
    torch.library.opcheck(torch.ops.groundwave.hierarchical_delta_rule.default, (*inputs, mask, states, size, "lam"))


def test_compiles_without_a_graph_break():
    """One graph for several lengths, equal to eager, and the kernel really runs in it; "aot_eager" traces all and generates no C++."""
    torch._dynamo.reset()
    function = torch.compile(compiled.hierarchical_delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
    for calls, length in enumerate((19, 30), start=1):
        arguments = tensors((2, 3, length, 5, 7))
        with torch.no_grad():
            found = run(function, arguments)
        assert compiled.kernel_calls(NAME) == calls
        assert close(found, run(hierarchical_delta_rule, arguments), FLOAT64)
    torch._dynamo.reset()


def loss(outputs):
    return sum((part**3).sum() for part in outputs)


@pytest.mark.parametrize("name", ["v", "token_mlp", "temp", "initial_state"])
def test_where_a_gradient_is_wanted_the_torch_form_runs_or_the_kernel_refuses(monkeypatch, name):
    arguments = tensors()
    wanted = leaves({name: arguments[name]})
    for tensor in wanted:
        tensor.requires_grad_()
    found, expected = (torch.autograd.grad(loss(run(f, arguments)), wanted) for f in (compiled.hierarchical_delta_rule, hierarchical_delta_rule))
    assert close(found, expected, FLOAT64) and compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match="GROUNDWAVE_KERNELS=compiled, but the kernel delta_rule has no gradient and an argument requires one"):
        compiled.hierarchical_delta_rule(**arguments)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            outputs = run(compiled.hierarchical_delta_rule, arguments)
        assert not any(output.requires_grad for output in outputs)
    assert compiled.kernel_calls(NAME) == 2


def test_transforms_of_torch_func_run_the_torch_form(monkeypatch):
    arguments = tensors()

    def of_v(function):
        return lambda v: loss(run(function, arguments, v=v))

    found, expected = (torch.func.grad(of_v(f))(arguments["v"]) for f in (compiled.hierarchical_delta_rule, hierarchical_delta_rule))
    assert close([found], [expected], FLOAT64)
    batch = torch.stack([arguments["v"], 2 * arguments["v"]])
    found, expected = (torch.func.vmap(of_v(f))(batch) for f in (compiled.hierarchical_delta_rule, hierarchical_delta_rule))
    assert close([found], [expected], FLOAT64) and compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=r"the kernel delta_rule has no rule for the transforms of torch\.func"):
        torch.func.vmap(of_v(compiled.hierarchical_delta_rule))(batch)


def test_memory_is_shared_and_not_copied(monkeypatch):
    seen = {}
    kernel = cython_ext.delta_rule

    class Watched:
        @staticmethod
        def hierarchical_forward(*arguments):
            o, states = kernel.hierarchical_forward(*arguments)
            flat = [array for argument in arguments for array in (argument if isinstance(argument, tuple) else (argument,))]
            seen["inputs"] = [array.ctypes.data for array in flat if hasattr(array, "ctypes")]
            seen["outputs"] = [array.ctypes.data for array in (o, *states)]
            return o, states

    monkeypatch.setattr(cython_ext, "kernel", lambda name: Watched)
    arguments = tensors()
    outputs = run(compiled.hierarchical_delta_rule, arguments)
    *heads, fast, slow = leaves(arguments)
    assert seen["inputs"] == [tensor.data_ptr() for tensor in (*heads, arguments["mask"], fast, slow)]
    assert seen["outputs"] == [tensor.data_ptr() for tensor in outputs]


def test_views_are_taken_as_they_are():
    arguments = tensors()
    plain = run(compiled.hierarchical_delta_rule, arguments)
    views = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "beta")}
    assert not views["q"].is_contiguous()
    assert all(map(torch.equal, run(compiled.hierarchical_delta_rule, arguments, **views), plain))


def spoilt(kind):
    """Inputs that the kernel cannot take, and the words in which it says so."""
    arguments = tensors()
    if kind == "device":
        meta = each(lambda tensor: tensor.to("meta"), arguments)
        return {**meta, "mask": arguments["mask"].to("meta")}, "needs tensors on the CPU, found meta"
    if kind == "mask":
        return {**arguments, "mask": arguments["mask"].to("meta")}, "needs tensors on the CPU, found cpu and meta"
    if kind == "dtype":
        return each(Tensor.bfloat16, arguments), "all float32 or all float64, found torch.bfloat16"
    return {**arguments, "temp": arguments["temp"].float()}, "all float64, found torch.float32 and torch.float64"


@pytest.mark.parametrize("kind", ["device", "mask", "dtype", "mixed"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind):
    arguments, words = spoilt(kind)
    if kind in ("device", "dtype"):  # the torch form refuses the others itself
        found, expected = run(compiled.hierarchical_delta_rule, arguments), run(hierarchical_delta_rule, arguments)
        assert all(a.dtype == b.dtype and a.device == b.device and (a.is_meta or torch.equal(a, b)) for a, b in zip(found, expected, strict=True))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel delta_rule .*{words}"):
        compiled.hierarchical_delta_rule(**arguments)


def test_the_environment_is_read_at_the_call(monkeypatch):
    arguments = tensors()
    for mode, calls in (("auto", 1), ("torch", 1), ("compiled", 2), ("", 3), ("torch", 3)):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        compiled.hierarchical_delta_rule(**arguments)
        assert compiled.kernel_calls(NAME) == calls, mode
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "cython")
    with pytest.raises(ValueError, match="GROUNDWAVE_KERNELS must be one of auto, compiled, torch, found 'cython'"):
        compiled.hierarchical_delta_rule(**arguments)


def test_an_extension_that_is_not_built(monkeypatch):
    monkeypatch.setattr(cython_ext, "is_built", lambda name: name != "delta_rule")
    arguments = tensors()
    with pytest.warns(RuntimeWarning, match=r"cython_ext\.delta_rule is not built, the slow torch form runs"):
        found = run(compiled.hierarchical_delta_rule, arguments)
    assert all(map(torch.equal, found, run(hierarchical_delta_rule, arguments)))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match="is not built: run `pip install -e"):
        compiled.hierarchical_delta_rule(**arguments)


@pytest.mark.parametrize(("name", "change", "error", "words"), [
    ("k", lambda t: t[:, :1], ValueError, r"k must have shape \(B, H, L, d\) = \(2, 3, 19, 5\), found \(2, 1, 19, 5\)"),
    ("beta", lambda t: t[..., None], ValueError, r"beta must have shape \(B, H, L\) = \(2, 3, 19\), found \(2, 3, 19, 1\)"),
    ("token_mlp", lambda t: t[:3], TypeError, "token_mlp must be a tuple of four arrays"),
    ("mask", lambda t: t.flip(1), ValueError, "mask must pad on the right only, found a hole in row 1 at token 0"),
    ("mask", lambda t: t.long(), TypeError, "mask must be bool, found int64"),
    ("initial_state", lambda t: t[:1], TypeError, "initial_state must be a pair"),
    ("chunk_size", lambda n: 0, ValueError, "chunk_size must be at least 1, found 0"),
    ("transform", lambda n: "solve", ValueError, "transform must be 'lam' or 'exact', found 'solve'"),
])
def test_what_the_kernel_refuses_is_refused_by_name(name, change, error, words):
    arguments = {**tensors(), "transform": "lam"}
    with pytest.raises(error, match=words):
        compiled.hierarchical_delta_rule(**{**arguments, name: change(arguments[name])})
