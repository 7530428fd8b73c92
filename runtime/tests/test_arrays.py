"""The check that holds a dict of arrays to a configuration."""

import numpy as np
import pytest

from conf.models import GroundedMambaConfig
from runtime.arrays import check
from runtime.init import init_arrays

CONFIG = GroundedMambaConfig(vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, memory_size=7, retrieval_heads=3)


@pytest.fixture
def arrays():
    return init_arrays("grounded_mamba", CONFIG, seed=3)


def test_all_that_is_wrong_in_one_error(arrays):
    del arrays["blocks.1.ssm.A"]
    arrays["blocks.0.ssm.E"] = np.zeros(3)
    arrays["ln_out.weight"] = np.zeros(13)
    arrays["blocks.0.rwkv.writes"] = np.zeros(())
    with pytest.raises(ValueError, match="grounded_mamba") as caught:
        check("grounded_mamba", CONFIG, arrays)
    message = str(caught.value)
    assert "\n" not in message
    assert "missing: blocks.1.ssm.A;" in message and "unused: blocks.0.ssm.E;" in message
    assert "ln_out.weight is (13,), expected (12,)" in message and "blocks.0.rwkv.writes is float, expected int" in message


def test_a_tied_array_may_be_left_out_but_not_differ(arrays):
    full = check("grounded_mamba", CONFIG, arrays)
    head = arrays.pop("lm_head.weight")
    without = check("grounded_mamba", CONFIG, arrays)
    assert list(without) == list(full) and np.array_equal(without["lm_head.weight"], arrays["embedding.weight"])
    head[3, 4] = np.nextafter(head[3, 4], 1.0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to embedding\.weight"):
        check("grounded_mamba", CONFIG, {**arrays, "lm_head.weight": head})


def test_the_result_is_contiguous_cast_and_nobody_elses(arrays):
    arrays["embedding.weight"] = np.asfortranarray(arrays["embedding.weight"])
    arrays["blocks.0.rwkv.memory_count"] = arrays["blocks.0.rwkv.memory_count"].astype(np.int32)
    checked = check("grounded_mamba", CONFIG, arrays, "float32")
    for key, value in checked.items():
        assert value.flags.c_contiguous and not np.shares_memory(value, arrays[key])
        assert value.dtype == (np.int64 if arrays[key].dtype.kind == "i" else np.float32)
    assert np.array_equal(checked["embedding.weight"], arrays["embedding.weight"].astype(np.float32))


@pytest.mark.parametrize("values, word", [(np.zeros((23, 12), dtype=complex), "complex128"), (np.zeros((23, 12), dtype=int), "int")])
def test_wrong_dtype(arrays, values, word):
    with pytest.raises(ValueError, match=rf"embedding\.weight is {word}, expected float"):
        check("grounded_mamba", CONFIG, {**arrays, "embedding.weight": values})


def test_unknown_dtype(arrays):
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', found 'float16'"):
        check("grounded_mamba", CONFIG, arrays, "float16")
