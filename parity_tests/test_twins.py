"""GroundedMamba in torch and JAX against its independent NumPy twin, over every field of the configuration, in float64.

What no golden vector reaches is proved here: the default variant, states passed in, the lower clamp, the learned gate and the memory bank.
Letters: B batch, L length, D width, V vocabulary, M slots.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from conf.models import GroundedMambaConfig
from parity_tests.twins import GroundedMambaTwin
from runtime.init import init_arrays

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import runtime  # noqa: E402
from torch_impl.grounded_mamba import GroundedMamba  # noqa: E402
from torch_impl.ops import compiled  # noqa: E402

# The project's bound between two implementations end to end: some 1e3 roundings of 1e-16 in a row, amplified by two normalisations a block.
BOUND = 1e-11
BASE = GroundedMambaConfig(
    vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, dt_bias=(0.4, -0.3),
    memory_size=13, memory_every=2, memory_writes=5, memory_alpha=0.07, retrieval_heads=3,
)
VARIANTS = {
    "default": {},
    "hard clamp": {"dt_clamp": "hard", "dt_bias": (-3.5, -2.5)},  # softplus(-3.5) = 0.030, inside [dt_min, dt_max]
    "hard clamp at its ends": {"dt_clamp": "hard", "dt_bias": (-16.0, 6.0)},  # below dt_min and above dt_max at every token
    "one step size": {"dt_bias": (0.2,)},
    "hard clamp, one step size": {"dt_clamp": "hard", "dt_bias": (-3.1,), "dt_min": 0.02, "dt_max": 0.06},
    "direct decay": {"decay": "direct"},
    "gain": {"time_first": "gain"},
    "learned gate": {"gate": "learned", "gate_ssm": 0.35},
    "keys as they are": {"normalised_key": False},
    "no readout norm": {"readout_norm": False},
    "tight spectral bound": {"max_singular": 0.05, "dt_max": 0.8},
    "no memory bank": {"memory_size": 0},
    "GroundThink": {
        "dt_bias": (1.0,), "dt_clamp": "hard", "decay": "direct", "time_first": "gain", "normalised_key": False, "readout_norm": False,
        "memory_size": 0,
    },
    "many at once": {
        "gate": "learned", "decay": "direct", "time_first": "gain", "readout_norm": False, "rwkv_heads": 3, "retrieval_heads": 2, "norm_eps": 1e-3,
    },
}


def config_of(variant, backend="torch"):
    """JAX gets one block but for the default: what it takes to compile grows with the depth."""
    return replace(BASE, **VARIANTS[variant], depth=1 if backend == "jax" and variant != "default" else BASE.depth)


def randomised(config, seed=0):
    """Initial arrays moved off zero and one, with a bank in which 9 slots are occupied, so that every leaf matters."""
    arrays, generator = init_arrays("grounded_mamba", config, seed), np.random.default_rng(seed)
    occupied = min(9, config.memory_size)
    for key, value in arrays.items():
        if key.endswith("memory_count"):
            value[:occupied] = generator.integers(1, 6, occupied)
        elif "memory_keys" in key or "memory_values" in key:
            value[:occupied] = 0.2 * generator.standard_normal((occupied, config.dim))
        elif value.dtype == np.float64:
            value += 0.15 * generator.standard_normal(value.shape)
        if key.endswith("time_decay") and config.decay == "direct":
            value[0, :3] = 0.0, -0.6, 1.02
    arrays["lm_head.weight"] = arrays["embedding.weight"]
    return arrays


def token_ids(config, seed, batch=3, length=11):
    return np.random.default_rng([3, seed]).integers(0, config.vocab_size, (batch, length))


def random_states(config, seed, batch=3):
    generator = np.random.default_rng([5, seed])
    shapes = {"ssm": (batch, config.ssm_dim), "wkv": (batch, config.rwkv_heads, config.head_dim, config.head_dim)}
    return [{key: generator.standard_normal(shape) for key, shape in shapes.items()} for _ in range(config.depth)]


BACKENDS = ("recurrent", "chunked", "compiled", "jax")


@pytest.fixture(params=BACKENDS)
def make(request, monkeypatch):
    """Function (config, arrays) -> model with the calls of `runtime`."""
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")

    def build(config, arrays):
        name = {"jax": "jax", "compiled": "torch_compiled"}.get(request.param, "torch")
        model = runtime.build("grounded_mamba", config, backend=name, arrays=arrays, dtype="float64")
        if request.param in ("recurrent", "chunked"):
            module = GroundedMamba(config, impl=request.param, chunk_size=4).double()  # three chunks, the last one short
            module.load_state_dict(model.module.state_dict())
            model.module = module
        return model

    build.backend = request.param
    return build


def assert_close(found, expected, what):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype == np.float64 and found.shape == expected.shape, what
    assert np.linalg.norm(found - expected) <= BOUND * np.linalg.norm(expected), what


def assert_same_results(results, expected, config):
    logits, states, aux = results
    assert_close(logits, expected["logits"], "logits")
    for i in range(config.depth):
        for key in ("ssm", "wkv"):
            assert_close(states[i][key], expected["states"][i][key], f"state {key} of block {i}")
        assert_close(aux["ssm_states"][i], expected["ssm_states"][i], f"SSM states of block {i}")
        assert_close(aux["gate"][i], expected["gate"][i], f"gate of block {i}")
        if config.memory_size:
            for name, found, row in zip(("key", "value"), aux["memory_rows"][i], expected["rows"][i], strict=True):
                assert_close(found, row, f"{name} rows of block {i}")
    assert len(aux["memory_rows"]) == (config.depth if config.memory_size else 0)


def assert_same_bank(arrays, twin):
    for key, expected in twin.arrays.items():
        if key.endswith(("memory_keys", "memory_values")):
            assert_close(arrays[key], expected, key)
        elif expected.dtype == np.int64:
            assert arrays[key].dtype == np.int64 and np.array_equal(arrays[key], expected), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(make, variant):
    config = config_of(variant, make.backend)
    arrays = randomised(config)
    model, twin = make(config, arrays), GroundedMambaTwin(config, arrays)
    compiled.reset_kernel_calls()
    ids = token_ids(config, 0)
    # Zeros say the same as None; in JAX they spare the second compilation, and the bank's tests pass None.
    start = model.init_states(len(ids)) if make.backend == "jax" else None
    assert_same_results(model(ids, start, return_aux=True), twin.forward(ids), config)
    states = random_states(config, 1)
    assert_same_results(model(ids, states, return_aux=True), twin.forward(ids, states), config)
    for name in ("selective_scan", "wkv"):
        assert compiled.kernel_calls(name) == (2 * config.depth if make.backend == "compiled" else 0), name


# Complex steps are exact, so what is left is the rounding of two gradients; acceptance asks 1e-10 between implementations.
GRADIENT_BOUND = 1e-11


@lru_cache
def slopes(config):
    """For every trained parameter a direction and the derivative along it of the mean next-token cross-entropy, by the twin."""
    arrays, ids, states = randomised(config), token_ids(config, 4, 2, 6), random_states(config, 4, 2)

    def loss(changed):
        logits = GroundedMambaTwin(config, changed).forward(ids, states)["logits"][:, :-1]
        total = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        return total.mean()

    found = {}
    frozen = ("memory_keys", "memory_values", "lm_head.weight", *(("gate_proj.weight", "gate_proj.bias") if config.gate == "fixed" else ()))
    for index, (key, value) in enumerate(arrays.items()):
        if value.dtype == np.float64 and not key.endswith(frozen):
            direction = np.random.default_rng([9, index]).standard_normal(value.shape)
            found[key] = direction, loss({**arrays, key: value + 1e-30j * direction}).imag / 1e-30
    return found


def torch_gradients(model, ids, states):
    ids = torch.from_numpy(ids)
    logits, _ = model(ids, states)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {key: parameter.grad.numpy() for key, parameter in model.module.named_parameters() if parameter.requires_grad}


def jax_gradients(model, ids, states):
    def loss(params):
        log_p = jax.nn.log_softmax(model.model.apply({**model.variables, "params": params}, ids, states)[0][:, :-1])
        return -jax.numpy.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()

    with jax.enable_x64(True):
        ids, states = jax.numpy.asarray(ids), jax.tree.map(jax.numpy.asarray, states)
        program = jax.jit(jax.grad(loss))
        if model.config.depth > 1:  # the default variant: compiled ahead, and so optimised as a user's program is
            program = program.lower(model.variables["params"]).compile()
        gradients = model.model.arrays({"params": program(model.variables["params"])})
    gradients.pop("lm_head.weight")
    return gradients


@pytest.mark.filterwarnings("error::numpy.exceptions.ComplexWarning")  # an imaginary part that is dropped is a derivative that is lost
# In JAX each takes seconds to compile: three variants use every differentiable piece but the hard clamp, which the golden vectors hold.
@pytest.mark.parametrize(
    "make, variant",
    [(backend, variant) for backend in BACKENDS for variant in VARIANTS
     if backend != "jax" or variant in ("default", "tight spectral bound", "many at once")],
    indirect=["make"],
)
def test_gradients(make, variant):
    """Every gradient by name against the twin's complex steps; through time and both branches, and with states passed in."""
    config = config_of(variant, make.backend)
    model = make(config, randomised(config))
    run = jax_gradients if make.backend == "jax" else torch_gradients
    gradients = run(model, token_ids(config, 4, 2, 6), random_states(config, 4, 2))
    expected = slopes(config)
    assert gradients.keys() == expected.keys()
    for key, (direction, slope) in expected.items():
        scale = np.linalg.norm(gradients[key]) * np.linalg.norm(direction)
        assert abs((gradients[key] * direction).sum() - slope) <= GRADIENT_BOUND * scale, key
        # Beyond its ends the hard clamp is flat, and GroundThink's initial bias lies there.
        dead = key.endswith(("dt_proj.weight", "dt_proj.bias")) and variant in ("hard clamp at its ends", "GroundThink")
        assert (scale == 0) == dead, key


