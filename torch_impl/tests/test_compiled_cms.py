"""The compiled memory of WaveCore as torch ops: equal to the torch form, differentiable, compilable, honest about when it runs; and a core on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cython_ext
from conf.models import WaveCoreConfig
from torch_impl.ops import cms, compiled, compiled_cms
from torch_impl.wavecore import WaveCore

# Two float64 forms of one formula differ by some tens of roundings of 1e-16; a difference of meaning is far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24: 40 of them are the band of the kernel's own tests, and the torch form is allowed as many.
FLOAT32 = 2 * 40 * 2.0**-24

# (B, then n and d of every level, d_k); no batch axis for B = 0
SHAPES = [(1, ((1, 1),), 1), (3, ((3, 5), (63, 7)), 4), (0, ((4, 3), (5, 100)), 2), (2, ((100, 16), (9, 33), (257, 3)), 17)]
KINDS = ["read", "write", "write_lazy"]
RULE = {"rule": "least_salient", "threshold": 0.5}


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    compiled.reset_kernel_calls()


def levels_of(kind, shape=SHAPES[1], dtype="float64", scale=0.3, seed=0):
    """The arguments of `read_levels` or of `write_levels` up to the gates: lists of leaves that require gradients, but norms and scales."""
    batch, sizes, d_k = shape
    rows = (batch,) if batch else ()
    generator = torch.Generator().manual_seed(seed)

    def draw(*axes):
        return torch.randn(*rows, *axes, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)).requires_grad_()

    memories, keys = [draw(n, d) for n, d in sizes], [draw(n, d_k) for n, _ in sizes]
    scales = [memories[0].new_tensor(scale) for _ in sizes]
    if kind == "read":
        return [draw(d_k), memories, keys, [part.requires_grad_() for part in scales]]
    norms = [memory.detach().square().sum(-1) for memory in memories]
    gates = [torch.sigmoid(2 * draw(1).detach()).requires_grad_() for _ in sizes]
    held = [memories, keys, norms, scales] if kind == "write_lazy" else [memories, keys, None, None]
    return [*held, [draw(d) for _, d in sizes], [draw(d_k) for _ in sizes], gates]


def call(kind, arguments, impl, **options):
    """All outputs in one list."""
    if kind == "read":
        outputs = cms.read_levels(*arguments, impl=impl)
    else:
        outputs = cms.write_levels(*arguments, [0.25] * len(arguments[0]), **RULE, **options, impl=impl)
    return [part for levels in outputs for part in levels]


def leaves(arguments):
    flat = [part for parts in arguments if parts is not None for part in (parts if isinstance(parts, list) else [parts])]
    return [part for part in flat if part.requires_grad]


def loss_of(outputs):
    return sum((part**3).sum() for part in outputs if part.requires_grad)


def run(kind, arguments, impl, **options):
    """Outputs, then the gradient of every leaf."""
    outputs = call(kind, arguments, impl, **options)
    return [part.detach() for part in outputs] + list(torch.autograd.grad(loss_of(outputs), leaves(arguments), materialize_grads=True))


def close(found, expected, bound):
    norm = torch.linalg.vector_norm
    return all(a.dtype == b.dtype and a.shape == b.shape and norm(a - b) <= bound * norm(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_torch_form_with_every_gradient(shape, kind):
    """A scale that is kept and, in a write, one that is folded; in float32 the gradients of scales and of gates, sums that cancel, are left to the
    tests of the kernel."""
    for scale in (0.3, 1.7 if kind == "read" else 2.0**-10):
        for dtype, bound in (("float64", FLOAT64), ("float32", FLOAT32)):
            arguments = levels_of(kind, shape, dtype, scale)
            compiled.reset_kernel_calls()
            found, levels = run(kind, arguments, "compiled"), len(shape[1])
            assert [compiled.kernel_calls(f"cms_{kind}{way}") for way in ("", "_backward")] == [levels, levels]
            expected = run(kind, arguments, "recurrent")
            assert compiled.kernel_calls() == 2 * levels  # the torch form runs no kernel
            cut = -levels if dtype == "float32" else None
            assert close(found[:cut], expected[:cut], bound)
            outputs = call(kind, arguments, "compiled"), call(kind, arguments, "recurrent")
            assert [part.requires_grad for part in outputs[0]] == [part.requires_grad for part in outputs[1]]


def test_single_levels_and_chosen_rows():
    query, memories, keys, scales = levels_of("read")
    for scale in (scales[0], None):
        assert close(compiled_cms.read(query, memories[0], keys[0], scale), cms.read(query, memories[0], keys[0], scale), FLOAT64)
    chosen = torch.tensor([2, 0, 1]), torch.tensor([True, False, True])
    for kind in ("write", "write_lazy"):
        one = [parts[0] for parts in levels_of(kind) if parts is not None]
        found, expected = (getattr(room, kind)(*one, 0.25, **RULE, chosen=chosen) for room in (compiled_cms, cms))
        assert close(found, expected, FLOAT64)
        found, expected = (run(kind, levels_of(kind), impl, chosen=[chosen] * 2) for impl in ("compiled", "recurrent"))
        assert close(found, expected, FLOAT64)
    with pytest.raises(ValueError, match="impl of the memory must be 'recurrent' or 'compiled', found 'cython'"):
        cms.read_levels(query, memories, keys, scales, impl="cython")


def test_what_it_is_given_stays_as_it_is_views_included():
    for kind in ("write", "write_lazy"):
        arguments = levels_of(kind)
        before = [part.detach().clone() for parts in arguments if parts is not None for part in parts]
        plain = run(kind, arguments, "compiled")
        assert all(map(torch.equal, before, (part for parts in arguments if parts is not None for part in parts)))
        turned = [None if parts is None else [
            part.detach().mT.contiguous().mT.requires_grad_(part.requires_grad) if part.ndim > 1 else part for part in parts] for parts in arguments]
        assert not turned[0][0].is_contiguous()
        assert all(map(torch.equal, run(kind, turned, "compiled"), plain))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_opcheck(kind):
    arguments = levels_of(kind, (2, ((3, 2), (2, 3)), 2))
    flat = leaves(arguments)
    if kind == "read":
        op, options = "cms_read", ()
    else:
        op, options = "cms_write", ([], [], [0.25, 0.25], "least_salient", 0.5)
        arguments = [[] if parts is None else parts for parts in arguments]

    def replaced(*tensors):
        parts = iter(tensors)
        given = [None if p == [] else [next(parts) if t.requires_grad else t for t in p] if isinstance(p, list) else next(parts) for p in arguments]
        return tuple(part for part in call(kind, given, "compiled") if part.requires_grad)

    assert torch.autograd.gradcheck(replaced, flat)
    torch.library.opcheck(getattr(torch.ops.groundwave, op).default, (*arguments, *options))
    detached = [[t.detach() for t in p] if isinstance(p, list) else p.detach() for p in arguments]
    gradients = [torch.ones_like(part) for part in getattr(torch.ops.groundwave, op)(*detached, *options)[:4]]
    torch.library.opcheck(getattr(torch.ops.groundwave, f"{op}_backward").default, (gradients, *detached, *options))


def test_compiles_without_a_graph_break():
    """A read, then a write that folds, in one graph: the torch form breaks it where it looks at the scale."""
    torch._dynamo.reset()

    def loss(impl, query, *held):
        attention, contents = cms.read_levels(query, held[0], held[1], held[3], impl=impl)
        memories, keys, norms, _ = cms.write_levels(*held, [0.25, 0.25], **RULE, impl=impl)
        return loss_of([*attention, *contents, *memories, *keys]) + sum(part.sum() for part in norms)

    function = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for calls, batch in enumerate((2, 3), start=1):
        shape = (batch, *SHAPES[1][1:])
        held = levels_of("write_lazy", shape, scale=2.0**-10)
        query = levels_of("read", shape)[0]
        wanted = leaves([query, *held])
        found, expected = (torch.autograd.grad(f(impl, query, *held), wanted) for f, impl in ((function, "compiled"), (loss, "recurrent")))
        assert (compiled.kernel_calls("cms_write_lazy"), compiled.kernel_calls("cms_read_backward")) == (2 * calls, 2 * calls)
        assert close(found, expected, FLOAT64)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func(kind):
    arguments = [parts if parts is None or torch.is_tensor(parts) else [part.detach() for part in parts] for parts in levels_of(kind)]
    place = 0 if kind == "read" else 4  # the query, or the values

    def along(impl, tensor):
        given = list(arguments)
        given[place] = tensor if kind == "read" else [tensor, *arguments[place][1:]]
        outputs = call(kind, given, impl)
        return sum((part**3).sum() for part in outputs[:4])

    point = (arguments[place] if kind == "read" else arguments[place][0]).detach()
    found, expected = (torch.func.grad(lambda x, impl=impl: along(impl, x))(point) for impl in ("compiled", "recurrent"))
    assert close([found], [expected], FLOAT64)
    batch = torch.stack([point, 2 * point, point - 1], dim=1)
    for transform in (lambda f: f, torch.func.grad):
        found = torch.func.vmap(transform(lambda x: along("compiled", x)), in_dims=1)(batch)
        expected = torch.stack([transform(lambda x: along("recurrent", x))(one) for one in batch.unbind(1)])
        assert close([found], [expected], FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_gradients_are_refused(kind):
    arguments = levels_of(kind)
    first, = torch.autograd.grad(loss_of(call(kind, arguments, "compiled")), leaves(arguments)[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="the compiled cms has no second-order gradients; the torch form has"):
        first.sum().backward()


@pytest.mark.parametrize("kind", ["device", "dtype", "mixed", "unbuilt", "asked"])
def test_what_the_kernel_cannot_take_runs_in_torch_or_raises(monkeypatch, kind):
    query, *held = (parts.detach() if torch.is_tensor(parts) else [part.detach() for part in parts] for parts in levels_of("read"))
    change = {"device": lambda t: t.to("meta"), "dtype": torch.Tensor.bfloat16}.get(kind, lambda t: t)
    query, held = change(query), [[change(part) for part in parts] for parts in held]
    words = {"device": "needs tensors on the CPU, found meta", "dtype": "all float32 or all float64, found torch.bfloat16",
             "mixed": "found torch.float32 and torch.float64", "unbuilt": "is not built: run `pip install -e"}
    if kind == "mixed":
        query = query.float()
    elif kind == "unbuilt":
        monkeypatch.setattr(cython_ext, "is_built", lambda name: name != "cms")
        with pytest.warns(RuntimeWarning, match=r"cython_ext\.cms is not built, the slow torch form runs"):
            cms.read_levels(query, *held, impl="compiled")
    elif kind == "asked":
        monkeypatch.setenv("GROUNDWAVE_KERNELS", "torch")
    if kind in ("dtype", "asked"):
        found, expected = (call("read", [query, *held], impl) for impl in ("compiled", "recurrent"))
        assert all(map(torch.equal, found, expected))
    assert compiled.kernel_calls() == 0
    if kind != "asked":
        monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
        with pytest.raises(RuntimeError, match=f"GROUNDWAVE_KERNELS=compiled, but the kernel cms .*{words[kind]}"):
            cms.read_levels(query, *held, impl="compiled")


@pytest.mark.parametrize("mode", ["auto", "torch"])
@pytest.mark.parametrize(("kind", "index", "change", "words"), [
    ("read", 0, lambda t: t[:, :1], r"query must have shape \(B, d_k\) = \(3, 4\), found \(3, 1\)"),
    ("read", 1, lambda t: [t[0][:, :0], t[1]], r"memory must have shape \(B, n, d\) or \(n, d\) with no axis empty, found \(3, 0, 5\)"),
    ("read", 1, lambda t: [part[:0] for part in t], r"memory must have shape \(B, n, d\) or \(n, d\) with no axis empty, found \(0, 3, 5\)"),
    ("read", 2, lambda t: t[:1], r"keys must have one entry for each of the 2 levels, found 1"),
    ("read", 3, lambda t: [t[0][None], t[1]], r"scale must have shape \(\) = \(\), found \(1,\)"),
    ("write_lazy", 2, lambda t: [t[0][:, :1], t[1]], r"norms must have shape \(B, n\) = \(3, 3\), found \(3, 1\)"),
    ("write_lazy", 4, lambda t: [t[0][:1], t[1]], r"value must have shape \(B, d\) = \(3, 5\), found \(1, 5\)"),
    ("write", 6, lambda t: [t[0][0], t[1]], r"gate must have shape \(B, 1\) = \(3, 1\), found \(1,\)"),
])
def test_wrong_shapes_are_refused_by_name_and_never_broadcast(monkeypatch, mode, kind, index, change, words):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
    arguments = levels_of(kind)
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=words):
        call(kind, arguments, "compiled")


CORE = dict(
    d_s=12, d_w=8, d_p=6, d_e=8, d_k=5, d_c=7, num_levels=2, cms_sizes=(3, 5), cms_dims=(7, 9), cms_decays=(0.5, 0.1),
    heads=("action", "world_model"))


@pytest.mark.parametrize("fields", [{}, {"use_mamba_wave": False, "cms_write": "slot0"}], ids=["default", "linear, slot0"])
def test_a_core_on_it_equals_the_core_in_torch(fields):
    """Twelve steps, in which a scale is folded, with every gradient; and a step on a plain memory."""
    config = WaveCoreConfig(**CORE | fields)
    torch.manual_seed(0)
    cores = [WaveCore(config, 4, 3, 2, impl=impl).double() for impl in ("recurrent", "compiled")]
    cores[1].load_state_dict(cores[0].state_dict())
    inputs = [torch.randn(12, 3, width, dtype=torch.float64) for width in (4, 3, 1)]
    results = []
    for core in cores:
        compiled.reset_kernel_calls()
        y, state, info = core.rollout(core.init_state(3), *inputs)
        memories = [*state.memories, *state.keys, *state.norms, *state.scales]
        loss = loss_of([y, info["next_obs"], *info["attention_weights"], *memories[:4]])
        gradients = torch.autograd.grad(loss, list(core.parameters()), materialize_grads=True)
        lone, after = core(*(part[0] for part in inputs), state.s, state.w, state.p, *core.memories(state))
        results.append(([y, *state[:3], *memories, lone, *after["cms_memories"], *after["cms_keys"]], gradients))
    assert [compiled.kernel_calls(f"cms_{name}") for name in ("read", "read_backward", "write_lazy", "write_lazy_backward", "write")] == [
        26, 24, 24, 24, 2]
    assert close(results[1][0], results[0][0], FLOAT64)
    assert close(results[1][1], results[0][1], 1e-10)
    with pytest.raises(ValueError, match="impl must be 'recurrent' or 'compiled', found 'chunked'"):
        WaveCore(dataclasses.replace(config), 4, 3, 2, impl="chunked")
