"""The compiled plain delta rule as a torch op: equal to the recurrent form, differentiable, compilable, honest about when it runs; and in models."""

from __future__ import annotations

import pytest
import torch

import cython_ext
from conf.models import DeltaNetConfig
from cython_ext.tests.examples import plain_arguments, plain_cotangents
from torch_impl.deltanet import DeltaNetLayer, DeltaNetLM
from torch_impl.ops import compiled
from torch_impl.ops.delta_rule import delta_rule

# Two float64 forms of one formula differ by some ten roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; either form carries 6 of them, or 31 where a sum leaves one number (see the kernel's own tests).
FLOAT32 = 2 * 64 * 2.0**-24

SHAPES = [(1, 1, 1, 5), (3, 2, 3, 7), (2, 3, 63, 16), (1, 2, 100, 33), (2, 1, 257, 64)]
CONFIG = DeltaNetConfig(vocab_size=37, dim=30, depth=2, heads=3, ffn_dim=23, chunk_size=7)
STATES = pytest.mark.parametrize("initial_state", [True, False])


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def calls():
    return compiled.kernel_calls("delta_rule"), compiled.kernel_calls("delta_rule_backward")


def tensors(shape=(2, 3, 19, 7), dtype="float64", initial_state=True):
    drawn = plain_arguments(shape, dtype, initial_state).values()
    return [None if array is None else torch.from_numpy(array).requires_grad_() for array in drawn]


def recurrent(*inputs):
    return delta_rule(*inputs, impl="recurrent")


def run(function, inputs, cotangents):
    """o and the last state, then the gradient of every input that is there."""
    outputs = function(*inputs)
    loss = sum((output * torch.from_numpy(grad)).sum() for output, grad in zip(outputs, cotangents, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None])]


def close(found, expected, bound=FLOAT64):
    norm = torch.linalg.vector_norm
    return all(a.dtype == b.dtype and norm(a - b) < bound * norm(b) for a, b in zip(found, expected, strict=True))


def loss_of(function):
    return lambda *inputs: sum((part**3).sum() for part in function(*inputs))


