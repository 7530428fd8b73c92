"""Public checkpoints: names, sizes off the shapes, and back."""

from pathlib import Path

import numpy as np
import pytest

from conf.models import GroundedMambaConfig
from runtime import public, read_arrays
from runtime.init import init_arrays

NAME = "grounded_mamba"
GOLDEN = Path(__file__).resolve().parents[2] / "parity_tests" / "golden" / "groundthink_small.npz"


@pytest.fixture(scope="module")
def weights():
    return {key.removeprefix("weights/"): value for key, value in read_arrays(GOLDEN).items() if key.startswith("weights/")}


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
