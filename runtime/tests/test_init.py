"""Initial weights: counts, distributions, and one generator per name."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from conf.baselines import GruConfig, TransformerConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, WaveCoreConfig
from runtime.arrays import layout, parameter_count
from runtime.init import init_arrays

SMALL = GroundedMambaConfig(vocab_size=23, dim=12, depth=3, ssm_dim=5, rwkv_heads=2, memory_size=7, retrieval_heads=3, dt_bias=(0.3, -0.2))


def test_groundthink_parameter_count_from_its_arrays():
    config = GroundedMambaConfig.groundthink()
    arrays = init_arrays("grounded_mamba", config, seed=0)
    assert sum(value.size for key, value in arrays.items() if key != "lm_head.weight") == 13_692_184
    assert parameter_count("grounded_mamba", config) == 13_692_184
    assert np.array_equal(arrays["lm_head.weight"], arrays["embedding.weight"])


def test_a_name_has_its_own_generator():
    arrays = init_arrays("grounded_mamba", SMALL, seed=4)
    name = "blocks.2.rwkv.key_proj.weight"
    generator = np.random.default_rng([4, zlib.crc32(name.encode())])
    assert np.array_equal(arrays[name], generator.uniform(-1 / math.sqrt(12), 1 / math.sqrt(12), (12, 12)))
    bare = init_arrays("grounded_mamba", replace(SMALL, memory_size=0, readout_norm=False, depth=2), seed=4)
    assert bare.keys() < arrays.keys() and "blocks.1.rwkv.memory_gate" not in bare
    assert all(np.array_equal(value, arrays[key]) for key, value in bare.items())
    other = init_arrays("grounded_mamba", SMALL, seed=5)
    assert not np.array_equal(arrays["embedding.weight"], other["embedding.weight"])
    assert not np.array_equal(arrays["blocks.0.ssm.A"], arrays["blocks.1.ssm.A"])


def test_distributions():
    config = GroundedMambaConfig(vocab_size=301, dim=90, depth=1, ssm_dim=31, rwkv_heads=3, memory_size=0, dt_bias=(0.3, -0.2), gate_ssm=0.6)
    arrays = init_arrays("grounded_mamba", config, seed=1)
    # A sample of n normal values misses its standard deviation by 1/sqrt(2n), relative; five of those.
    noise = arrays["blocks.0.ssm.A"] + 0.1 * np.eye(31)
    for values, std in (
        (arrays["embedding.weight"], 0.02),
        (arrays["blocks.0.ssm.B_proj.weight"], 0.01),
        (arrays["blocks.0.ssm.C_proj.weight"], 0.01),
        (noise, 0.01),
    ):
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * values.size)
        assert abs(values.mean()) < 5 * std / math.sqrt(values.size)
    for name in ("dt_proj", "value_proj"):
        values = arrays[f"blocks.0.{'ssm' if name == 'dt_proj' else 'rwkv'}.{name}.weight"]
        bound = 1 / math.sqrt(90)
        # The largest of n uniform values is below (1 - 20/n) of the bound with probability exp(-20).
        assert bound * (1 - 20 / values.size) < np.abs(values).max() <= bound
    assert np.array_equal(arrays["blocks.0.ssm.D"], np.ones(90))
    assert np.array_equal(arrays["blocks.0.ssm.dt_proj.bias"], [0.3, -0.2])
    assert np.array_equal(arrays["blocks.0.rwkv.time_first"], np.full((3, 30), 0.5))
    assert not arrays["blocks.0.gate_proj.weight"].any()
    logits = arrays["blocks.0.gate_proj.bias"]
    assert math.isclose(math.exp(logits[0]) / np.exp(logits).sum(), 0.6, rel_tol=1e-15 * 8)  # a few roundings


def test_decay_under_both_parameterisations():
    rate = np.exp(-5 * np.arange(1, 5) / 4)
    sizes = dict(vocab_size=11, dim=12, depth=1, ssm_dim=5, rwkv_heads=4, memory_size=0)
    exp_exp = init_arrays("grounded_mamba", GroundedMambaConfig(**sizes))["blocks.0.rwkv.time_decay"]
    direct = init_arrays("grounded_mamba", GroundedMambaConfig(**sizes, decay="direct"))["blocks.0.rwkv.time_decay"]
    assert exp_exp.shape == direct.shape == (4, 3)
    np.testing.assert_allclose(np.exp(exp_exp), np.repeat(rate[:, None], 3, 1), rtol=1e-15 * 4, err_msg="one exp and its inverse")
    np.testing.assert_allclose(direct, np.repeat(rate[:, None], 3, 1), rtol=1e-15, err_msg="the same exp")
    half_lives = math.log(2) / np.exp(exp_exp[:, 0])  # w = exp(-rate)
    assert round(half_lives[0], 1) == 2.4 and round(half_lives[-1]) == 103  # the figures of the specification


def test_buffers_norms_and_dtypes():
    arrays = init_arrays("grounded_mamba", SMALL, seed=2)
    for key, entry in layout("grounded_mamba", SMALL).items():
        assert arrays[key].shape == entry.shape
        assert arrays[key].dtype == (np.int64 if entry.role == "counter" else np.float64)
        if entry.role in ("buffer", "counter") or key.endswith("memory_gate"):
            assert not arrays[key].any()
        if "norm" in key or ".ln_" in key or key.startswith("ln_"):
            assert np.all(arrays[key] == (1 if key.endswith("weight") else 0))
    assert arrays["blocks.1.rwkv.memory_query.weight"].any()


def assert_uniform(values, bound):
    """Within +-bound, its ends reached: of n values the largest lies below (1 - 20/n) of the bound with probability exp(-20)."""
    assert bound * (1 - 20 / values.size) < np.abs(values).max() <= bound
    assert abs(values.mean()) < 5 * bound / math.sqrt(3 * values.size)  # five standard deviations of the mean


@pytest.mark.parametrize("name, config", [
    ("lam", LamConfig(vocab_size=301, dim=90, heads=3, depth=1, ffn_dim=143, max_positions=77)),
    ("deltanet_lm", DeltaNetConfig(vocab_size=301, dim=90, heads=3, depth=1, ffn_dim=143, conv_kernel=5)),
])
def test_distributions_of_the_delta_models(name, config):
    arrays = init_arrays(name, config, seed=1)
    drawn = {key.removeprefix("blocks.0.").removeprefix("delta."): value for key, value in arrays.items() if key != "lm_head.weight"}
    for key in ("word_embeddings", "position_embeddings", "token_type_embeddings") if name == "lam" else ("embedding",):
        values = drawn.pop(f"{key}.weight")
        # A sample of n normal values misses its standard deviation by 1/sqrt(2n), relative; five of those.
        assert abs(values.std() / 0.02 - 1) < 5 / math.sqrt(2 * values.size)
    for key in [key for key in drawn if "norm" in key]:
        assert np.array_equal(drawn[key], np.full(drawn.pop(key).shape, 0 if key.endswith("bias") else 1)), key
    if name == "lam":
        assert np.array_equal(drawn.pop("fast_decay_bias"), np.full(3, math.log(0.3)))
        assert np.array_equal(drawn.pop("slow_decay_bias"), np.full(3, math.log(0.9)))
        assert np.array_equal(drawn.pop("rule.temp"), np.full(3, math.sqrt(30)))
        bilinear = drawn.pop("rule.W_bilinear")
        assert bilinear.shape == (3, 30, 30)
        assert_uniform(bilinear, 0.1 * math.sqrt(6 / 60))
        for flux, inputs in (("token_flux", 60), ("chunk_flux", 61)):
            assert_uniform(drawn.pop(f"rule.{flux}.hidden.weight"), 0.1 * math.sqrt(6 / (inputs + 15)))
            values = drawn.pop(f"rule.{flux}.out.weight")
            assert values.any() and np.abs(values).max() <= 0.1 * math.sqrt(6 / 16)  # 15 values: too few to reach the ends
    for key in [key for key in drawn if key.endswith("bias")]:
        assert not drawn.pop(key).any(), key
    kernel, left = 4 if name == "lam" else 5, {key.removesuffix(".weight") for key in drawn}
    wide = {"ffn_in", "ffn_out"} if name == "lam" else {"w1", "w2", "w3"}
    per_head = {"fast_decay_proj", "slow_decay_proj", "fast_gate_proj", "slow_gate_proj"} if name == "lam" else set()
    convolutions = {"q_conv1d", "k_conv1d", "v_conv1d"}
    assert left == wide | per_head | convolutions | {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "b_proj"}
    for key in left:
        assert_uniform(drawn[f"{key}.weight"], 1 / math.sqrt(kernel if key in convolutions else 143 if key in ("ffn_out", "w2") else 90))


@pytest.mark.parametrize("name, config", [
    ("transformer", TransformerConfig(vocab_size=301, dim=90, heads=3, depth=1, ffn_dim=143)), ("gru", GruConfig(vocab_size=301, dim=90, depth=1)),
])
def test_distributions_of_the_baselines(name, config):
    drawn = init_arrays(name, config, seed=1)
    assert np.array_equal(drawn.pop("lm_head.weight"), drawn["embedding.weight"])
    table = drawn.pop("embedding.weight")
    assert abs(table.std() / 0.02 - 1) < 5 / math.sqrt(2 * table.size)  # as above
    for key, values in drawn.items():
        if "norm" in key:
            assert np.array_equal(values, np.ones(90)), key
        else:
            assert_uniform(values, 1 / math.sqrt(143 if key.endswith("w2.weight") else 90))


@pytest.mark.parametrize("mamba", [True, False])
def test_distributions_of_wavecore(mamba):
    widths = dict(d_s=130, d_w=150, d_p=90, d_e=110, d_k=70, d_c=50, use_mamba_wave=mamba, mamba_state_dim=3)
    config = WaveCoreConfig(**widths, heads=("action", "value", "world_model")).sized(190, 170, 30)
    arrays = init_arrays("wavecore", config, seed=1)
    for key in [key for key in arrays if key.endswith(("bias", ".D", "A_diag"))]:
        assert not arrays.pop(key).any(), key
    for key in [key for key in arrays if key.endswith("norm.weight")]:
        assert np.array_equal(arrays[key], np.ones(arrays.pop(key).shape)), key
    assert_uniform(arrays.pop("core.U_p"), math.sqrt(6 / 220))
    assert_uniform(arrays.pop("core.U_w"), math.sqrt(6 / 280))
    small = ("ssm.a_raw", "ssm.B_base", "ssm.C_base") if mamba else ("A_U", "A_V")
    for key in [f"core.wave.{name}" for name in small]:
        values, std = arrays.pop(key), 0.02 if mamba else 0.01
        # A sample of n normal values misses its standard deviation by 1/sqrt(2n), relative, and its mean by 1/sqrt(n); five of those.
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * values.size) and abs(values.mean()) < 5 * std / math.sqrt(values.size)
    for key, values in arrays.items():
        assert key.endswith(".weight") and values.ndim == 2
        cut = 2 / (0.87962566103423978 * math.sqrt(values.shape[1]))  # two standard deviations of the normal before it is cut
        assert np.abs(values).max() <= cut
        # The cut normal has a kurtosis of 2.4, below the normal's 3: n values miss its standard deviation by less than 1/sqrt(2n).
        assert abs(values.std() * math.sqrt(values.shape[1]) - 1) < 5 / math.sqrt(2 * values.size), key
    large = arrays["encoder.join_in.weight"]
    assert np.abs(large).max() > 0.99 * 2 / (0.87962566103423978 * math.sqrt(large.shape[1]))  # 42,240 values, of which one in 430 is above


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_impossible_seed(seed):
    with pytest.raises(ValueError, match="seed must be a non-negative integer"):
        init_arrays("grounded_mamba", SMALL, seed)


def test_unknown_model_and_foreign_config():
    with pytest.raises(ValueError, match=r"model must be one of 'grounded_mamba', 'deltanet_lm', .*'wavecore', found 'mamba'"):
        init_arrays("mamba", SMALL)
    with pytest.raises(TypeError, match="must be a GroundedMambaConfig, found dict"):
        init_arrays("grounded_mamba", {"dim": 12})
