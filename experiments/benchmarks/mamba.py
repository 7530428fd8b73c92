"""GroundedMamba at its default sizes: forward of 256 tokens, training step of 4 x 256, one token after 16 and after 16,384."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from conf.models import GroundedMambaConfig
from experiments.benchmarks import bounds, gate, peers
from experiments.benchmarks.case import BOUND, PRODUCTS, STREAM, Case, Target
from experiments.benchmarks.measure import Call
from parity_tests import specs
from runtime import build
from runtime.init import init_arrays
from torch_impl.grounded_mamba import GroundedMamba

CONFIG = GroundedMambaConfig()
TOKENS = 256
LOOP, CHUNKED, COMPILE, KERNELS = "torch, loop", "torch, chunked", "torch.compile", "torch, compiled kernels"
JAX, JAX_KERNELS, ENGINE, BFLOAT16, ONNX = "jax", "jax, compiled kernels", "engine", "engine, bfloat16", "ONNX Runtime"
JAX_BACKENDS = {JAX: "jax", JAX_KERNELS: "jax_compiled"}
KINDS = {ENGINE: None, BFLOAT16: "bfloat16"}
IMPLS = {LOOP: "recurrent", CHUNKED: "chunked", KERNELS: "compiled"}


def ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids (B, L)."""
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


@cache
def arrays() -> dict[str, np.ndarray]:
    """The weights that every contender has."""
    return init_arrays("grounded_mamba", CONFIG, 0)


def module(impl: str, dtype: torch.dtype = torch.float32) -> GroundedMamba:
    """The torch module in one of its forms."""
    made = GroundedMamba(CONFIG, impl=impl).to(dtype)
    made.load_state_dict({name: torch.from_numpy(value) for name, value in arrays().items()})
    return made


@cache
def parity() -> gate.Check:
    return gate.battery(specs.FULL[0])


def agreement(tokens: np.ndarray) -> list[gate.Check]:
    """Every form against the loop in float64 on the ids that are timed."""
    forms: dict[str, dict[str, np.ndarray]] = {}
    for dtype in ("float64", "float32"):
        found = {}
        for name, impl in IMPLS.items():
            found[name] = peers.torch_call(module(impl, getattr(torch, dtype)), torch.from_numpy(tokens))()[0].numpy()
        for name, backend in (JAX_BACKENDS | {ENGINE: "cython"}).items():
            found[name] = build("grounded_mamba", CONFIG, backend, arrays(), dtype)(tokens)[0]
        forms[dtype] = found
    truth = forms["float64"].pop(LOOP)
    small = build("grounded_mamba", CONFIG, "cython", arrays(), weights="bfloat16")(tokens)[0]
    return [parity(), *gate.agreement(truth, forms["float64"], forms["float32"], LOOP), gate.alike(BFLOAT16, truth, small)]


def functional(backend: str = "jax") -> tuple[Any, Any]:
    """JAX's functional model and its variables."""
    made = build("grounded_mamba", CONFIG, backend, arrays())
    return made.model, made.variables


def jax_forward(backend: str, tokens: np.ndarray) -> Call:
    model, variables = functional(backend)
    return peers.jax_call(lambda v, x: model.apply(v, x)[0], variables, jnp.asarray(tokens))


def forward(threads: int) -> Case:
    tokens = ids(1, TOKENS)
    given = torch.from_numpy(tokens)
    engine = build("grounded_mamba", CONFIG, "cython", arrays())
    chunked = module("chunked")
    shapes = bounds.linear_products(chunked, peers.torch_call(chunked, given))
    case = Case(
        name="mamba_forward", title=f"GroundedMamba, forward of {TOKENS} tokens", checks=agreement(tokens),
        contenders={
            **{name: peers.torch_call(module(impl), given) for name, impl in IMPLS.items()},
            **{name: jax_forward(backend, tokens) for name, backend in JAX_BACKENDS.items()},
            ENGINE: lambda: engine(tokens),
        },
        bounds={PRODUCTS: bounds.products(shapes), STREAM: bounds.stream(weight_bytes())},
        targets=[
            Target("compiled kernels in torch against the loop", LOOP, KERNELS, 12),
            Target("compiled kernels in torch, of the products' rate", BOUND, KERNELS, 0.6),
            Target("engine against the loop", LOOP, ENGINE, 12), Target("engine, of the products' rate", BOUND, ENGINE, 0.6),
            Target("torch's chunks against the loop", LOOP, CHUNKED, 4), Target("JAX against the loop", LOOP, JAX, 8),
            Target("compiled kernels in JAX against JAX", JAX, JAX_KERNELS, 1.0),
        ],
        operations=sum(shape.operations for shape in shapes), bytes=weight_bytes(),
    )
    case.peer(COMPILE, lambda: peers.torch_call(block_by_block(module("chunked")), given))
    case.peer(ONNX, lambda: peers.onnx_call(without_bank(), threads, given))
    return case


