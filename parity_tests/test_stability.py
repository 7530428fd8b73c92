"""The Lyapunov exponent of one WaveCore is the same in torch and in JAX."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from conf.models import WaveCoreConfig  # noqa: E402
from jax_impl import stability as in_jax  # noqa: E402
from jax_impl.functional import WaveCoreModel  # noqa: E402
from parity_tests.harness.adapters.nnx_trace import quick_options  # noqa: E402
from torch_impl import stability as in_torch  # noqa: E402
from torch_impl.wavecore import WaveCore  # noqa: E402

CONFIG = WaveCoreConfig(
    d_s=14, d_w=10, d_p=7, d_e=13, d_k=5, d_c=11, num_levels=2, cms_sizes=(6, 9), cms_dims=(15, 17), cms_decays=(0.1, 0.05))


def test_the_exponent_and_the_saturated_share_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (in_torch, in_jax):
        monkeypatch.setattr(module, "LEAST_STEPS", 300)
    monkeypatch.setattr(in_jax, "_along", jax.jit(in_jax._along.__wrapped__, static_argnums=0, compiler_options=quick_options()))
    torch.manual_seed(0)
    module, rng = WaveCore(CONFIG, 19, 12, 18).double(), np.random.default_rng(0)
    inputs = [rng.normal(size=(330, 3, width)) for width in (19, 12, 1)]
    tensors = tuple(map(torch.from_numpy, inputs))
    expected = in_torch.lyapunov_exponent(module, module.init_state(3), tensors, burn_in=30).numpy()
    with torch.no_grad():
        _, _, info = module.rollout(module.init_state(3), *(x[:100] for x in tensors))
    with jax.enable_x64(True):
        model = WaveCoreModel(CONFIG, 19, 12, 18, dtype="float64")
        variables = model.variables({name: value.numpy() for name, value in module.state_dict().items()})
        found = np.asarray(in_jax.lyapunov_exponent(model, variables, model.init_state(3), tuple(inputs), burn_in=30))
    assert found.shape == (3,) and np.isfinite(found).all() and len(np.unique(found)) == 3
    # a mean of 300 logarithms along a rollout that does not amplify rounding: the exponents are not above 0.01
    assert found.max() < 0.01 and np.abs(found - expected).max() < 1e-9
    shares = in_torch.saturated_fraction(module, info)
    assert shares == in_jax.saturated_fraction(model, {name: info[name].numpy() for name in ("fast_state", "wave_state", "particle_state")})
    assert 0 < shares["s"] < 1
