"""One model in every form that can be timed or compared: torch's forms, `torch.compile`, JAX, engines, ONNX Runtime."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

Forward = Callable[[np.ndarray], np.ndarray]


def torch_call(module: torch.nn.Module, *inputs: torch.Tensor) -> Callable[[], Any]:
    """The module's forward without gradients."""
    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return call


def compiled_call(module: torch.nn.Module, *inputs: torch.Tensor) -> Callable[[], Any]:
    """The same through `torch.compile`; shapes are fixed. The module keeps no trace of it."""
    return torch_call(torch.compile(module, dynamic=False), *inputs)


def jax_call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A jitted function, waited for."""
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arguments))


def device(tree: Any) -> Any:
    """NumPy arrays as JAX arrays."""
    return jax.tree.map(jnp.asarray, tree)


def onnx_call(module: torch.nn.Module, threads: int, *inputs: torch.Tensor) -> Callable[[], Any]:
    """The module exported and run by ONNX Runtime. Raises ImportError where its packages are missing, RuntimeError where it does not export."""
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx names it only when it is too late

    quietly = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    for logger in quietly:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            with torch.inference_mode(False):
                program = torch.onnx.export(module, inputs, dynamo=True, verbose=False, optimize=True)
        except Exception as error:  # every kind of failure of an exporter is a reason to leave this peer out, with its message
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise RuntimeError(f"torch.onnx.export: {str(cause).strip()}") from error
        held = io.BytesIO()
        program.save(held)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(held.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)