def test_every_variant_is_another_function():
    """Otherwise a field that nobody reads would pass."""
    logits = {}
    for variant in VARIANTS:
        config = config_of(variant)
        logits[variant] = GroundedMambaTwin(config, randomised(config)).forward(token_ids(config, 0))["logits"]
    names = list(logits)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert np.linalg.norm(logits[first] - logits[second]) > 1e-3 * np.linalg.norm(logits[second]), (first, second)


@pytest.mark.parametrize("memory, length", [({}, 11), ({"memory_writes": 40}, 1), ({"memory_size": 4, "memory_writes": 7}, 11)])
def test_memory_written_and_read_from_empty(make, memory, length):
    """Twelve steps, a write on every second: slots fill (5 of 13 a time: the third write fills and chooses), then rows are averaged in."""
    config = replace(BASE, **memory)
    arrays = init_arrays("grounded_mamba", config, 2)
    generator = np.random.default_rng(8)
    for i in range(config.depth):
        arrays[f"blocks.{i}.rwkv.memory_gate"] += generator.standard_normal(config.dim)
    model, twin = make(config, arrays), GroundedMambaTwin(config, arrays)
    states = None
    for step in range(12):
        # T = 33 or 3 tokens, no multiple of the rows written; fewer than the rows asked for where there are 3.
        ids = token_ids(config, step, length=length)
        results, expected = model(ids, states, return_aux=True), twin.forward(ids, states)
        assert_same_results(results, expected, config)
        model.update_memory(results[2])
        twin.update_memory(expected["rows"])
        assert_same_bank(model.arrays(), twin)
        states = expected["states"]
    assert twin.arrays["blocks.1.rwkv.writes"] == 6 and twin.arrays["blocks.1.rwkv.update_counter"] == 12
    assert twin.arrays["blocks.0.rwkv.memory_count"].sum() == 6 * min(config.memory_writes, 3 * length, config.memory_size)
    silent = GroundedMambaTwin(config, {**twin.arrays, "blocks.1.rwkv.memory_gate": np.zeros(config.dim)})
    read = np.linalg.norm(silent.forward(ids)["logits"] - twin.forward(ids)["logits"])
    assert read > 1e-3 * np.linalg.norm(twin.forward(ids)["logits"])  # the bank reaches the logits