def without_bank() -> GroundedMamba:
    """The same function for an exporter, which cannot choose by what a bank holds: an empty bank is not read."""
    made = GroundedMamba(dataclasses.replace(CONFIG, memory_size=0), impl="chunked")
    made.load_state_dict({name: torch.from_numpy(arrays()[name]) for name in made.state_dict()})
    return made


def block_by_block(made: GroundedMamba) -> GroundedMamba:
    """Its blocks through `torch.compile`, which compiles one and uses it for all; the whole model at once takes eight minutes."""
    for block in made.blocks:
        block.compile(dynamic=False)
    return made


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def torch_gradients(made: GroundedMamba, given: torch.Tensor) -> list[torch.Tensor]:
    """Of every trainable parameter, by name."""
    made.zero_grad(set_to_none=True)
    loss(made(given)[0], given).backward()
    return [parameter.grad for _, parameter in sorted(made.named_parameters()) if parameter.grad is not None]


def jax_loss(model: Any) -> Callable[..., Any]:
    def of(params: Any, rest: Any, given: Any) -> Any:
        logits = model.apply({**rest, "params": params}, given)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), given[:, 1:, None], axis=-1).mean()

    return of


def training(threads: int) -> Case:
    tokens = ids(4, TOKENS)
    given = torch.from_numpy(tokens)
    chunked = module("chunked")
    shapes = bounds.with_gradients(bounds.linear_products(chunked, peers.torch_call(chunked, given)))
    modules = {name: module(impl) for name, impl in IMPLS.items()}
    return Case(
        name="mamba_training", title=f"GroundedMamba, forward and backward of 4 x {TOKENS} tokens", checks=gradient_agreement(),
        contenders={
            **{name: (lambda made=made: torch_gradients(made, given)) for name, made in modules.items()},
            **{name: jax_training(backend, tokens) for name, backend in JAX_BACKENDS.items()},
        },
        bounds={PRODUCTS: bounds.products(shapes), STREAM: bounds.stream(3 * weight_bytes())},
        targets=[
            Target("compiled kernels in torch against the loop", LOOP, KERNELS, 15),
            Target("compiled kernels in torch, of the products' rate", BOUND, KERNELS, 0.6),
            Target("JAX against the loop", LOOP, JAX, 10), Target("compiled kernels in JAX against the loop", LOOP, JAX_KERNELS, 10),
            Target("compiled kernels in JAX against JAX", JAX, JAX_KERNELS, 1.0),
        ],
        operations=sum(shape.operations for shape in shapes), bytes=3 * weight_bytes(), budget=90.0,
    )


def jax_training(backend: str, tokens: np.ndarray) -> Call:
    model, variables = functional(backend)
    rest = {name: value for name, value in variables.items() if name != "params"}
    return peers.jax_call(jax.value_and_grad(jax_loss(model)), variables["params"], rest, jnp.asarray(tokens))


def gradient_agreement() -> list[gate.Check]:
    """Gradients of every form against the loop's in float64, on 2 x 67 tokens: ragged in every chunk."""
    tokens = ids(2, 67, seed=1)
    forms: dict[str, dict[str, np.ndarray]] = {}
    for dtype in ("float64", "float32"):
        found = {}
        for name, impl in IMPLS.items():
            made = module(impl, getattr(torch, dtype))
            torch_gradients(made, torch.from_numpy(tokens))
            found[name] = {key: parameter.grad.numpy() for key, parameter in made.named_parameters() if parameter.grad is not None}
        for name, backend in JAX_BACKENDS.items():
            made = build("grounded_mamba", CONFIG, backend, arrays(), dtype)
            with jax.enable_x64(dtype == "float64"):
                rest = {key: value for key, value in made.variables.items() if key != "params"}
                back = jax.jit(jax.grad(jax_loss(made.model)))(made.variables["params"], rest, jnp.asarray(tokens))
                found[name] = made.model.arrays({**rest, "params": back})
        names = sorted(found[LOOP])
        forms[dtype] = {name: np.concatenate([np.ravel(held[key]) for key in names]) for name, held in found.items()}
    truth = forms["float64"].pop(LOOP)
    return [parity(), *gate.agreement(truth, forms["float64"], forms["float32"], LOOP)]


