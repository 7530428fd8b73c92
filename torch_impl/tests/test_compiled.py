"""The compiled selective scan as a torch op: equal to the recurrent form, differentiable, compilable, and honest about when it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cython_ext
from cython_ext.tests.examples import NAMES, OPTIONS, arguments, cotangent, differences
from torch_impl.ops import compiled
from torch_impl.ops.selective_scan import selective_scan

# Two float64 forms of one formula differ by some tens of roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; each form carries those of the ten or so tokens that a state remembers, 30 to 35 of them at most.
FLOAT32 = 2 * 70 * 2.0**-24

SHAPES = [(1, 1, 4), (3, 1, 7), (1, 3, 5), (3, 63, 16), (2, 100, 33)]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def tensors(shape, dtype="float64", dt_b=True, initial_state=True):
    drawn = arguments(shape, dtype, dt_b, initial_state).values()
    return [None if array is None else torch.from_numpy(array.copy()).requires_grad_() for array in drawn]


def run(function, inputs, grad):
    """States, then the gradient of every input, of a loss in which the states and the last state both take part."""
    states, final = function(*inputs)
    assert torch.equal(final, states[:, -1])
    loss = (states * grad).sum() + (final**2).sum()
    given = [tensor for tensor in inputs if tensor is not None]
    found = iter(torch.autograd.grad(loss, given))
    return [states.detach().numpy()] + [None if tensor is None else next(found).numpy() for tensor in inputs]


@pytest.mark.parametrize(("dt_b", "initial_state"), OPTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recurrent_form_with_every_gradient(shape, dtype, bound, dt_b, initial_state):
    inputs, grad = tensors(shape, dtype, dt_b, initial_state), torch.from_numpy(cotangent(shape, dtype))
    found = run(compiled.selective_scan, inputs, grad)
    assert (compiled.kernel_calls("selective_scan"), compiled.kernel_calls("selective_scan_backward")) == (1, 1)
    expected = run(selective_scan, inputs, grad)
    assert compiled.kernel_calls() == 2  # the recurrent form runs no kernel
    assert all(array is None or array.dtype == dtype for array in found)
    arrays = dict(zip(NAMES, (None if tensor is None else tensor.detach().numpy() for tensor in inputs), strict=True))
    far = {name: distance for name, distance in differences(found, expected, arrays).items() if not distance < bound}
    assert not far


def test_the_compiled_form_of_the_op_is_this_one():
    inputs = tensors((2, 5, 7))
    selective_scan(*inputs, impl="compiled")
    assert compiled.kernel_calls("selective_scan") == 1


def test_eps_reaches_the_kernel():
    inputs = tensors((2, 5, 7))
    found, expected = (f(*inputs, eps=0.5)[0].detach().numpy() for f in (compiled.selective_scan, selective_scan))
    assert np.allclose(found, expected, rtol=1e-12, atol=1e-12)  # rounding, on values of order 1
    assert not np.allclose(found, selective_scan(*inputs)[0].detach().numpy(), rtol=1e-2)


@pytest.mark.parametrize(("dt_b", "initial_state"), OPTIONS)
def test_gradcheck_and_opcheck(dt_b, initial_state):
    inputs = tensors((2, 3, 5), "float64", dt_b, initial_state)
    assert torch.autograd.gradcheck(compiled.selective_scan, inputs)
    torch.library.opcheck(torch.ops.groundwave.selective_scan.default, (*inputs, 1e-5))
    detached = [None if tensor is None else tensor.detach() for tensor in inputs]
    states = torch.ops.groundwave.selective_scan(*detached, 1e-5)
    torch.library.opcheck(torch.ops.groundwave.selective_scan_backward.default, (torch.ones_like(states), *detached, states, 1e-5))


def loss_of(function):
    return lambda *inputs: sum((part**3).sum() for part in function(*inputs))


@pytest.mark.parametrize("dt_b", [True, False])
def test_compiles_without_a_graph_break(dt_b):
    """One graph for several lengths, equal to eager, and the kernel really runs in it; "aot_eager" traces all and generates no C++."""
    torch._dynamo.reset()
    function = torch.compile(loss_of(compiled.selective_scan), fullgraph=True, backend="aot_eager", dynamic=True)
    for calls, shape in enumerate([(2, 7, 5), (3, 9, 5)], start=1):
        inputs = tensors(shape, "float64", dt_b)
        given = [tensor for tensor in inputs if tensor is not None]
        found, expected = (torch.autograd.grad(f(*inputs), given) for f in (function, loss_of(selective_scan)))
        assert (compiled.kernel_calls("selective_scan"), compiled.kernel_calls("selective_scan_backward")) == (calls, calls)
        for a, b in zip(found, expected, strict=True):
            assert torch.linalg.vector_norm(a - b) < FLOAT64 * torch.linalg.vector_norm(b)
    torch._dynamo.reset()


def test_transforms_of_torch_func():
    inputs = tensors((2, 4, 5))
    for index in (0, 3, 6):
        def along(function, tensor, index=index):
            return loss_of(function)(*inputs[:index], tensor, *inputs[index + 1:])

        point = inputs[index].detach()
        found, expected = (torch.func.grad(lambda x, f=f: along(f, x))(point) for f in (compiled.selective_scan, selective_scan))
        assert torch.linalg.vector_norm(found - expected) < FLOAT64 * torch.linalg.vector_norm(expected)
        batch = torch.stack([point, 2 * point, point - 1], dim=1)
        for transform in (lambda f: f, torch.func.grad):
            found, expected = (
                torch.func.vmap(transform(lambda x, f=f: along(f, x)), in_dims=1)(batch) for f in (compiled.selective_scan, selective_scan))
            assert torch.linalg.vector_norm(found - expected) < FLOAT64 * torch.linalg.vector_norm(expected)


def test_second_order_gradients_are_refused():
    inputs = tensors((2, 4, 5))
    first, = torch.autograd.grad(loss_of(compiled.selective_scan)(*inputs), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradients; the torch form has"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="no second-order gradients; the torch form has"):
        torch.func.grad(lambda u: torch.func.grad(lambda v: loss_of(compiled.selective_scan)(v, *inputs[1:]))(u).sum())(inputs[0])


def test_memory_is_shared_and_not_copied(monkeypatch):
    seen = {}
    kernel = cython_ext.selective_scan

    class Watched:
        @staticmethod
        def forward(*arrays):
            result = kernel.forward(*arrays)
            seen["inputs"], seen["states"] = [array.ctypes.data for array in arrays[:7]], result.ctypes.data
            return result

    monkeypatch.setattr(cython_ext, "kernel", lambda name: Watched)
    inputs = tensors((2, 5, 7))
    with torch.no_grad():
        states, final = compiled.selective_scan(*inputs)
    assert seen["inputs"] == [tensor.data_ptr() for tensor in inputs]
    assert seen["states"] == states.data_ptr()
    final.zero_()
    assert states[:, -1].abs().min() > 0  # the last state is the caller's own


def test_views_and_broadcast_gradients():
    wide = torch.from_numpy(cotangent((5, 2, 7))).requires_grad_()
    inputs = tensors((2, 5, 7))
    inputs[0], inputs[3] = wide.transpose(0, 1), inputs[3].detach().mT.requires_grad_()
    with torch.no_grad():
        inputs[1] = inputs[1][:, :1].expand(2, 5)
    for function in (lambda s: s.sum(), lambda s: (s * s[:1, :1]).sum()):
        found, expected = (
            torch.autograd.grad(function(f(*inputs)[0] ** 3), (wide, inputs[3])) for f in (compiled.selective_scan, selective_scan))
        for a, b in zip(found, expected, strict=True):
            assert torch.linalg.vector_norm(a - b) < FLOAT64 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(context):
    inputs = tensors((2, 5, 7))
    with context():
        states, final = compiled.selective_scan(*inputs)
    assert not states.requires_grad and not final.requires_grad
    assert compiled.kernel_calls() == 1


def spoilt(kind):
    """Inputs that the kernel cannot take, and the words in which it says so."""
    inputs = [tensor.detach() for tensor in tensors((2, 3, 5))]
    if kind == "device":
        return [tensor.to("meta") for tensor in inputs], "needs tensors on the CPU, found meta"
    if kind == "dtype":
        return [tensor.bfloat16() for tensor in inputs], "all float32 or all float64, found torch.bfloat16"
    if kind == "mixed":
        return [inputs[0].double(), *(tensor.float() for tensor in inputs[1:])], "all float64, found torch.float32 and torch.float64"
    return [tensor.detach() for tensor in tensors((2, 3, 257))], "N of at most 256, found 257"


@pytest.mark.parametrize("kind", ["device", "dtype", "state", "mixed"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind):
    inputs, words = spoilt(kind)
    if kind != "mixed":  # the torch form refuses those itself
        found, expected = compiled.selective_scan(*inputs), selective_scan(*inputs)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and (a.is_meta or torch.equal(a, b))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel selective_scan .*{words}"):
        compiled.selective_scan(*inputs)


def test_the_environment_is_read_at_the_call(monkeypatch):
    inputs = tensors((2, 3, 5))
    for mode, calls in (("auto", 1), ("torch", 1), ("compiled", 2), ("", 3), ("torch", 3)):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        compiled.selective_scan(*inputs)
        assert compiled.kernel_calls() == calls, mode
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "cython")
    with pytest.raises(ValueError, match="GROUNDWAVE_KERNELS must be one of auto, compiled, torch, found 'cython'"):
        compiled.selective_scan(*inputs)
    compiled.reset_kernel_calls()
    assert compiled.kernel_calls() == 0


def test_an_extension_that_is_not_built(monkeypatch):
    monkeypatch.setattr(cython_ext, "is_built", lambda name: False)
    inputs = tensors((2, 3, 5))
    with pytest.warns(RuntimeWarning, match="cython_ext.selective_scan is not built, the slow torch form runs"):
        found = compiled.selective_scan(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, selective_scan(*inputs), strict=True))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match="is not built: run `pip install -e"):
        compiled.selective_scan(*inputs)


@pytest.mark.parametrize("mode", ["auto", "torch"])
@pytest.mark.parametrize(("index", "change", "words"), [
    (0, lambda t: t[0], r"update must have shape \(B, L, N\) with no axis empty, found \(7, 5\)"),
    (0, lambda t: t[:, :0], r"update must have shape \(B, L, N\) with no axis empty, found \(3, 0, 5\)"),
    (1, lambda t: t[:1], r"dt_a must have shape \(B, L\) = \(3, 7\), found \(1, 7\)"),
    (2, lambda t: t[..., None], r"dt_b must have shape \(B, L\) = \(3, 7\), found \(3, 7, 1\)"),
    (3, lambda t: t[:, :1], r"transition must have shape \(N, N\) = \(5, 5\), found \(5, 1\)"),
    (4, lambda t: t[:1], r"weight must have shape \(N\) = \(5,\), found \(1,\)"),
    (5, lambda t: t[None], r"bias must have shape \(N\) = \(5,\), found \(1, 5\)"),
    (6, lambda t: t[:1], r"initial_state must have shape \(B, N\) = \(3, 5\), found \(1, 5\)"),
])
def test_wrong_shapes_are_refused_by_name_and_never_broadcast(monkeypatch, mode, index, change, words):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
    inputs = tensors((3, 7, 5))
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=words):
        compiled.selective_scan(*inputs)