def rows_of(config, keys, seed=0):
    """Rows for every block: the given keys (R, D) and random values."""
    values = np.random.default_rng(seed).standard_normal((len(keys), config.dim))
    return {"memory_rows": [(np.array(keys, dtype=float), values + i) for i in range(config.depth)]}


def axis(config, *entries):
    """A key with the given (position, value) entries, zero elsewhere."""
    key = np.zeros(config.dim)
    for position, value in entries:
        key[position] = value
    return key


def test_choice_of_the_slot(make):
    """Ties, parallel keys, opposite keys, rows of one write that want the same slot; worked out by hand, and equal to the twin's."""
    config = replace(BASE, memory_size=6, memory_every=1)
    arrays = init_arrays("grounded_mamba", config, 0)
    model, twin = make(config, arrays), GroundedMambaTwin(config, arrays)

    def write(*keys):
        aux = rows_of(config, keys)
        model.update_memory(aux)
        twin.update_memory(aux["memory_rows"])
        held = model.arrays()
        assert_same_bank(held, twin)
        return held["blocks.1.rwkv.memory_count"].tolist()

    x, y = axis(config, (0, 2.0)), axis(config, (3, 1.0))
    assert write(y, x, x, x * 3.0) == [1, 1, 1, 1, 0, 0]
    # Two slots are left. The third row finds none: slots 1, 2, 3 tie (3 is parallel, not equal) and the lowest takes it. The fourth is
    # nearest to y, the fifth like the third: cosines are those before the write.
    assert write(-x, -y, x * 5.0, axis(config, (3, 4.0), (0, 1.0)), x * 0.1) == [2, 3, 1, 1, 1, 1]
    # Counts differ now, so de-biasing rounds the parallel slots differently: still a tie.
    assert write(x * 0.3) == [2, 4, 1, 1, 1, 1]
    assert write(-x * 7.0, -y) == [2, 4, 1, 1, 2, 2]


