"""Models in JAX over the compiled kernels against the same models over JAX's recurrent forms: outputs, states, gradients; which kernels run."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
for _kernel in ("selective_scan", "wkv", "delta_rule", "xla_ffi"):
    pytest.importorskip(f"cython_ext.{_kernel}")

import runtime  # noqa: E402
from conf.models import DeltaNetConfig, GroundedMambaConfig  # noqa: E402
from jax_impl.ops import compiled  # noqa: E402

# Several chunks, the last one short, and for GroundedMamba a learned gate besides.
CASES = {
    "grounded_mamba": (
        GroundedMambaConfig(vocab_size=23, dim=12, depth=1, ssm_dim=5, rwkv_heads=2, memory_size=0, gate="learned"),
        ("selective_scan", "wkv"),
    ),
    "deltanet_lm": (DeltaNetConfig(vocab_size=23, dim=12, depth=1, heads=3, ffn_dim=17, conv_kernel=3, chunk_size=5), ("delta_rule",)),
}


def distance(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype == np.float64 and found.shape == expected.shape
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0)


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients(name, monkeypatch):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    config, kernels = CASES[name]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 37))
    found = []
    for backend in ("jax", "jax_compiled"):
        model = runtime.build(name, config, backend, dtype="float64", seed=3)
        with jax.enable_x64(True):
            function = model.model if backend == "jax_compiled" else type(model.model)(config, impl="recurrent", dtype="float64")
            before = [{key: 0.1 + leaf for key, leaf in state.items()} for state in model.init_states(2)]

            def loss(params, function=function, model=model, before=before):
                logits, states = function.apply({**model.variables, "params": params}, ids, before)
                return -jax.nn.log_softmax(logits)[..., 3].mean() + sum((leaf**2).mean() for leaf in jax.tree.leaves(states)), (logits, states)

            compiled.reset_kernel_calls()
            found.append(jax.block_until_ready(jax.jit(jax.value_and_grad(loss, has_aux=True))(model.variables["params"])))
        runs = (config.depth,) * 2 if backend == "jax_compiled" else (0, 0)
        for kernel in kernels:
            assert (compiled.kernel_calls(kernel), compiled.kernel_calls(f"{kernel}_backward")) == runs
    ((_, outputs), gradients), ((_, other_outputs), other_gradients) = found
    assert max(jax.tree.leaves(jax.tree.map(distance, other_outputs, outputs))) < 1e-11
    assert max(jax.tree.leaves(jax.tree.map(distance, other_gradients, gradients))) < 1e-10
