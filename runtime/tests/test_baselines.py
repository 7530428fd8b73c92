"""The baselines of the comparison, `transformer` and `gru`: of GroundedMamba's size, the same on both backends, and what they say they are."""

from dataclasses import replace

import numpy as np
import pytest

import runtime
from conf.baselines import GruConfig, TransformerConfig
from conf.models import GroundedMambaConfig
from runtime.arrays import layout, parameter_count
from runtime.init import init_arrays

pytest.importorskip("torch")
pytest.importorskip("flax")

CONFIGS = {
    "transformer": TransformerConfig(vocab_size=23, dim=18, depth=2, heads=3, ffn_dim=11, window=4), "gru": GruConfig(vocab_size=23, dim=13, depth=2),
}
KINDS = {"transformer": ["k", "seen", "v"], "gru": ["h"]}
IDS = np.random.default_rng(0).integers(0, 23, (2, 17))


def randomised(name):
    """No leaf at zero or one, so that every one of them matters."""
    generator = np.random.default_rng(2)
    arrays = {key: value + 0.3 * generator.standard_normal(value.shape) for key, value in init_arrays(name, CONFIGS[name], 2).items()}
    return arrays | {"lm_head.weight": arrays["embedding.weight"]}


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("size, mamba", [
    ("tiny", GroundedMambaConfig(vocab_size=258, dim=128, depth=4, ssm_dim=16, rwkv_heads=4)),
    ("small", GroundedMambaConfig(vocab_size=258, dim=256, depth=6, ssm_dim=16, rwkv_heads=4)),
])
def test_presets_are_of_grounded_mambas_size(size, mamba):
    for name, kind in (("transformer", TransformerConfig), ("gru", GruConfig)):
        config = kind.preset(size, vocab_size=258)
        assert abs(parameter_count(name, config) / parameter_count("grounded_mamba", mamba) - 1) < 0.02
        assert config.depth == mamba.depth
        with pytest.raises(ValueError, match="preset must be one of 'tiny', 'small', found 'huge'"):
            kind.preset("huge")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_the_state_dict(name):
    held = runtime.build(name, CONFIGS[name]).module.state_dict()
    assert sorted((key, entry.shape) for key, entry in layout(name, CONFIGS[name]).items()) == sorted(
        (key, tuple(value.shape)) for key, value in held.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_backends_agree_stream_and_generate_alike(name):
    models = [runtime.build(name, CONFIGS[name], backend, randomised(name), "float64") for backend in ("torch", "jax")]
    (a, states_a, aux_a), (b, states_b, aux_b) = (model(IDS, return_aux=True) for model in models)
    assert isinstance(b, np.ndarray) and a.shape == b.shape == (2, 17, 23) and aux_a == aux_b == {}
    assert relative(b, a) < 1e-11  # what the project promises between two backends, end to end
    for found, expected in zip(states_b, states_a, strict=True):
        assert sorted(found) == sorted(expected) == KINDS[name]
        assert all(relative(found[kind], value) < 1e-11 for kind, value in expected.items())
    for model in models:
        pieces, states = [], None
        for low, high in ((0, 1), (1, 3), (3, 12), (12, 17)):  # shorter and longer than the window
            piece, states = model(IDS[:, low:high], states)
            pieces.append(piece)
        assert relative(np.concatenate(pieces, 1), a) < 1e-13  # the same sums in another order
    options = dict(temperature=0.7, top_k=5, seed=3)
    first, second = (model.generate(IDS[:1, :2], 9, **options) for model in models)
    assert first.shape == (1, 11) and np.array_equal(first, second)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_on_one_load_on_the_other(tmp_path, name):
    model = runtime.build(name, CONFIGS[name], "jax", randomised(name), "float64")
    runtime.save(model, tmp_path)
    loaded = runtime.load(tmp_path, backend="torch")
    assert (loaded.name, loaded.config, loaded.dtype) == (name, CONFIGS[name], "float64")
    assert all(np.array_equal(value, loaded.arrays()[key]) for key, value in model.arrays().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_refused(name):
    for backend in ("torch_compiled", "jax_compiled", "cython"):
        with pytest.raises(ValueError, match=f"backend of '{name}' must be one of 'torch', 'jax', found '{backend}'$"):
            runtime.build(name, CONFIGS[name], backend)
    for backend in ("torch", "jax"):
        model = runtime.build(name, CONFIGS[name], backend)
        kind = KINDS[name][0]
        with pytest.raises(ValueError, match=r"input_ids .*\[0, 23\), found 23"):
            model([[3, 23]])
        states = model(IDS)[1]
        with pytest.raises(ValueError, match=rf"states\[0\]\['{kind}'\] must have shape \(1, .*found \(2, "):
            model(IDS[:1], states)
        with pytest.raises(ValueError, match=rf"states\[1\]\['{kind}'\] .* must be finite, found NaN"):
            model(IDS, [states[0], {**states[1], kind: np.full_like(states[1][kind], np.nan)}])


def test_the_context_of_the_transformer_is_bounded_and_that_of_the_gru_is_not():
    """The logits at the end change with the token depth * window before them, and not with any older one."""
    changed = IDS.copy()
    edge = 16 - 2 * 4
    for place, seen in ((edge, True), (edge - 1, False)):
        changed[:] = IDS
        changed[:, place] = (IDS[:, place] + 1) % 23
        for name, moves in (("transformer", seen), ("gru", True)):
            model = runtime.build(name, CONFIGS[name], "torch", randomised(name), "float64")
            assert np.array_equal(model(IDS)[0][:, -1], model(changed)[0][:, -1]) is not moves, (name, place)


def test_attention_is_what_it_says():
    """One block against sums over explicit lists of keys, with positions that count from the start: only distances matter."""
    config = replace(CONFIGS["transformer"], depth=1)
    arrays = {key: value for key, value in randomised("transformer").items() if not key.startswith("blocks.1.")}
    model = runtime.build("transformer", config, "torch", arrays, "float64")
    block = {key.removeprefix("blocks.0."): value for key, value in arrays.items()}

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

    def turned(x, place):
        angles = (place + 1000) * config.rope_base ** (-np.arange(3) / 3)
        z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    x = arrays["embedding.weight"][IDS]
    n = norm(x, block["norm_attention.weight"])
    q, k, v = ((n @ block[f"attention.{kind}_proj.weight"].T).reshape(2, 17, 3, 6) for kind in "qkv")
    y = np.zeros_like(q)
    for t in range(17):
        places = range(max(t - 4, 0), t + 1)
        scores = np.stack([(turned(q[:, t], t) * turned(k[:, s], s)).sum(-1) for s in places]) / np.sqrt(6)
        weights = np.exp(scores) / np.exp(scores).sum(0)
        y[:, t] = sum(weights[i][..., None] * v[:, s] for i, s in enumerate(places))
    x = x + y.reshape(2, 17, 18) @ block["attention.o_proj.weight"].T
    n = norm(x, block["norm_ffn.weight"])
    gate = n @ block["w1.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * (n @ block["w3.weight"].T)) @ block["w2.weight"].T
    assert relative(model(IDS)[0], norm(x, arrays["norm.weight"]) @ arrays["embedding.weight"].T) < 1e-13


def test_the_cells_are_what_they_say():
    """One block of the GRU token by token, both biases of both sides included."""
    config = replace(CONFIGS["gru"], depth=1)
    arrays = {key: value for key, value in randomised("gru").items() if not key.startswith("blocks.1.")}
    x = arrays["embedding.weight"][IDS]
    n, h, y = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * arrays["blocks.0.norm_gru.weight"], np.zeros((2, 13)), []
    for t in range(17):
        given = np.split(n[:, t] @ arrays["blocks.0.gru.weight_ih_l0"].T + arrays["blocks.0.gru.bias_ih_l0"], 3, -1)
        kept = np.split(h @ arrays["blocks.0.gru.weight_hh_l0"].T + arrays["blocks.0.gru.bias_hh_l0"], 3, -1)
        r, z = (1 / (1 + np.exp(-given[i] - kept[i])) for i in range(2))
        h = (1 - z) * np.tanh(given[2] + r * kept[2]) + z * h
        y.append(h)
    x = x + np.stack(y, 1)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * arrays["norm.weight"] @ arrays["embedding.weight"].T
    for backend in ("torch", "jax"):
        assert relative(runtime.build("gru", config, backend, arrays, "float64")(IDS)[0], expected) < 1e-13


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_blocks_give_the_same_gradient(name):
    import jax

    from jax_impl.functional import GruModel, TransformerModel

    kind = {"transformer": TransformerModel, "gru": GruModel}[name]
    gradients = []
    with jax.enable_x64(True):
        for remat in (False, True):
            model = kind(CONFIGS[name], remat=remat, dtype="float64")
            loss = jax.jit(jax.grad(lambda variables, model=model: (model.apply(variables, IDS)[0] ** 2).mean()))
            gradients.append(model.arrays(loss(model.variables(randomised(name)))))
    for key, value in gradients[0].items():
        assert value.any() and relative(gradients[1][key], value) < 1e-13, key