def test_parallel_keys_are_a_tie_whatever_rounding_says(make):
    """Equal tokens write parallel keys; the cosines of six such slots differ in their last bits, and the first slot must win all the same."""
    config = replace(BASE, depth=1, memory_size=6, memory_every=1)
    arrays = init_arrays("grounded_mamba", config, 0)
    for seed in range(8):
        generator = np.random.default_rng([11, seed])
        key, sizes = generator.standard_normal(config.dim), generator.uniform(0.1, 9.0, 7)
        arrays["blocks.0.rwkv.memory_count"][:] = 1
        arrays["blocks.0.rwkv.memory_keys"][:] = config.memory_alpha * sizes[:6, None] * key
        model, twin = make(config, arrays), GroundedMambaTwin(config, arrays)
        aux = rows_of(config, [sizes[6] * key])
        model.update_memory(aux)
        twin.update_memory(aux["memory_rows"])
        held = model.arrays()
        assert_same_bank(held, twin)
        assert held["blocks.0.rwkv.memory_count"].tolist() == [2, 1, 1, 1, 1, 1], seed


def test_an_empty_slot_is_no_candidate(make):
    """Rows beyond the last empty slot go to one occupied before the write, even when every cosine is negative."""
    config = replace(BASE, memory_size=4, memory_every=1, memory_writes=4)
    arrays = init_arrays("grounded_mamba", config, 0)
    model, twin = make(config, arrays), GroundedMambaTwin(config, arrays)
    x = axis(config, (1, 1.0))
    for keys in ((x, x + axis(config, (2, 1.0)), x), (-x, -x)):
        aux = rows_of(config, keys)
        model.update_memory(aux)
        twin.update_memory(aux["memory_rows"])
    held = model.arrays()
    assert_same_bank(held, twin)
    # The fourth slot takes the first row; the second finds cosines -1, -0.7, -1 and slot 1, not the slot that was empty (0 or +1).
    assert held["blocks.0.rwkv.memory_count"].tolist() == [1, 2, 1, 1]


def test_a_step_without_a_write_counts_and_changes_nothing_else(make):
    config = replace(BASE, memory_every=3)
    arrays = randomised(config)
    model = make(config, arrays)
    aux = model(token_ids(config, 0), return_aux=True)[2]
    for step, writes in ((1, 0), (2, 0), (3, 1), (4, 1)):
        model.update_memory(aux)
        held = model.arrays()
        assert held["blocks.1.rwkv.update_counter"] == step and held["blocks.1.rwkv.writes"] == writes
        assert np.array_equal(held["blocks.1.rwkv.memory_keys"], arrays["blocks.1.rwkv.memory_keys"]) == (writes == 0)


def test_an_empty_bank_reads_exactly_zero(make):
    arrays = init_arrays("grounded_mamba", BASE, 1)
    loud = {key: value + 5.0 if key.endswith("memory_gate") else value for key, value in arrays.items()}
    ids = token_ids(BASE, 0)
    assert np.array_equal(make(BASE, arrays)(ids)[0], make(BASE, loud)(ids)[0])