@STATES
@pytest.mark.parametrize(("dtype", "bound"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recurrent_form_with_every_gradient(shape, dtype, bound, initial_state):
    inputs, cotangents = tensors(shape, dtype, initial_state), plain_cotangents(shape, dtype)
    found = run(compiled.delta_rule, inputs, cotangents)
    assert calls() == (1, 1)
    expected = run(recurrent, inputs, cotangents)
    assert compiled.kernel_calls() == 2  # the recurrent form runs no kernel
    assert close(found, expected, bound)


def test_an_output_that_no_loss_reads():
    inputs = tensors()
    for output in range(2):
        found, expected = (torch.autograd.grad((f(*inputs)[output] ** 2).sum(), inputs[1:]) for f in (compiled.delta_rule, recurrent))
        assert close(found, expected)


@STATES
def test_gradcheck_and_opcheck(initial_state):
    inputs = tensors((2, 1, 3, 4), "float64", initial_state)
    assert torch.autograd.gradcheck(compiled.delta_rule, inputs)
    torch.library.opcheck(torch.ops.groundwave.delta_rule.default, inputs)
    detached = [None if tensor is None else tensor.detach() for tensor in inputs]
    outputs = torch.ops.groundwave.delta_rule(*detached)
    torch.library.opcheck(torch.ops.groundwave.delta_rule_backward.default, (*map(torch.ones_like, outputs), *detached))


@STATES
def test_compiles_without_a_graph_break(initial_state):
    """One graph for several lengths, equal to eager, and the kernel really runs in it; "aot_eager" traces all and generates no C++."""
    torch._dynamo.reset()
    function = torch.compile(loss_of(compiled.delta_rule), fullgraph=True, backend="aot_eager", dynamic=True)
    for count, shape in enumerate([(2, 3, 19, 7), (3, 2, 30, 7)], start=1):
        inputs = tensors(shape, "float64", initial_state)
        given = [tensor for tensor in inputs if tensor is not None]
        found, expected = (torch.autograd.grad(f(*inputs), given) for f in (function, loss_of(recurrent)))
        assert calls() == (count, count) and close(found, expected)
    torch._dynamo.reset()


def test_transforms_of_torch_func():
    inputs = tensors((2, 2, 5, 3))
    for index in (1, 3, 4):
        def along(function, tensor, index=index):
            return loss_of(function)(*inputs[:index], tensor, *inputs[index + 1:])

        point = inputs[index].detach()
        found, expected = (torch.func.grad(lambda x, f=f: along(f, x))(point) for f in (compiled.delta_rule, recurrent))
        assert close([found], [expected])
        batch = torch.stack([point, 2 * point, -point], dim=1)
        for transform in (lambda f: f, torch.func.grad):
            found, expected = (
                torch.func.vmap(transform(lambda x, f=f: along(f, x)), in_dims=1)(batch) for f in (compiled.delta_rule, recurrent))
            assert close([found], [expected])
    assert 0 not in calls()


def test_second_order_gradients_are_refused():
    inputs = tensors()
    first, = torch.autograd.grad(loss_of(compiled.delta_rule)(*inputs), inputs[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="the compiled delta_rule has no second-order gradients; the torch form has"):
        first.sum().backward()


def test_memory_is_shared_and_not_copied(monkeypatch):
    seen = {}
    kernel = cython_ext.delta_rule

    class Watched:
        @staticmethod
        def forward(*arrays):
            outputs = kernel.forward(*arrays)
            seen["inputs"], seen["outputs"] = ([array.ctypes.data for array in part] for part in (arrays, outputs))
            return outputs

    monkeypatch.setattr(cython_ext, "kernel", lambda name: Watched)
    inputs = tensors()
    with torch.inference_mode():
        outputs = compiled.delta_rule(*inputs)
    assert seen["inputs"] == [tensor.data_ptr() for tensor in inputs]
    assert seen["outputs"] == [tensor.data_ptr() for tensor in outputs]


def test_views_and_broadcast_gradients():
    wide = [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in tensors()[:3]]  # (B, L, H, d), as a layer has them
    beta, state = tensors()[3:]
    found, expected = (
        torch.autograd.grad(f(*(tensor.transpose(1, 2) for tensor in wide), beta[:, :1].expand(2, 3, 19), state)[0].sum(), wide)
        for f in (compiled.delta_rule, recurrent))
    assert close(found, expected) and compiled.kernel_calls() == 2


def spoilt(kind):
    """Inputs that the kernel cannot take, options, and the words in which it says so."""
    inputs = [tensor.detach() for tensor in tensors()]
    if kind == "device":
        return [tensor.to("meta") for tensor in inputs], {}, "needs tensors on the CPU, found meta"
    if kind == "dtype":
        return [tensor.bfloat16() for tensor in inputs], {}, "all float32 or all float64, found torch.bfloat16"
    if kind == "mixed":
        return [inputs[0].float(), *inputs[1:]], {}, "all float64, found torch.float32 and torch.float64"
    return inputs, {"transform": "lam", "chunk_size": 5}, "has transform 'exact' alone, found 'lam'"


@pytest.mark.parametrize("kind", ["device", "dtype", "mixed", "transform"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind):
    inputs, options, words = spoilt(kind)
    if kind != "mixed":  # the torch form refuses those itself
        found, expected = (f(*inputs, **options) for f in (compiled.delta_rule, delta_rule))
        assert all(a.dtype == b.dtype and a.device == b.device and (a.is_meta or torch.equal(a, b)) for a, b in zip(found, expected, strict=True))
    if kind == "dtype":  # a rounding of bfloat16 is 2**-9, and some tens of them meet
        assert close([a.double() for a in found], recurrent(*(tensor.double() for tensor in inputs)), 30 * 2.0**-9)
    assert compiled.kernel_calls() == 0
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel delta_rule .*{words}"):
        compiled.delta_rule(*inputs, **options)


def test_the_environment_is_read_at_the_call_and_nothing_falls_back_in_silence(monkeypatch):
    inputs = tensors()
    for mode, count in (("auto", 1), ("torch", 1), ("compiled", 2), ("", 3), ("torch", 3)):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        compiled.delta_rule(*inputs)
        assert compiled.kernel_calls("delta_rule") == count, mode
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "auto")
    monkeypatch.setattr(cython_ext, "is_built", lambda name: False)
    with pytest.warns(RuntimeWarning, match=r"cython_ext\.delta_rule is not built, the slow torch form runs"):
        found = compiled.delta_rule(*inputs)
    assert all(map(torch.equal, found, delta_rule(*inputs))) and compiled.kernel_calls() == 3


@pytest.mark.parametrize("mode", ["auto", "torch"])
@pytest.mark.parametrize(("index", "change", "words"), [
    (0, lambda t: t[0], r"q must have shape \(B, H, L, d\) with no axis empty, found \(3, 19, 7\)"),
    (0, lambda t: t[:, :, :0], r"q must have shape \(B, H, L, d\) with no axis empty, found \(2, 3, 0, 7\)"),
    (1, lambda t: t[:, :1], r"k must have shape \(B, H, L, d\) = \(2, 3, 19, 7\), found \(2, 1, 19, 7\)"),
    (2, lambda t: t[..., :1], r"v must have shape \(B, H, L, d\) = \(2, 3, 19, 7\), found \(2, 3, 19, 1\)"),
    (3, lambda t: t[:1], r"beta must have shape \(B, H, L\) = \(2, 3, 19\), found \(1, 3, 19\)"),
    (4, lambda t: t[0], r"initial_state must have shape \(B, H, d, d\) = \(2, 3, 7, 7\), found \(3, 7, 7\)"),
])
def test_wrong_shapes_are_refused_by_name_and_never_broadcast(monkeypatch, mode, index, change, words):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
    inputs = tensors()
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=words):
        compiled.delta_rule(*inputs)


def test_options_are_refused_as_the_torch_form_refuses_them():
    for options in ({"chunk_size": 0}, {"transform": "wy"}):
        messages = []
        for function in (compiled.delta_rule, delta_rule):
            with pytest.raises(ValueError) as caught:
                function(*tensors(), **options)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_the_model_equals_its_recurrent_form_with_every_gradient():
    torch.manual_seed(0)
    models = {impl: DeltaNetLM(CONFIG, impl=impl).double() for impl in ("compiled", "recurrent")}
    models["compiled"].load_state_dict(models["recurrent"].state_dict())
    ids = torch.arange(3 * 41).reshape(3, 41) % 37
    results = []
    for model in models.values():
        logits, states = model(ids)
        again, last = model(ids[:, :9], states)
        (logits.sin().sum() + again.sum() + sum(value.sum() for state in last for value in state.values())).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([logits, again, *(value for state in (*states, *last) for value in state.values()), *gradients])
    assert calls() == (4, 4)  # two layers, two calls
    assert close(*results, bound=1e-11)  # what the project promises end to end


def test_the_model_streams_and_sees_no_later_token():
    torch.manual_seed(0)
    model = DeltaNetLM(CONFIG, impl="compiled").double()
    ids = torch.arange(2 * 40).reshape(2, 40) % 37
    with torch.no_grad():
        whole, states = model(ids)[0], None
        for token in (0, 15, 16, 39):
            other = ids.clone()
            other[:, token] += 1 - 37 * (other[:, token] == 36)
            assert torch.equal(model(other)[0][:, :token], whole[:, :token])
        for cut in (slice(0, 1), slice(1, 2), slice(2, 19), slice(19, 40)):
            logits, states = model(ids[:, cut], states)
            assert torch.linalg.vector_norm(logits - whole[:, cut]) < FLOAT64 * torch.linalg.vector_norm(whole[:, cut])
        drawn = model.generate(ids[:, :5], 6, temperature=0.0)
        assert torch.equal(drawn[:, 5:], model(drawn)[0][:, 4:-1].argmax(-1))


def test_the_layer_with_the_transform_of_lam_keeps_to_the_torch_form():
    torch.manual_seed(0)
    layer = DeltaNetLayer(30, 3, rule="plain", transform="lam", chunk_size=5, impl="compiled")
    chunked = DeltaNetLayer(30, 3, rule="plain", transform="lam", chunk_size=5)
    chunked.load_state_dict(layer.state_dict())
    x = torch.randn(2, 17, 30)
    assert torch.equal(layer(x)[0], chunked(x)[0]) and compiled.kernel_calls() == 0
