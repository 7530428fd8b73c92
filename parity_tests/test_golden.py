"""GroundedMamba against the public GroundThink code: logits, blocks, states, loss and every gradient, in float64, on every backend.

The vectors come from that code itself (`golden/groundthink_small.npz`); it has no states passed in and nothing that only the default
variant has, which `test_twins.py` covers. Letters: B batch, L length, D width, V vocabulary.
"""

from pathlib import Path

import numpy as np
import pytest

from runtime import public, read_arrays

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from jax_impl.functional import GroundedMambaModel  # noqa: E402
from torch_impl.grounded_mamba import GroundedMamba  # noqa: E402
from torch_impl.ops import compiled  # noqa: E402

# The bound of the project's acceptance: 40 tokens through two blocks are some 1e3 roundings of 1e-16 in a row, and gradients as many again.
BOUND = 1e-10


@pytest.fixture(scope="module")
def golden():
    """{"inputs": {...}, "weights": {...}, "outputs": {...}, "grads": {...}, "config": array}."""
    tree = {}
    for key, value in read_arrays(Path(__file__).parent / "golden" / "groundthink_small.npz").items():
        group, _, name = key.partition("/")
        if name:
            tree.setdefault(group, {})[name] = value
        else:
            tree[group] = value
    return tree


def run_torch(config, arrays, ids, impl):
    """Outputs and gradients under the golden file's names."""
    module = GroundedMamba(config, impl=impl, chunk_size=16).double()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()}, strict=True)
    blocks = []
    for block in module.blocks:
        block.register_forward_hook(lambda _, __, result: blocks.append(result[0]))
    ids = torch.from_numpy(ids)
    logits, states = module(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    outputs = {"logits": logits, "loss": loss, **{f"block_{i}": block for i, block in enumerate(blocks)}}
    for i, state in enumerate(states):
        outputs |= {f"ssm_state_{i}": state["ssm"], f"wkv_state_{i}": state["wkv"]}
    grads = {key: parameter.grad.numpy() for key, parameter in module.named_parameters() if parameter.requires_grad}
    return {key: value.detach().numpy() for key, value in outputs.items()}, grads


def run_jax(config, arrays, ids, impl):
    with jax.enable_x64(True):
        model = GroundedMambaModel(config, impl=impl, chunk_size=16, dtype="float64")
        variables = model.variables(arrays)

        def loss_of(params):
            logits, states = model.apply({**variables, "params": params}, ids)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            loss = -jax.numpy.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()
            return loss, (logits, states)

        def blocks(params):
            module, found = model.merge({**variables, "params": params}), []
            x = module.embedding(ids)
            for block in module.blocks:
                x, _, _ = block(x)
                found.append(x)
            return found

        ids = jax.numpy.asarray(ids)
        (loss, (logits, states)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])
        outputs = {"logits": logits, "loss": loss}
        for i, (x, state) in enumerate(zip(jax.jit(blocks)(variables["params"]), states, strict=True)):
            outputs |= {f"block_{i}": x, f"ssm_state_{i}": state["ssm"], f"wkv_state_{i}": state["wkv"]}
        grads = model.arrays({"params": grads})
    del grads["lm_head.weight"]  # the same array as the embedding's
    return {key: np.asarray(value) for key, value in outputs.items()}, grads


BACKENDS = {
    "torch_recurrent": (run_torch, "recurrent"),
    "torch_chunked": (run_torch, "chunked"),
    "torch_compiled": (run_torch, "compiled"),
    "jax_recurrent": (run_jax, "recurrent"),
    "jax_chunked": (run_jax, "chunked"),
}


KERNELS = ("selective_scan", "selective_scan_backward", "wkv", "wkv_backward")


@pytest.fixture(scope="module", params=BACKENDS)
def results(request, golden):
    """(backend, outputs, gradients, {kernel: how often it ran})."""
    run, impl = BACKENDS[request.param]
    arrays = public.rename("grounded_mamba", golden["weights"])
    config = public.config("grounded_mamba", golden["weights"])
    with pytest.MonkeyPatch.context() as patch:
        # "compiled" raises where "auto" would quietly take the torch form.
        patch.setenv("GROUNDWAVE_KERNELS", "compiled")
        compiled.reset_kernel_calls()
        outputs, grads = run(config, arrays, golden["inputs"]["input_ids"], impl)
        calls = {name: compiled.kernel_calls(name) for name in KERNELS}
    return request.param, outputs, grads, calls


def assert_same(found, expected):
    """Every array within BOUND relative L2, and no array missing on either side."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float64 and found[key].shape == value.shape, key
        assert np.linalg.norm(found[key] - value) <= BOUND * np.linalg.norm(value), key


def test_outputs(results, golden):
    assert_same(results[1], golden["outputs"])


def test_every_gradient(results, golden):
    assert all(np.linalg.norm(value) > 0 for value in golden["grads"].values())
    assert_same(results[2], golden["grads"])


def test_the_kernels_ran_where_they_should_and_nowhere_else(results, golden):
    """Else the compiled backend might be compared under another's name."""
    backend, *_, calls = results
    assert calls == dict.fromkeys(KERNELS, int(golden["config"][2]) if backend == "torch_compiled" else 0)


def test_a_changed_weight_is_noticed(golden):
    """The bound can fail: one entry of one weight, changed by 1e-6, moves the logits beyond it."""
    arrays = public.rename("grounded_mamba", golden["weights"])
    arrays["blocks.0.rwkv.time_decay"][1, 2] += 1e-6
    outputs, _ = run_torch(public.config("grounded_mamba", golden["weights"]), arrays, golden["inputs"]["input_ids"], "chunked")
    with pytest.raises(AssertionError, match="logits"):
        assert_same(outputs, golden["outputs"])
