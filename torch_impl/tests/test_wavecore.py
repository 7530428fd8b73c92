"""WaveCore in torch: its steps are its rollout, its lazy memory the full one, what it refuses, how it starts, and that it learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conf.models import TIER_SIZES, WaveCoreConfig
from torch_impl import wavecore
from torch_impl.ops.wave import saturate
from torch_impl.state import CoreState
from torch_impl.wavecore import WaveCore

CONFIG = WaveCoreConfig(
    d_s=14, d_w=10, d_p=7, d_e=13, d_k=5, d_c=11, num_levels=2, cms_sizes=(6, 9), cms_dims=(15, 17), cms_decays=(0.1, 0.05), mamba_state_dim=2,
    heads=("action", "value", "world_model"), salience_threshold=0.48)
OBS, ACTION, OUTPUT = 19, 12, 18


def make(**fields: Any) -> WaveCore:
    """A core as it starts, but for the write gates, which units of s at their limit would keep always open or closed."""
    torch.manual_seed(0)
    model = WaveCore(dataclasses.replace(CONFIG, **fields), OBS, ACTION, OUTPUT).double()
    with torch.no_grad():
        for gate in model.cms_write.gate:
            gate.weight[:, : CONFIG.d_s] *= 0.02
    return model


def inputs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x, a, r = (torch.from_numpy(rng.normal(size=(*shape, width))) for width in (OBS, ACTION, 1))
    return x, a, r


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree
    return [leaf for item in items for leaf in leaves(item)]


def assert_close(found: Any, expected: Any, bound: float) -> None:
    """Every leaf to `bound`, relative to its largest entry or to 1."""
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound * max(1.0, float(other.detach().abs().max())))


@pytest.mark.parametrize("batch", [None, 3])
def test_rollout_of_200_steps_is_200_steps(batch: int | None) -> None:
    model = make()
    xs = inputs(200, *(() if batch is None else (batch,)))
    with torch.no_grad():
        y, last, info = model.rollout(model.init_state(batch), *xs)
        state, seen = model.init_state(batch), []
        for now in zip(*xs, strict=True):
            out, state, about = model.step(state, *now)
            seen.append((out, about))
    assert_close(state, last, 1e-11)
    assert_close(torch.stack([out for out, _ in seen]), y, 1e-11)
    for name, value in info.items():
        steps = [about[name] for _, about in seen]
        stacked = tuple(map(torch.stack, zip(*steps, strict=True))) if isinstance(value, tuple) else torch.stack(steps)
        assert_close(stacked, value, 1e-11)
    assert all((norms > 0).all() for norms in last.norms)  # full, so that rows are chosen by norm


@pytest.mark.parametrize("rule", ["least_salient", "slot0"])
def test_the_lazy_memory_is_the_plain_one_in_the_closed_loop(rule: str) -> None:
    """100 steps, saved as arrays and loaded after 50; the level with decay 0.1 is folded once."""
    model = make(cms_write=rule)
    state = model.init_state(3)
    plain, folded = tuple(state[:5]), False
    with torch.no_grad():
        for step, now in enumerate(zip(*inputs(100, 3), strict=True)):
            y, state, info = model.step(state, *now)
            expected, full = model(*now, *plain)
            plain = tuple(full[name] for name in ("fast_state", "wave_state", "particle_state", "cms_memories", "cms_keys"))
            assert_close((y, *state[:3], *model.memories(state)), (expected, *plain), 1e-11)
            assert_close({name: full[name] for name in info}, info, 1e-11)
            folded |= bool(state.scales[0] == 1)
            if step == 50:
                saved = [np.array(leaf.numpy()) for leaf in leaves(tuple(state))]
                loaded = iter(map(torch.from_numpy, saved))
                state = CoreState(*(
                    tuple(next(loaded) for _ in part) if isinstance(part, tuple) else next(loaded) for part in state))
    assert folded


@pytest.mark.parametrize("kind", ["step", "rollout", "call"])
def test_an_observation_that_is_not_finite_is_refused(kind: str) -> None:
    model, state = make(), make().init_state(3)
    x, a, r = inputs(4, 3)
    x[2, 1, 5] = torch.nan
    run = {"step": lambda: model.step(state, x[2], a[2], r[2]), "rollout": lambda: model.rollout(state, x, a, r),
           "call": lambda: model(x[2], a[2], r[2], *state[:5])}[kind]
    with pytest.raises(ValueError, match=r"^x_obs \((4, )?3, 19\) must be finite, found NaN or infinity$"):
        run()


def test_an_observation_that_is_not_finite_never_reaches_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values cannot be looked at, its row of the batch keeps the decayed memory and the other rows go on as if it were not there."""
    model = make(salience_threshold=0.0)
    with torch.no_grad():
        _, state, _ = model.rollout(model.init_state(3), *inputs(5, 3))
        x, a, r = inputs(3, seed=1)
        _, clean, _ = model.step(state, x, a, r)
        x[1, 4] = torch.nan
        monkeypatch.setattr(wavecore, "check_core", lambda *_, **__: None)
        _, lazy, _ = model.step(state, x, a, r)
        _, plain = model(x, a, r, *state[:3], *model.memories(state))
    before, after, expected = (model.memories(held) for held in (state, lazy, clean))
    assert lazy.s[1].isnan().all() and lazy.s[[0, 2]].isfinite().all()
    for found in (after, (plain["cms_memories"], plain["cms_keys"])):
        for kind, old, new in zip(found, before, expected, strict=True):
            for level, decay in enumerate(CONFIG.cms_decays):
                torch.testing.assert_close(kind[level][1], (1 - decay) * old[level][1], rtol=1e-14, atol=0)
                torch.testing.assert_close(kind[level][[0, 2]], new[level][[0, 2]], rtol=1e-12, atol=1e-14)