def weight_bytes() -> int:
    """Of what a forward reads: all parameters but the memory bank's, the table of embeddings once, as the head."""
    skipped = ("memory_", "update_counter", "writes")
    return sum(4 * value.size for name, value in arrays().items() if name != "lm_head.weight" and not any(part in name for part in skipped))


def decode(threads: int) -> Case:
    token, far = ids(1, 1), 16_384
    given, (model, variables) = torch.from_numpy(token), functional()
    engines = {name: build("grounded_mamba", CONFIG, "cython", arrays(), weights=kind).engine for name, kind in KINDS.items()}
    near_states = {name: engine.prefill(ids(1, 16))[1] for name, engine in engines.items()}
    far_states = {name: engine.prefill(ids(1, far))[1] for name, engine in engines.items()}
    out = np.empty((1, CONFIG.vocab_size), np.float32)
    states = [{name: value.copy() for name, value in state.items()} for state in far_states[ENGINE]]
    tensors = [{name: torch.from_numpy(value) for name, value in state.items()} for state in states]
    near = f"{ENGINE}, after 16 tokens"
    return Case(
        name="mamba_decode", title=f"GroundedMamba, one token after {far:,}", checks=step_agreement(),
        contenders={
            LOOP: peers.torch_call(module("recurrent"), given, tensors), KERNELS: peers.torch_call(module("compiled"), given, tensors),
            JAX: peers.jax_call(lambda *a: model.apply(*a), variables, jnp.asarray(token), peers.device(states)),
            **{name: (lambda engine=engine, name=name: engine.decode(token[0], far_states[name], out)) for name, engine in engines.items()},
            near: lambda: engines[ENGINE].decode(token[0], near_states[ENGINE], out),
        },
        bounds={STREAM: bounds.stream(weight_bytes())},
        targets=[
            Target("engine against the loop", LOOP, ENGINE, 3), Target("engine, of the read bandwidth", BOUND, ENGINE, 0.6),
            Target("cost after 16,384 tokens over cost after 16", ENGINE, near, most=1.05),
            Target("bfloat16 weights against float32", ENGINE, BFLOAT16, 1.0),
        ],
        operations=weight_bytes() / 2, bytes=weight_bytes(), rounds=60,
    )


def step_agreement() -> list[gate.Check]:
    """A token after 45 others, in every form, against the loop over all 46 in float64."""
    tokens = ids(1, 46, seed=2)
    truth = peers.torch_call(module("recurrent", torch.float64), torch.from_numpy(tokens))()[0][:, -1].numpy()
    forms: dict[str, dict[str, np.ndarray]] = {"float64": {}, "float32": {}}
    for dtype, found in forms.items():
        for name, backend in ((CHUNKED, "torch"), (KERNELS, "torch_compiled"), (JAX, "jax"), (ENGINE, "cython")):
            made = build("grounded_mamba", CONFIG, backend, arrays(), dtype)
            _, states = made(tokens[:, :-1])
            found[name] = made(tokens[:, -1:], states)[0][:, -1]
        loop = module("recurrent", getattr(torch, dtype))
        with torch.no_grad():
            _, states = loop(torch.from_numpy(tokens[:, :-1]))
            found[LOOP] = loop(torch.from_numpy(tokens[:, -1:]), states)[0][:, -1].numpy()
    small = build("grounded_mamba", CONFIG, "cython", arrays(), weights="bfloat16").engine
    states = small.prefill(tokens[:, :-1])[1]
    return [parity(), *gate.agreement(truth, forms["float64"], forms["float32"], LOOP),
            gate.alike(BFLOAT16, truth, small.decode(tokens[0, -1:], states))]


CASES = [forward, training, decode]
