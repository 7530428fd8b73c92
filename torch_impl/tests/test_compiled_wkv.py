"""The compiled WKV memory as a torch op: equal to both torch forms, differentiable, compilable, and honest about when it runs."""

from __future__ import annotations

import pytest
import torch

import cython_ext
from cython_ext.tests.examples import wkv_arguments, wkv_cotangents
from torch_impl.ops import compiled
from torch_impl.ops.compiled_wkv import wkv as compiled_wkv
from torch_impl.ops.wkv import wkv

# Two float64 forms of one formula differ by some tens of roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24: 45 of them are the band of the kernel's own tests, and the torch forms are allowed as many.
FLOAT32 = 2 * 45 * 2.0**-24

SHAPES = [(1, 1, 2, 4), (3, 3, 1, 7), (2, 63, 2, 5), (1, 100, 3, 16), (1, 257, 1, 9)]
TIME_FIRSTS = pytest.mark.parametrize("time_first", ["bonus", "gain"])


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def tensors(shape=(2, 11, 2, 5), dtype="float64", initial_state=True, decay="direct"):
    drawn = wkv_arguments(shape, dtype, initial_state, decay).values()
    return [None if array is None else torch.from_numpy(array.copy()).requires_grad_() for array in drawn]


def given(inputs):
    return [tensor for tensor in inputs if tensor is not None]


def run(function, inputs, gradients, **options):
    """y, the last state, then the gradient of every input, of a loss in which both take part."""
    outputs = function(*inputs, **options)
    loss = sum((part * gradient).sum() for part, gradient in zip(outputs, gradients, strict=True))
    return [part.detach() for part in outputs] + list(torch.autograd.grad(loss, given(inputs)))


def close(found, expected, bound):
    norm = torch.linalg.vector_norm
    return all(a.dtype == b.dtype and norm(a - b) <= bound * norm(b) for a, b in zip(found, expected, strict=True))


@TIME_FIRSTS
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_torch_forms_with_every_gradient(shape, dtype, bound, initial_state, time_first):
    for decay in ("exp_exp", "direct"):
        inputs = tensors(shape, dtype, initial_state, decay)
        gradients = [torch.from_numpy(part) for part in wkv_cotangents(shape, dtype)]
        compiled.reset_kernel_calls()
        found = run(compiled_wkv, inputs, gradients, time_first=time_first)
        assert (compiled.kernel_calls("wkv"), compiled.kernel_calls("wkv_backward")) == (1, 1)
        expected = run(wkv, inputs, gradients, time_first=time_first)
        assert compiled.kernel_calls() == 2  # the recurrent form runs no kernel
        assert close(found, expected, bound)


def test_the_compiled_form_of_the_op_is_this_one():
    inputs = tensors()
    wkv(*inputs, impl="compiled")
    assert compiled.kernel_calls("wkv") == compiled.kernel_calls() == 1
    with pytest.raises(ValueError, match="impl of wkv must be 'recurrent', 'chunked' or 'compiled', found 'cython'"):
        wkv(*inputs, impl="cython")


@TIME_FIRSTS
@pytest.mark.parametrize("initial_state", [True, False])
def test_gradcheck_and_opcheck(initial_state, time_first):
    inputs = tensors((2, 3, 1, 3), initial_state=initial_state)
    assert torch.autograd.gradcheck(lambda *tensors: compiled_wkv(*tensors, time_first=time_first), inputs)
    torch.library.opcheck(torch.ops.groundwave.wkv.default, (*inputs, time_first))
    detached = [None if tensor is None else tensor.detach() for tensor in inputs]
    y, state = torch.ops.groundwave.wkv(*detached, time_first)
    torch.library.opcheck(torch.ops.groundwave.wkv_backward.default, (torch.ones_like(y), torch.ones_like(state), *detached, time_first))


@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_of_one_output_alone(part):
    inputs = tensors()
    losses = (function(*inputs)[part].square().sum() for function in (compiled_wkv, wkv))
    found, expected = (torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in losses)
    assert close(found, expected, FLOAT64)


def loss_of(function):
    return lambda *inputs: sum((part**3).sum() for part in function(*inputs))


def test_compiles_without_a_graph_break():
    """One graph for several lengths, equal to eager, and the kernel really runs in it; "aot_eager" traces all and generates no C++."""
    torch._dynamo.reset()
    function = torch.compile(loss_of(compiled_wkv), fullgraph=True, backend="aot_eager", dynamic=True)
    for calls, shape in enumerate([(2, 7, 2, 5), (3, 9, 2, 5)], start=1):
        inputs = tensors(shape)
        found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (function, loss_of(wkv)))
        assert (compiled.kernel_calls("wkv"), compiled.kernel_calls("wkv_backward")) == (calls, calls)
        assert close(found, expected, FLOAT64)
    torch._dynamo.reset()


def test_transforms_of_torch_func():
    inputs = tensors((2, 4, 2, 3))
    for index in (0, 3, 5):
        def along(function, tensor, index=index):
            return loss_of(function)(*inputs[:index], tensor, *inputs[index + 1:])

        point = inputs[index].detach()
        found, expected = (torch.func.grad(lambda x, f=f: along(f, x))(point) for f in (compiled_wkv, wkv))
        assert close([found], [expected], FLOAT64)
        batch = torch.stack([point, 2 * point, point - 1], dim=1)
        for transform in (lambda f: f, torch.func.grad):
            found, expected = (torch.func.vmap(transform(lambda x, f=f: along(f, x)), in_dims=1)(batch) for f in (compiled_wkv, wkv))
            assert close([found], [expected], FLOAT64)