def test_clip_and_relu_have_their_gradients_at_the_limit() -> None:
    x = torch.tensor([-10.5, -10.0, 3.0, 10.0, np.nextafter(10.0, 11)], dtype=torch.float64, requires_grad=True)
    y = saturate(x, 10.0)
    y.sum().backward()
    assert y.tolist() == [-10, -10, 3, 10, 10] and x.grad.tolist() == [0, 1, 1, 1, 0]
    assert saturate(x, 0.0) is x
    zero = torch.zeros(1, requires_grad=True)
    torch.relu(zero).backward()
    assert zero.grad.item() == 0


def test_states_stay_at_the_limit_and_the_fast_state_takes_the_unclipped_ones() -> None:
    """With every other weight zero: p~ = p + bias, s~ = s + U_p p~ / 2."""
    for limit, particle in ((10.0, 10.0), (0.0, 12.0)):
        model = make(state_saturation_limit=limit)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.core.particle_out.bias.fill_(3.0)
            model.core.U_p.fill_(0.01)
            state = model.init_state(3)
            _, state, _ = model.step(state._replace(p=state.p + 9.0), *inputs(3))
        assert (state.p == particle).all()
        torch.testing.assert_close(state.s, torch.full_like(state.s, 0.5 * 7 * 0.01 * 12.0), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("tier", "count"), [("v2.0", 954_697), ("v3.0", 3_408_521), ("v4.0", 12_813_577)])
def test_tiers_have_their_parameters(tier: str, count: int) -> None:
    with torch.device("meta"):
        model = WaveCore(WaveCoreConfig.tier(tier), **TIER_SIZES[tier])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_presets_build() -> None:
    for preset in (WaveCoreConfig.development, WaveCoreConfig.pi5_optimized, WaveCoreConfig.cloud_optimized):
        with torch.device("meta"):
            model = WaveCore(preset(), 768, 64, 64)
            assert len(model.init_state(3).memories) == preset().num_levels
        if preset is WaveCoreConfig.pi5_optimized:
            assert sum(parameter.numel() for parameter in model.parameters()) == 954_697


def test_heads_that_are_off_have_no_parameters_and_no_output() -> None:
    model = make(heads=("value",))
    y, _, info = model.step(model.init_state(3), *inputs(3))
    assert y is None and info["value"].shape == (3, 1) and "next_obs" not in info
    assert not [name for name, _ in model.named_parameters() if name.startswith(("decoder.action", "decoder.world_model"))]
    y, _, info = model.rollout(model.init_state(), *inputs(4))
    assert y is None and info["value"].shape == (4, 1)
    continuous, discrete = (make(output_type=kind).step(make().init_state(3), *inputs(3))[0] for kind in ("continuous", "discrete"))
    torch.testing.assert_close(torch.tanh(discrete), continuous, rtol=1e-14, atol=0)
    x, a, r = inputs(3)
    _, _, info = make().step(make().init_state(3), x, a, r)
    assert info["next_obs"].shape == x.shape and info["query"].shape == (3, 5) and [w.shape for w in info["attention_weights"]] == [(3, 6), (3, 9)]


def changed(name: str, value: Any, level: int | None = None) -> dict[str, Any]:
    """Arguments of the eight-argument call with one of them replaced, or one level of it."""
    model = make()
    names = ("x_obs", "a_prev", "r_t", "s_prev", "w_prev", "p_prev", "cms_memories", "cms_keys")
    given = dict(zip(names, (*inputs(3), *model.init_state(3)[:5]), strict=True))
    given[name] = value if level is None else tuple(value if i == level else leaf for i, leaf in enumerate(given[name]))
    return given


DOUBLE = torch.float64


