"""Public checkpoints: names, sizes off the shapes, and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from conf.models import GroundedMambaConfig, LamConfig, WaveCoreConfig
from runtime import public, read_arrays
from runtime.arrays import layout
from runtime.init import init_arrays

NAME = "grounded_mamba"
GOLDEN = Path(__file__).resolve().parents[2] / "parity_tests" / "golden"


def golden_weights(file):
    return {key.removeprefix("weights/"): value for key, value in read_arrays(GOLDEN / file).items() if key.startswith("weights/")}


@pytest.fixture(scope="module")
def weights():
    return golden_weights("groundthink_small.npz")


@pytest.fixture(scope="module")
def lam_weights():
    return golden_weights("lam_small.npz")


def test_groundthink_state_dict(weights):
    config = public.config(NAME, weights)
    assert config == GroundedMambaConfig.groundthink(vocab_size=61, dim=32, depth=2, ssm_dim=8, rwkv_heads=4)
    arrays = public.rename(NAME, weights)
    assert arrays.keys() == init_arrays(NAME, config).keys()
    assert all(arrays[key].dtype == np.float64 and np.array_equal(arrays[key], value) for key, value in weights.items())
    back = public.export(NAME, arrays)
    assert back.keys() == weights.keys() and all(np.array_equal(back[key], value) for key, value in weights.items())


def test_sizes_that_could_be_confused():
    config = GroundedMambaConfig.groundthink(vocab_size=19, dim=14, depth=3, ssm_dim=5, rwkv_heads=7)
    assert public.config(NAME, init_arrays(NAME, config)) == config


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes(weights, prefix):
    wrapped = {prefix + key: value for key, value in weights.items()}
    assert public.config(NAME, wrapped).vocab_size == 61
    arrays = public.rename(NAME, wrapped)
    assert all(np.array_equal(arrays[key], value) for key, value in weights.items())
    wrapped["ln_out.weight"] = weights["ln_out.weight"]
    with pytest.raises(ValueError, match=r"two arrays are named ln_out\.weight"):
        public.rename(NAME, wrapped)


def test_without_the_tied_head(weights):
    headless = {key: value.astype(np.float32) for key, value in weights.items() if key != "lm_head.weight"}
    arrays = public.rename(NAME, headless)
    assert np.array_equal(arrays["lm_head.weight"], headless["embedding.weight"]) and arrays["lm_head.weight"].dtype == np.float32
    with pytest.raises(ValueError, match="tied"):
        public.rename(NAME, {**headless, "lm_head.weight": headless["embedding.weight"] + 1})


def test_what_is_no_groundthink_state_dict(weights):
    with pytest.raises(ValueError, match=r"no GroundThink state dict: .*blocks\.0\.ssm\.A \(missing\)"):
        public.config(NAME, {key: value for key, value in weights.items() if key != "blocks.0.ssm.A"})
    with pytest.raises(ValueError, match=r"embedding\.weight \(shape \(61,\)\)"):
        public.config(NAME, {**weights, "embedding.weight": np.zeros(61)})
    with pytest.raises(ValueError, match=r"time_decay is \(3, 8\), which does not multiply to the width 32"):
        public.config(NAME, {**weights, "blocks.0.rwkv.time_decay": np.zeros((3, 8))})
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.ssm\.D; unused: head\.bias"):
        public.rename(NAME, {"head.bias": np.zeros(3), **{key: value for key, value in weights.items() if key != "blocks.1.ssm.D"}})
    with pytest.raises(ValueError, match="model must be one of"):
        public.rename("mamba", weights)


def test_export_refuses_what_the_public_code_cannot_hold():
    config = GroundedMambaConfig.groundthink(vocab_size=19, dim=14, depth=1, ssm_dim=5, rwkv_heads=7, readout_norm=True)
    with pytest.raises(ValueError, match=r"unused: blocks\.0\.rwkv\.readout_norm\.weight, blocks\.0\.rwkv\.readout_norm\.bias"):
        public.export(NAME, init_arrays(NAME, config))


def test_lam_names_and_sizes(lam_weights):
    config = public.config("lam", lam_weights)
    assert config == LamConfig(vocab_size=71, dim=32, heads=4, depth=2, ffn_dim=64, max_positions=64)
    assert (config.gelu_repeats, config.transform, config.chunk_size) == (2, "lam", 64)
    arrays = public.rename("lam", lam_weights)
    assert arrays.keys() == init_arrays("lam", config).keys() and public.config("lam", arrays) == config
    for ours, theirs in (
        ("word_embeddings.weight", "teacher_model.embeddings.word_embeddings.weight"),
        ("token_type_embeddings.weight", "teacher_model.embeddings.token_type_embeddings.weight"),
        ("embedding_norm.bias", "teacher_model.embeddings.LayerNorm.bias"),
        ("blocks.1.norm_delta.weight", "teacher_model.encoder.layer.1.attention.output.LayerNorm.weight"),
        ("blocks.1.ffn_in.bias", "teacher_model.encoder.layer.1.intermediate.dense.bias"),
        ("blocks.0.ffn_out.weight", "teacher_model.encoder.layer.0.output.dense.weight"),
        ("blocks.0.norm_ffn.weight", "teacher_model.encoder.layer.0.output.LayerNorm.weight"),
        ("blocks.1.delta.q_conv1d.weight", "deltanet_layers.1.q_conv1d.conv.weight"),
        ("blocks.1.delta.rule.W_bilinear", "deltanet_layers.1.resonance_flux.W_bilinear"),
        ("blocks.0.delta.rule.token_flux.hidden.weight", "deltanet_layers.0.resonance_flux.token_flux_proj.0.weight"),
        ("blocks.0.delta.rule.chunk_flux.out.bias", "deltanet_layers.0.resonance_flux.flux_net.2.bias"),
        ("blocks.1.delta.slow_decay_proj.bias", "deltanet_layers.1.slow_decay_proj.bias"),
        ("blocks.0.delta.fast_decay_bias", "deltanet_layers.0.fast_decay_bias"),
        ("blocks.1.delta.o_norm.gate", "deltanet_layers.1.o_norm.gate"),
    ):
        assert arrays[ours].dtype == np.float64 and np.array_equal(arrays[ours], lam_weights[theirs])
    back = public.export("lam", arrays)
    assert back.keys() == lam_weights.keys() and all(np.array_equal(back[key], value) for key, value in lam_weights.items())


def test_lam_sizes_that_could_be_confused():
    config = LamConfig(vocab_size=19, dim=14, heads=7, depth=3, ffn_dim=5, max_positions=11)
    arrays = init_arrays("lam", config, seed=1)
    assert public.config("lam", arrays) == public.config("lam", public.export("lam", arrays)) == config
    single = {key: value.astype(np.float32) for key, value in public.export("lam", arrays).items()}
    renamed = public.rename("lam", {f"module.{key}": value for key, value in single.items()})
    assert all(value.dtype == np.float32 and np.array_equal(value, arrays[key].astype(np.float32)) for key, value in renamed.items())


def test_the_teachers_attention_and_pooler_are_dropped(lam_weights):
    layer = "teacher_model.encoder.layer.1.attention"
    unused = {"teacher_model.embeddings.position_ids": np.arange(64)[None]}
    dense = ["teacher_model.pooler.dense"] + [f"{layer}.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    unused |= {f"{name}.{leaf}": np.zeros(32) for name in dense for leaf in ("weight", "bias")}
    arrays = public.rename("lam", lam_weights | unused)
    assert arrays.keys() == public.rename("lam", lam_weights).keys()


def test_what_is_no_public_lam(lam_weights):
    without = {key: value for key, value in lam_weights.items() if "W_bilinear" not in key}
    with pytest.raises(ValueError, match=r"no LAM checkpoint: .*found deltanet_layers\.0\.resonance_flux\.W_bilinear \(missing\)"):
        public.config("lam", without)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight \(shape \(71,\)\)"):
        public.config("lam", {**lam_weights, "teacher_model.embeddings.word_embeddings.weight": np.zeros(71)})
    with pytest.raises(ValueError, match=r"W_bilinear is \(3, 8, 8\), which does not multiply to the width 32"):
        public.config("lam", {**lam_weights, "deltanet_layers.0.resonance_flux.W_bilinear": np.zeros((3, 8, 8))})
    held = {key: value for key, value in lam_weights.items() if "k_conv1d.conv.bias" not in key}
    more = {"lm_head.weight": np.zeros(3), "teacher_model.encoder.layer.0.attention.self.query.scale": np.zeros(3)}
    with pytest.raises(ValueError, match="do not fit the public LAM") as caught:
        public.rename("lam", held | more)
    assert "missing: deltanet_layers.0.k_conv1d.conv.bias, deltanet_layers.1.k_conv1d.conv.bias; unmapped: " + ", ".join(more) in str(caught.value)
    with pytest.raises(ValueError, match=r"b_proj\.weight is \(5, 32\), expected \(4, 32\)"):
        public.rename("lam", {**lam_weights, "deltanet_layers.1.b_proj.weight": np.zeros((5, 32))})


def test_export_of_a_lam_that_the_public_code_cannot_hold(lam_weights):
    arrays = public.rename("lam", lam_weights) | {"blocks.0.delta.extra.weight": np.zeros(3)}
    with pytest.raises(ValueError, match=r"unused: blocks\.0\.delta\.extra\.weight"):
        public.export("lam", arrays)


@pytest.fixture(scope="module")
def core_weights():
    return golden_weights("wavecore_small.npz")


def test_wavecore_names_and_sizes(core_weights):
    config = public.config("wavecore", core_weights)
    expected = WaveCoreConfig(
        d_s=24, d_w=16, d_p=12, d_e=24, d_k=8, d_c=20, cms_sizes=(5, 6, 7), cms_dims=(10, 12, 14), cms_decays=(0.1, 0.05, 0.01), cms_write="slot0")
    assert config == expected.sized(obs_dim=11, action_dim=4, output_dim=6)
    arrays = public.rename("wavecore", core_weights)
    assert list(arrays) == list(layout("wavecore", config)) and public.config("wavecore", arrays) == config
    for ours, theirs, turned in (
        ("encoder.obs_out.weight", "encoder/Dense_1/kernel", True), ("encoder.action.weight", "encoder/Dense_2/kernel", True),
        ("encoder.reward.bias", "encoder/Dense_3/bias", False), ("encoder.join_norm.weight", "encoder/LayerNorm_1/scale", False),
        ("encoder.norm.bias", "encoder/LayerNorm_2/bias", False), ("cms_read.query_norm.weight", "cms_read/query_net/LayerNorm_0/scale", False),
        ("cms_read.level_proj.1.weight", "cms_read/level_proj_1/kernel", True), ("cms_read.mixing.weight", "cms_read/mixing_net/kernel", True),
        ("core.U_p", "hope_core/U_p", False), ("core.U_w", "hope_core/U_w", False), ("core.z_proj.weight", "hope_core/z_projection/kernel", True),
        ("core.particle_out.bias", "hope_core/particle/Dense_1/bias", False), ("core.gate.weight", "hope_core/gate_net/kernel", True),
        ("core.wave.gate_proj.weight", "hope_core/mamba_wave/gate_proj/kernel", True), ("core.wave.ssm.D", "hope_core/mamba_wave/ssm/D", False),
        ("core.wave.ssm.c_proj.weight", "hope_core/mamba_wave/ssm/c_proj/kernel", True),
        ("cms_write.key.2.bias", "cms_write/write_key_2/bias", False),
        ("cms_write.gate.0.bias", "cms_write/write_gate_0/bias", False), ("decoder.action.weight", "decoder/Dense_2/kernel", True),
    ):
        assert arrays[ours].dtype == np.float64 and np.array_equal(arrays[ours].T if turned else arrays[ours], core_weights[theirs]), ours
    assert all(value.flags.c_contiguous for value in arrays.values())
    back = public.export("wavecore", arrays)
    assert back.keys() == core_weights.keys() and all(np.array_equal(back[key], value) for key, value in core_weights.items())
    assert all(value.flags.c_contiguous for value in back.values())


def test_wavecore_computes_what_the_public_code_computes(core_weights):
    pytest.importorskip("torch")
    golden = read_arrays(GOLDEN / "wavecore_small.npz")
    config = replace(public.config("wavecore", core_weights), cms_sizes=(5, 7, 9))
    model = runtime.build("wavecore", config, "torch", public.rename("wavecore", core_weights), "float64")
    memory = (tuple(golden[f"inputs/cms_{kind}_{level}"] for level in range(3)) for kind in ("memory", "key"))
    state = model.state(*(golden[f"inputs/{name}"] for name in "swp"), *memory)
    y, state, info = model.rollout(state, *(golden[f"inputs/{name}"] for name in ("x_obs", "a_prev", "r_t")))
    found = dict(info, y=y) | {f"cms_memory_{level}": value for level, value in enumerate(model.memories(state)[0])}
    for name in ("y", "fast_state", "wave_state", "particle_state", "context", *(f"cms_memory_{level}" for level in range(3))):
        expected = golden[f"outputs/{name}"]
        # The bound that the project promises against the public code in float64.
        assert np.linalg.norm(found[name] - expected) < 1e-10 * np.linalg.norm(expected), name


@pytest.mark.parametrize("changes", [
    dict(use_mamba_wave=False, num_levels=1, cms_sizes=(3,), cms_dims=(6,), cms_decays=(0.1,)),
    dict(num_levels=5, cms_sizes=(1, 2, 3, 4, 5), cms_dims=(2, 4, 6, 8, 10), cms_decays=(0.1, 0.05, 0.02, 0.01, 0.01), heads=("world_model",)),
    dict(num_levels=2, cms_sizes=(3, 5), cms_dims=(6, 10), cms_decays=(0.1, 0.05), heads=("action", "value", "world_model"), mamba_state_dim=7),
])
def test_wavecore_sizes_that_could_be_confused(changes):
    config = WaveCoreConfig(**dict(d_s=13, d_w=21, d_p=9, d_e=11, d_k=5, d_c=15, mamba_state_dim=1, cms_write="slot0") | changes)
    config = config.sized(19, 17, 22 if "action" in config.heads else 17)
    arrays = init_arrays("wavecore", config, seed=1)
    exported = public.export("wavecore", arrays)
    assert public.config("wavecore", arrays) == public.config("wavecore", exported) == config
    assert ("decoder/value/kernel" in exported) is ("value" in config.heads) and ("hope_core/wave/A_U" in exported) is not config.use_mamba_wave
    renamed = public.rename("wavecore", {f"params/{key}": value.astype(np.float32) for key, value in exported.items()})
    assert list(renamed) == list(arrays)
    assert all(value.dtype == np.float32 and np.array_equal(value, arrays[key].astype(np.float32)) for key, value in renamed.items())


def test_what_is_no_public_wavecore(core_weights):
    without = {key: value for key, value in core_weights.items() if "level_proj" not in key}
    with pytest.raises(ValueError, match=r"no WaveCore checkpoint: .*found cms_read/level_proj_0/kernel \(missing\)$"):
        public.config("wavecore", without)
    with pytest.raises(ValueError, match=r"found hope_core/U_w \(shape \(16,\)\)$"):
        public.config("wavecore", core_weights | {"hope_core/U_w": np.zeros(16)})
    held = {key: value for key, value in core_weights.items() if "gate_net" not in key} | {"decoder/Dense_3/bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"missing: hope_core/gate_net/kernel, hope_core/gate_net/bias; unmapped: decoder/Dense_3/bias$"):
        public.rename("wavecore", held)
    with pytest.raises(ValueError, match=r"wrong shape: core\.z_proj\.weight is \(12, 23\), expected \(12, 24\)$"):
        public.rename("wavecore", core_weights | {"hope_core/z_projection/kernel": np.zeros((23, 12))})
    with pytest.raises(ValueError, match=r"unused: core\.wave\.A_diag$"):
        public.export("wavecore", public.rename("wavecore", core_weights) | {"core.wave.A_diag": np.zeros(16)})


def test_a_model_that_nobody_published():
    with pytest.raises(ValueError, match="no public checkpoint of 'deltanet_lm', only of 'grounded_mamba', 'lam', 'wavecore'"):
        public.rename("deltanet_lm", {})
