"""LAM against the public code: every hidden state, the embedding, and of the first layer the rule's output, the layer's and both states.

The vectors come from that code itself in float64: `lam_small` (24 tokens, one chunk) and `lam_three_chunks` (192 tokens, of which decays
and chunk flux reach the outputs of the third chunk, and positions are interpolated). Letters: B batch, L length, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import build, public, read_arrays
from runtime.arrays import parameter_count

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from conf.models import LamConfig  # noqa: E402
from jax_impl.deltanet import HierarchicalRule  # noqa: E402
from jax_impl.functional import LamModel  # noqa: E402
from parity_tests.harness.adapters.nnx_trace import quick_options  # noqa: E402
from torch_impl.lam import LAM  # noqa: E402
from torch_impl.ops import compiled  # noqa: E402

# The bound of the project's acceptance; three chunks through two layers are met to some 1e-14.
BOUND = 1e-10
FILES = ("lam_small", "lam_three_chunks")


def golden(name: str) -> dict[str, dict[str, np.ndarray]]:
    """{"inputs": {...}, "weights": {...}, "outputs": {...}} and the array "config" under "" of "config"."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for key, value in read_arrays(Path(__file__).parent / "golden" / f"{name}.npz").items():
        group, _, rest = key.partition("/")
        tree.setdefault(group, {})[rest] = value
    return tree


def named(output: Any, layer: Any, core: Any, states: dict[str, Any]) -> dict[str, np.ndarray]:
    """A model's results under the golden file's names."""
    found = {f"hidden_{i}": value for i, value in enumerate(output.hidden_states)}
    found |= {"embedding": output.embedding, "layer0_delta_out": layer, "layer0_core": core}
    found |= {f"layer0_{name}": value for name, value in states.items()}
    return {name: np.asarray(value) for name, value in found.items()}


def run_torch(config: LamConfig, arrays: dict[str, np.ndarray], ids: np.ndarray, impl: str) -> dict[str, np.ndarray]:
    module = LAM(config, impl=impl).double()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()}, strict=True)
    caught: dict[str, Any] = {}
    module.blocks[0].delta.register_forward_hook(lambda _, __, result: caught.update(layer=result))
    module.blocks[0].delta.rule.register_forward_hook(lambda _, __, result: caught.update(core=result[0]))
    with torch.no_grad():
        output = module(torch.from_numpy(ids), output_hidden_states=True)
    return named(output, caught["layer"][0], caught["core"], caught["layer"][1])


def run_jax(config: LamConfig, arrays: dict[str, np.ndarray], ids: np.ndarray, impl: str) -> dict[str, np.ndarray]:
    call = HierarchicalRule.__call__
    model = LamModel(config, impl=impl, dtype="float64")

    def everything(variables: Any, ids: Any) -> tuple[Any, ...]:
        cores = []

        def recording(self: Any, *args: Any) -> Any:
            result = call(self, *args)
            cores.append(result[0])
            return result

        output = model.apply(variables, ids, output_hidden_states=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HierarchicalRule, "__call__", recording)
            layer, states = model.merge(variables).blocks[0].delta(output.hidden_states[0])
        return output, layer, cores[0], states

    with jax.enable_x64(True):
        arguments = model.variables(arrays), jax.numpy.asarray(ids)
        return named(*jax.jit(everything).lower(*arguments).compile(compiler_options=quick_options())(*arguments))


BACKENDS = {
    "torch_recurrent": (run_torch, "recurrent"),
    "torch_chunked": (run_torch, "chunked"),
    "torch_compiled": (run_torch, "compiled"),
    "jax_recurrent": (run_jax, "recurrent"),
    "jax_chunked": (run_jax, "chunked"),
}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every array within BOUND relative L2, and none missing on either side."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float64 and found[key].shape == value.shape, key
        assert np.linalg.norm(found[key] - value) <= BOUND * np.linalg.norm(value), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILES)
def test_every_vector(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")  # "auto" would quietly take the torch form
    run, impl = BACKENDS[backend]
    vectors = golden(name)
    config, arrays = public.config("lam", vectors["weights"]), public.rename("lam", vectors["weights"])
    compiled.reset_kernel_calls()
    assert_same(run(config, arrays, vectors["inputs"]["input_ids"], impl), vectors["outputs"])
    # else the compiled backend might be compared under another's name
    assert compiled.kernel_calls("hierarchical_delta_rule") == (config.depth if impl == "compiled" else 0)


@pytest.mark.parametrize("name", FILES)
def test_every_vector_of_the_engine(name: str) -> None:
    """Which shows of a layer its output alone."""
    pytest.importorskip("cython_ext.lam_engine")
    vectors = golden(name)
    config, arrays = public.config("lam", vectors["weights"]), public.rename("lam", vectors["weights"])
    output = build("lam", config, "cython", arrays, "float64")(vectors["inputs"]["input_ids"], output_hidden_states=True)
    found = {f"hidden_{i}": value for i, value in enumerate(output.hidden_states)} | {"embedding": output.embedding}
    assert_same(found, {key: value for key, value in vectors["outputs"].items() if not key.startswith("layer0_")})


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_read_off_the_shapes(name: str) -> None:
    vectors = golden(name)
    config = public.config("lam", vectors["weights"])
    sizes = (config.vocab_size, config.dim, config.heads, config.depth, config.ffn_dim, config.max_positions, config.gelu_repeats)
    assert sizes == tuple(vectors["config"][""])


@pytest.mark.parametrize(
    ("leaf", "entry", "change"),
    [("rule.chunk_flux.out.weight", (0, 1), 1e-3), ("slow_decay_proj.weight", (1, 3), 1e-3), ("rule.W_bilinear", (1, 2, 0), 0.1)],
    ids=["chunk_flux", "slow_decay", "bilinear"],
)
def test_a_changed_weight_is_noticed(leaf: str, entry: tuple[int, ...], change: float) -> None:
    """The bound can fail where it matters most: in the weights that only the third chunk sees."""
    vectors = golden("lam_three_chunks")
    arrays = public.rename("lam", vectors["weights"])
    arrays[f"blocks.0.delta.{leaf}"][entry] += change
    found = run_torch(public.config("lam", vectors["weights"]), arrays, vectors["inputs"]["input_ids"], "chunked")
    with pytest.raises(AssertionError):
        assert_same(found, vectors["outputs"])


def test_lam_base_has_the_parameters_of_the_public_model() -> None:
    config = LamConfig()
    assert parameter_count("lam", config) == sum(value.numel() for value in LAM(config).parameters()) == 23_700_948
    pooler = config.dim * config.dim + config.dim  # BERT's, which a public file carries and the model does not use
    assert parameter_count("lam", config) + pooler == 23_848_788
