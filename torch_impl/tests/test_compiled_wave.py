"""The compiled wave of WaveCore as torch ops: equal to the torch form, differentiable, compilable, honest about when it runs."""

from __future__ import annotations

import pytest
import torch

import cython_ext
from cython_ext.tests.test_cms import wave_arguments
from torch_impl.ops import compiled, compiled_wave, wave

# Two float64 forms of one formula differ by some tens of roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24: 40 of them are the band of the kernel's own tests, and the torch form is allowed as many.
FLOAT32 = 2 * 40 * 2.0**-24
SHAPES = [(1, 1, 1, 1), (3, 3, 63, 1), (2, 5, 100, 3), (1, 63, 7, 2)]
KINDS = pytest.mark.parametrize("kind", ["step", "scan"])


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def tensors(kind, shape=(2, 5, 6, 2), dtype="float64"):
    drawn = [torch.from_numpy(array.copy()) for array in wave_arguments(shape, dtype)]
    cut = [tensor[:, 0].contiguous() if kind == "step" and i in (0, 2, 3, 4) else tensor for i, tensor in enumerate(drawn)]
    return [tensor.requires_grad_() for tensor in cut]


def call(kind, room, inputs):
    return getattr(room, f"selective_{kind}")(*inputs)


def loss_of(outputs):
    return sum((part**3).sum() for part in outputs)


def run(kind, room, inputs):
    outputs = call(kind, room, inputs)
    return [part.detach() for part in outputs] + list(torch.autograd.grad(loss_of(outputs), inputs))


def close(found, expected, bound):
    norm = torch.linalg.vector_norm
    return all(a.dtype == b.dtype and a.shape == b.shape and norm(a - b) <= bound * norm(b) for a, b in zip(found, expected, strict=True))


@KINDS
@pytest.mark.parametrize(("dtype", "bound"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_torch_form_with_every_gradient(shape, dtype, bound, kind):
    inputs = tensors(kind, shape, dtype)
    found = run(kind, compiled_wave, inputs)
    assert (compiled.kernel_calls(f"wave_{kind}"), compiled.kernel_calls(f"wave_{kind}_backward")) == (1, 1)
    assert close(found, run(kind, wave, inputs), bound)
    assert compiled.kernel_calls() == 2  # the torch form runs no kernel


def test_the_compiled_form_of_the_op_is_this_one_also_without_a_batch_axis():
    inputs = tensors("step")
    lone = [tensor[0] if i < 5 else tensor for i, tensor in enumerate(inputs)]
    for given in (inputs, lone):
        assert close(wave.selective_step(*given, impl="compiled"), wave.selective_step(*given), FLOAT64)
    assert compiled.kernel_calls("wave_step") == compiled.kernel_calls() == 2
    with pytest.raises(ValueError, match="impl of selective_step must be 'recurrent' or 'compiled', found 'chunked'"):
        wave.selective_step(*inputs, impl="chunked")


@KINDS
def test_gradcheck_and_opcheck(kind):
    inputs = tensors(kind, (2, 2, 2, 2))
    assert torch.autograd.gradcheck(lambda *given: call(kind, compiled_wave, given), inputs)
    torch.library.opcheck(getattr(torch.ops.groundwave, f"wave_{kind}").default, inputs)
    detached = [tensor.detach() for tensor in inputs]
    gradients = [torch.ones_like(part) for part in call(kind, compiled_wave, detached)]
    torch.library.opcheck(getattr(torch.ops.groundwave, f"wave_{kind}_backward").default, (*gradients, *detached))


@KINDS
def test_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    function = torch.compile(lambda *given: loss_of(call(kind, compiled_wave, given)), fullgraph=True, backend="aot_eager", dynamic=True)
    for calls, shape in enumerate([(2, 3, 4, 2), (3, 5, 4, 2)], start=1):
        inputs = tensors(kind, shape)
        found, expected = (torch.autograd.grad(loss, inputs) for loss in (function(*inputs), loss_of(call(kind, wave, inputs))))
        assert (compiled.kernel_calls(f"wave_{kind}"), compiled.kernel_calls(f"wave_{kind}_backward")) == (calls, calls)
        assert close(found, expected, FLOAT64)
    torch._dynamo.reset()


@KINDS
def test_transforms_of_torch_func(kind):
    inputs = tensors(kind)
    for index in (0, 1, 5):
        def along(room, tensor, index=index):
            return loss_of(call(kind, room, [*inputs[:index], tensor, *inputs[index + 1:]]))

        point = inputs[index].detach()
        found, expected = (torch.func.grad(lambda x, room=room: along(room, x))(point) for room in (compiled_wave, wave))
        assert close([found], [expected], FLOAT64)
        batch = torch.stack([point, 2 * point, point - 1], dim=1)
        for transform in (lambda f: f, torch.func.grad):
            found, expected = (torch.func.vmap(transform(lambda x, room=room: along(room, x)), in_dims=1)(batch) for room in (compiled_wave, wave))
            assert close([found], [expected], FLOAT64)


@KINDS
def test_second_order_gradients_are_refused(kind):
    inputs = tensors(kind)
    first, = torch.autograd.grad(loss_of(call(kind, compiled_wave, inputs)), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="the compiled wave has no second-order gradients; the torch form has"):
        first.sum().backward()


@KINDS
@pytest.mark.parametrize("reason", ["device", "dtype", "mixed", "unbuilt"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind, reason):
    change = {"device": lambda t: t.to("meta"), "dtype": torch.Tensor.bfloat16}.get(reason, lambda t: t)
    inputs = [change(tensor.detach()) for tensor in tensors(kind)]
    words = {"device": "needs tensors on the CPU, found meta", "dtype": "all float32 or all float64, found torch.bfloat16",
             "mixed": "found torch.float32 and torch.float64", "unbuilt": "is not built: run `pip install -e"}[reason]
    if reason == "mixed":
        inputs[8] = inputs[8].float()
    if reason == "unbuilt":
        monkeypatch.setattr(cython_ext, "is_built", lambda name: name != "wave")
        with pytest.warns(RuntimeWarning, match=r"cython_ext\.wave is not built, the slow torch form runs"):
            found = call(kind, compiled_wave, inputs)
    else:
        found = call(kind, compiled_wave, inputs)
    assert all(a.is_meta or torch.equal(a, b) for a, b in zip(found, call(kind, wave, inputs), strict=True))
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel wave .*{words}"):
        call(kind, compiled_wave, inputs)


@pytest.mark.parametrize("mode", ["auto", "torch"])
@pytest.mark.parametrize(("index", "change", "words"), [
    (0, lambda t: t[:, :0], r"u must have shape \(B, L, I\) with no axis empty, found \(2, 0, 6\)"),
    (1, lambda t: t[:1], r"carry must have shape \(B, I, S\) = \(2, 6, 2\), found \(1, 6, 2\)"),
    (2, lambda t: t[..., :1], r"dt must have shape \(B, L, I\) = \(2, 5, 6\), found \(2, 5, 1\)"),
    (5, lambda t: t[:, :0], r"a_raw must have shape \(I, S\) with no axis empty, found \(6, 0\)"),
    (6, lambda t: t[:1], r"b_base must have shape \(I, S\) = \(6, 2\), found \(1, 2\)"),
    (8, lambda t: t[:1], r"d must have shape \(I\) = \(6,\), found \(1,\)"),
])
def test_wrong_shapes_are_refused_by_name_and_never_broadcast(monkeypatch, mode, index, change, words):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
    inputs = tensors("scan")
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=words):
        compiled_wave.selective_scan(*inputs)