@pytest.mark.parametrize(("replaced", "message"), [
    (("x_obs", torch.zeros(3, 20, dtype=DOUBLE)), "x_obs must have shape (batch, 19) or (19,), none of them 0, found (3, 20)"),
    (("x_obs", torch.zeros(0, 19, dtype=DOUBLE)), "x_obs must have shape (batch, 19) or (19,), none of them 0, found (0, 19)"),
    (("a_prev", torch.zeros(3, 11, dtype=DOUBLE)), "a_prev must have shape (3, 12) with x_obs (3, 19), found (3, 11)"),
    (("r_t", torch.zeros(3, dtype=DOUBLE)), "r_t must have shape (3, 1) with x_obs (3, 19), found (3,)"),
    (("s_prev", torch.zeros(4, 14, dtype=DOUBLE)), "s_prev must have shape (3, 14) with x_obs (3, 19), found (4, 14)"),
    (("w_prev", torch.zeros(3, 10)), "w_prev must have dtype torch.float64, as the weights have, found torch.float32"),
    (("p_prev", torch.full((3, 7), torch.inf, dtype=DOUBLE)), "p_prev (3, 7) must be finite, found NaN or infinity"),
    (("cms_memories", (torch.zeros(3, 6, 15, dtype=DOUBLE),)), "cms_memories must be a tuple of 2 levels, found 1 levels"),
    (("cms_keys", torch.zeros(3, 6, 5, dtype=DOUBLE)), "cms_keys must be a tuple of 2 levels, found 3 levels"),
    (("cms_memories", torch.zeros(3, 9, 15, dtype=DOUBLE), 1), "cms_memories[1] must have shape (3, 9, 17) with x_obs (3, 19), found (3, 9, 15)"),
    (("cms_keys", torch.full((3, 6, 5), torch.nan, dtype=DOUBLE), 0), "cms_keys[0] (3, 6, 5) must be finite, found NaN or infinity"),
])
def test_wrong_arguments_are_one_clear_line(replaced: tuple[Any, ...], message: str) -> None:
    given = changed(*replaced)
    with pytest.raises(ValueError) as caught:
        make()(**given)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_wrong_states_and_lengths_are_one_clear_line() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"^state\.s must have shape \(5, 14\) with x_obs \(5, 19\), found \(3, 14\)$"):
        model.step(model.init_state(3), *inputs(5))
    with pytest.raises(ValueError, match=r"^state\.scales\[1\] must have shape \(\) with x_obs \(3, 19\), found \(3,\)$"):
        state = model.init_state(3)
        model.step(state._replace(scales=(state.scales[0], torch.ones(3, dtype=DOUBLE))), *inputs(3))
    x, a, r = inputs(4, 3)
    for wrong in ((x, a[:3], r), (x[:0], a[:0], r[:0])):
        with pytest.raises(ValueError, match=r"^x_obs, a_prev and r_t must have the same number of steps, at least 1, along .*, found \["):
            model.rollout(model.init_state(3), *wrong)
    with pytest.raises(ValueError, match="obs_dim must be"):
        WaveCore(CONFIG, 0, ACTION, OUTPUT)


def test_initial_values() -> None:
    """Standard deviations to 10 %: the smallest of these has 1,080 values, of which that is 4 standard errors and more."""
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG, d_s=70, d_w=60, d_p=36, d_e=52, d_c=44, d_k=40)
    named = {name: p.detach() for use in (True, False) for name, p in WaveCore(
        dataclasses.replace(config, use_mamba_wave=use), OBS, ACTION, OUTPUT).named_parameters()}
    model = WaveCore(config, OBS, ACTION, OUTPUT)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-6
        elif isinstance(module, nn.Linear):
            assert module.bias is None or (module.bias == 0).all()
            std = module.in_features**-0.5
            assert module.weight.abs().max() <= 2 * std / 0.87962566103423978 * (1 + 1e-6), name
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
    for width, name in ((36, "core.U_p"), (60, "core.U_w")):
        bound = math.sqrt(6 / (70 + width))
        assert 0.98 * bound < named[name].abs().max() <= bound and named[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (named["core.wave.A_diag"] == 0).all() and (named["core.wave.ssm.D"] == 0).all()
    small = torch.cat([named[f"core.wave.ssm.{name}"].flatten() for name in ("a_raw", "B_base", "C_base")])  # 180 values
    assert small.std().item() == pytest.approx(0.02, rel=0.25) and small.abs().max() > 0.04  # no cut at two standard deviations
    for name in ("A_U", "A_V"):  # 900 values
        assert named[f"core.wave.{name}"].std().item() == pytest.approx(0.01, rel=0.12)


def test_it_learns_through_its_memory() -> None:
    """Twelve steps of Adam on imitation of a target that depends on the inputs of the step before."""
    torch.manual_seed(2)
    model = make()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    xs = inputs(6, 3)
    target = torch.tanh(xs[0].roll(1, 0)[..., :OUTPUT])
    losses = []
    for _ in range(12):
        y, _, info = model.rollout(model.init_state(3), *xs)
        loss = (y - target).square().mean() + (info["value"] - xs[2]).square().mean() + (info["next_obs"] - xs[0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.gradient_clip)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.cms_write.value[0].weight.grad.abs().sum() > 0 and model.cms_write.gate[1].weight.grad.abs().sum() > 0