def test_second_order_gradients_are_refused():
    inputs = tensors()
    first, = torch.autograd.grad(loss_of(compiled_wkv)(*inputs), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="the compiled wkv has no second-order gradients; the torch form has"):
        first.sum().backward()


def test_memory_is_shared_and_not_copied(monkeypatch):
    seen = {}
    kernel = cython_ext.wkv

    class Watched:
        @staticmethod
        def forward(*arrays):
            results = kernel.forward(*arrays)
            seen["inputs"], seen["outputs"] = [array.ctypes.data for array in arrays[:6]], [result.ctypes.data for result in results]
            return results

    monkeypatch.setattr(cython_ext, "kernel", lambda name: Watched)
    inputs = tensors()
    with torch.no_grad():
        outputs = compiled_wkv(*inputs)
    assert seen["inputs"] == [tensor.data_ptr() for tensor in inputs]
    assert seen["outputs"] == [tensor.data_ptr() for tensor in outputs]


def test_views_are_taken_as_they_are():
    inputs = tensors()
    gradients = [torch.from_numpy(part) for part in wkv_cotangents((2, 11, 2, 5))]
    plain = run(compiled_wkv, inputs, gradients)
    views = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in inputs]
    assert not views[0].is_contiguous()
    assert all(map(torch.equal, run(compiled_wkv, views, [gradients[0].mT.contiguous().mT, gradients[1]]), plain))


def spoilt(kind):
    """Inputs that the kernel cannot take, and the words in which it says so."""
    inputs = [tensor.detach() for tensor in tensors()]
    if kind == "device":
        return [tensor.to("meta") for tensor in inputs], "needs tensors on the CPU, found meta"
    if kind == "dtype":
        return [tensor.bfloat16() for tensor in inputs], "all float32 or all float64, found torch.bfloat16"
    return [inputs[0].float(), *inputs[1:]], "all float64, found torch.float32 and torch.float64"


@pytest.mark.parametrize("kind", ["device", "dtype", "mixed"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind):
    inputs, words = spoilt(kind)
    if kind != "mixed":  # the torch form refuses those itself
        found, expected = compiled_wkv(*inputs, chunk_size=4), wkv(*inputs, impl="chunked", chunk_size=4)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and (a.is_meta or torch.equal(a, b))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel wkv .*{words}"):
        compiled_wkv(*inputs)


def test_the_environment_is_read_at_the_call(monkeypatch):
    inputs = tensors()
    for mode, calls in (("auto", 1), ("torch", 1), ("compiled", 2), ("", 3), ("torch", 3)):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        compiled_wkv(*inputs)
        assert compiled.kernel_calls("wkv") == calls, mode
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "cython")
    with pytest.raises(ValueError, match="GROUNDWAVE_KERNELS must be one of auto, compiled, torch, found 'cython'"):
        compiled_wkv(*inputs)


def test_an_extension_that_is_not_built(monkeypatch):
    monkeypatch.setattr(cython_ext, "is_built", lambda name: name != "wkv")
    inputs = tensors()
    with pytest.warns(RuntimeWarning, match=r"cython_ext\.wkv is not built, the slow torch form runs"):
        found = compiled_wkv(*inputs)
    assert all(map(torch.equal, found, wkv(*inputs, impl="chunked")))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match="is not built: run `pip install -e"):
        compiled_wkv(*inputs)


@pytest.mark.parametrize("mode", ["auto", "torch"])
@pytest.mark.parametrize(("index", "change", "words"), [
    (0, lambda t: t[0], r"r must have shape \(B, L, H, P\) with no axis empty, found \(11, 2, 5\)"),
    (0, lambda t: t[:, :0], r"r must have shape \(B, L, H, P\) with no axis empty, found \(2, 0, 2, 5\)"),
    (0, lambda t: t[:0], r"r must have shape \(B, L, H, P\) with no axis empty, found \(0, 11, 2, 5\)"),
    (1, lambda t: t[:1], r"k must have shape \(B, L, H, P\) = \(2, 11, 2, 5\), found \(1, 11, 2, 5\)"),
    (2, lambda t: t[..., :1], r"v must have shape \(B, L, H, P\) = \(2, 11, 2, 5\), found \(2, 11, 2, 1\)"),
    (3, lambda t: t[0], r"w must have shape \(H, P\) = \(2, 5\), found \(5,\)"),
    (4, lambda t: t[:1], r"u must have shape \(H, P\) = \(2, 5\), found \(1, 5\)"),
    (5, lambda t: t[:1], r"initial_state must have shape \(B, H, P, P\) = \(2, 2, 5, 5\), found \(1, 2, 5, 5\)"),
])
def test_wrong_shapes_are_refused_by_name_and_never_broadcast(monkeypatch, mode, index, change, words):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
    inputs = tensors()
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=words):
        compiled_wkv(*inputs)
    with pytest.raises(ValueError, match="time_first must be 'bonus' or 'gain', found 'both'"):
        compiled_wkv(*tensors(), time_first="both")
