"""LAM-base: one sentence of 16, 128 and 512 tokens, against its own torch forms and against all-MiniLM-L6-v2 through transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from conf.distil_schema import TeacherConfig
from conf.models import LamConfig
from experiments.benchmarks import bounds, gate, peers
from experiments.benchmarks.case import PRODUCTS, STREAM, Case, Target
from experiments.distillation import teacher
from experiments.errors import RunError
from parity_tests import specs
from runtime import build
from runtime.encoders import quiet
from runtime.init import init_arrays
from torch_impl.lam import LAM

CONFIG = LamConfig()
EAGER, COMPILE, KERNELS, JAX, ENGINE, ONNX = "torch, chunked", "torch.compile", "torch, compiled kernels", "jax", "engine", "ONNX Runtime"
LOOP = "torch, loop"
MINILM, MINILM_COMPILE, MINILM_ONNX = "MiniLM, transformers", "MiniLM, torch.compile", "MiniLM, ONNX Runtime"
IMPLS = {LOOP: "recurrent", EAGER: "chunked", KERNELS: "compiled"}


@cache
def arrays() -> dict[str, np.ndarray]:
    """The weights that every contender has."""
    return init_arrays("lam", CONFIG, 0)


@cache
def parity() -> gate.Check:
    return gate.battery(next(case for case in specs.FULL if case.name == "lam"))


def module(impl: str, dtype: torch.dtype = torch.float32) -> LAM:
    """The torch module in one of its forms."""
    made = LAM(CONFIG, impl=impl).to(dtype).eval()
    made.load_state_dict({name: torch.from_numpy(value) for name, value in arrays().items()})
    return made


def ids(batch: int, length: int) -> np.ndarray:
    """Random token ids (B, L)."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, length))


def agreement(tokens: np.ndarray) -> list[gate.Check]:
    """Hidden states of every form against those of torch's chunk after chunk in float64."""
    forms: dict[str, dict[str, np.ndarray]] = {}
    for dtype in ("float64", "float32"):
        given, kind = torch.from_numpy(tokens), getattr(torch, dtype)
        found = {name: peers.torch_call(module(impl, kind), given)().last_hidden_state.numpy() for name, impl in IMPLS.items()}
        for name, backend in ((JAX, "jax"), (ENGINE, "cython")):
            found[name] = np.asarray(build("lam", CONFIG, backend, arrays(), dtype)(tokens).last_hidden_state)
        forms[dtype] = found
    truth = forms["float64"].pop(LOOP)
    return [parity(), *gate.agreement(truth, forms["float64"], forms["float32"], LOOP)]


def minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2 as transformers loads it. Raises ImportError where its package is not installed."""
    from transformers import AutoModel

    try:
        folder = teacher.locate(TeacherConfig())
    except RunError as error:
        raise ImportError(str(error)) from error
    with teacher.offline(), quiet():
        return AutoModel.from_pretrained(folder, local_files_only=True).eval()


def embedding(made: torch.nn.Module, given: torch.Tensor) -> Callable[[], Any]:
    """The teacher's sentence embedding: the unit mean of its last hidden states, as LAM's."""
    def call() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.normalize(made(input_ids=given).last_hidden_state.mean(1), dim=-1)

    return call


def encode(length: int, threads: int) -> Case:
    tokens = ids(1, length)
    given, made = torch.from_numpy(tokens), build("lam", CONFIG, "jax", arrays())
    model, variables, engine, eager = made.model, made.variables, build("lam", CONFIG, "cython", arrays()), module("chunked")
    shapes = bounds.linear_products(eager, peers.torch_call(eager, given))
    weights = sum(4 * value.size for name, value in arrays().items() if not name.startswith("embeddings."))
    case = Case(
        name=f"lam_{length}", title=f"LAM-base, one sentence of {length} tokens", checks=agreement(tokens),
        contenders={
            EAGER: peers.torch_call(eager, given), KERNELS: peers.torch_call(module("compiled"), given),
            JAX: peers.jax_call(lambda v, x: model.apply(v, x).embedding, variables, jnp.asarray(tokens)), ENGINE: lambda: engine(tokens),
        },
        bounds={PRODUCTS: bounds.products(shapes), STREAM: bounds.stream(weights)},
        targets=[
            Target("engine against torch, eager", EAGER, ENGINE, 1.0), Target("engine against torch.compile", COMPILE, ENGINE, 1.0),
            Target("engine against MiniLM through transformers", MINILM, ENGINE, 1.5 if length == 512 else 1.0),
        ],
        operations=sum(shape.operations for shape in shapes), bytes=weights, rounds=25,
    )
    case.peer(COMPILE, lambda: peers.compiled_call(module("chunked"), given))
    case.peer(MINILM, lambda: embedding(minilm(), given))
    case.peer(MINILM_COMPILE, lambda: embedding(torch.compile(minilm(), dynamic=False), given))
    case.peer(ONNX, lambda: peers.onnx_call(module("chunked"), threads, given))
    case.peer(MINILM_ONNX, lambda: peers.onnx_call(minilm(), threads, given))
    return case


CASES = [partial(encode, length) for length in (16, 128, 512)]
