"""WaveCore as cases of the harness: rollouts on the lazy memory and single steps on the plain one, torch against the NNX port.

Every variant is tiny, its axes all of different sizes, none a power of two or a square (two and four levels are what they are). Carried
states start where they are hard: s and p near the limit of 10, the memory partly filled, the scale of one level a step from its fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conf.models import SizedWaveCoreConfig, WaveCoreConfig
from jax_impl.wavecore import WaveCore as JaxWaveCore
from parity_tests import specs_voters
from parity_tests.harness import Bound, Case, StateProtocol, Trajectory
from torch_impl.wavecore import WaveCore as TorchWaveCore

LENGTH, BATCH, EMPTY = 19, 6, 4
HEADS = ("action", "value", "world_model")
DEFAULT = WaveCoreConfig(
    d_s=13, d_w=28, d_p=20, d_e=21, d_k=27, d_c=11, num_levels=3, cms_sizes=(7, 14, 15), cms_dims=(17, 22, 26), cms_decays=(0.3, 0.07, 0.02),
    mamba_dt_min=0.003, mamba_dt_scale=0.7, heads=HEADS).sized(18, 30, 23)
STATE3 = WaveCoreConfig(
    d_s=17, d_w=30, d_p=12, d_e=26, d_k=19, d_c=11, num_levels=2, cms_sizes=(15, 18), cms_dims=(27, 20), cms_decays=(0.3, 0.05),
    mamba_state_dim=3, mamba_dt_min=0.003, mamba_dt_scale=0.7, heads=HEADS).sized(22, 29, 21)
LINEAR = WaveCoreConfig(
    d_s=23, d_w=27, d_p=26, d_e=20, d_k=13, d_c=21, num_levels=4, cms_sizes=(11, 15, 18, 38), cms_dims=(17, 14, 12, 24),
    cms_decays=(0.3, 0.1, 0.05, 0.02), use_mamba_wave=False, state_saturation_limit=0.0, cms_write="slot0", output_type="discrete",
).sized(19, 39, 29)
LARGE_WAVE = ("an offset of 100 makes waves of 6e6, whose products cancel where a state stays within its limit of 10: 14 of them lose eps of 1e7, "
              "7e-10 beside states of 10")
BOUNDS = (
    Bound(1e-12, "one module on equal input: float64 rounding of a port that computes in another order", on="forced"),
    Bound(1e-10, LARGE_WAVE, on="forced", where="core", regime="+ 100"),
    Bound(1e-11, "up to 50 steps, each on the states and the memory of the one before, lose one digit more", on="free"),
    Bound(1e-10, LARGE_WAVE, on="free", regime="+ 100"),
    Bound(1e-11, "a split changes only how many steps the encoder and the decoder see at once", on="splits"),
    Bound(1e-10, "the way back through 19 steps loses another digit", on="gradients"),
)


def unfilled(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The module with zeros for weights, which the harness replaces: to draw them would cost a compilation for every shape."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state))


def port(config: SizedWaveCoreConfig) -> JaxWaveCore:
    """The port, its weights zeros."""
    return unfilled(lambda: JaxWaveCore(config, config.obs_dim, config.action_dim, config.output_dim, rngs=nnx.Rngs(0)))


def leaves(config: SizedWaveCoreConfig) -> dict[str, Callable[..., np.ndarray]]:
    """Values where the harness's default would leave the range of their meaning: a linear wave without a limit must not grow."""
    if config.use_mamba_wave:
        return {}
    return {f"core.wave.A_{factor}": lambda rng, shape: rng.normal(0.0, 0.2, shape) for factor in "UV"}


def hot(config: SizedWaveCoreConfig, seed: int, batch: int) -> dict[str, Any]:
    """States near their limit and a plain memory, of which the last rows of the first level are empty, by the names of `CoreState`."""
    rng = np.random.default_rng([seed, 1])
    sizes = list(zip(config.cms_sizes, config.cms_dims, strict=True))
    signs = rng.choice([-1.0, 1.0], size=(batch, config.d_p))
    filled = [(np.arange(size) < size - EMPTY * (level == 0))[:, None] for level, size in enumerate(config.cms_sizes)]
    return {
        "s": rng.uniform(-9.9, 9.9, (batch, config.d_s)), "w": rng.uniform(-9.9, 9.9, (batch, config.d_w)),
        "p": signs * rng.uniform(9.0, 9.9, (batch, config.d_p)),
        "memories": [mask * rng.normal(size=(batch, *size)) for mask, size in zip(filled, sizes, strict=True)],
        "keys": [mask * rng.normal(size=(batch, size, config.d_k)) for mask, (size, _) in zip(filled, sizes, strict=True)],
    }


def lazy(config: SizedWaveCoreConfig) -> Callable[[int, int], dict[str, Any]]:
    """`hot` in the form that `rollout` carries: the first level is folded in the first step."""
    scales = np.array([0.0012, 0.3, 0.6, 1.0])[: config.num_levels]

    def draw(seed: int, batch: int) -> dict[str, Any]:
        state = hot(config, seed, batch)
        for kind in ("memories", "keys"):
            state[kind] = [rows / scale for rows, scale in zip(state[kind], scales, strict=True)]
        return state | {"norms": [np.square(rows).sum(-1) for rows in state["memories"]], "scales": list(scales)}

    return draw


def rolled(module: Any, inputs: dict[str, Any], state: Any) -> tuple[Any, ...]:
    """y, state, info of a rollout, in either framework; without a state from the beginning."""
    return module.rollout(module.init_state(inputs["x_obs"].shape[1]) if state is None else state, **inputs)


def rolled_loss(outputs: tuple[Any, ...], _: dict[str, Any]) -> Any:
    """Mean square distances of all that a user sees: heads, info, states, and the memory as it is, not as it is kept."""
    y, state, info = outputs
    memory = [scale * rows for kind in (state.memories, state.keys) for scale, rows in zip(state.scales, kind, strict=True)]
    seen = [y, state.s, state.w, state.p, *memory, *info.pop("attention_weights", ()), *info.values()]
    return sum(((x - 0.3) ** 2).mean() for x in seen if x is not None)


def alone(config: SizedWaveCoreConfig) -> dict[str, str]:
    """What changes nothing where there is a single level."""
    return {"cms_read.mixing.*": "the softmax over one level is one"} if config.num_levels == 1 else {}


def sizes(config: SizedWaveCoreConfig, batch: int, length: int | None = None) -> dict[str, int]:
    """Every axis by name; that of two or four levels is left out, which is a power of two by its meaning."""
    named = {"batch": batch} | ({"length": length} if length else {})
    named |= {name: getattr(config, name) for name in ("obs_dim", "action_dim", "output_dim", "d_s", "d_w", "d_p", "d_e", "d_k", "d_c")}
    named |= {f"slots of level {level}": size for level, size in enumerate(config.cms_sizes)}
    named |= {f"width of level {level}": size for level, size in enumerate(config.cms_dims)}
    named |= {"half of d_e": config.d_e // 2, "quarter of d_e": config.d_e // 4, "hidden": (config.d_s + config.d_c) // 2}
    if not config.use_mamba_wave:
        named |= {"rank": config.d_w // 4}
    elif config.mamba_state_dim > 1:
        named |= {"state": config.mamba_state_dim, "inner": config.d_w // config.mamba_state_dim}
    return named | ({"levels": config.num_levels} if config.num_levels not in (2, 4) else {})


def rollout(
    name: str, config: SizedWaveCoreConfig, regimes: tuple[str, ...], *, batch: int = BATCH, length: int = LENGTH, split: int = 5
) -> Case:
    """`rollout` step after step in torch against one scan in the port, split anywhere, and 50 AdamW steps."""
    widths = {"x_obs": config.obs_dim, "a_prev": config.action_dim, "r_t": 1}

    def draw(seed: int, batch: int = batch, length: int = length) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=(length, batch, width)) for name, width in widths.items()}

    return Case(
        name=name,
        reference=lambda: TorchWaveCore(config, config.obs_dim, config.action_dim, config.output_dim),
        candidate=lambda: port(config),
        inputs=draw,
        call=(rolled, rolled),
        loss=(rolled_loss, rolled_loss),
        leaves=leaves(config),
        regimes=regimes,
        states=StateProtocol(axis=0, initial=lazy(config), split_length=split),
        trajectory=Trajectory(length=3),
        bounds=BOUNDS,
        unobservable=alone(config),
        sizes=sizes(config, batch, length),
    )


def stepped(module: Any, inputs: dict[str, Any], _: Any) -> tuple[Any, ...]:
    """y and info of one step on a plain memory, and which rows it wrote as a discrete choice."""
    given = dict(inputs)
    memories, keys = (tuple(given.pop(name) for name in inputs if name.startswith(kind)) for kind in ("memory", "key"))
    y, info = module(*given.values(), memories, keys)
    decays = module.config.cms_decays
    written = [(new != (1 - decay) * old).any(-1) for new, old, decay in zip(info["cms_memories"], memories, decays, strict=True)]
    return y, info | {"written": written}


def step(
    name: str, config: SizedWaveCoreConfig, batch: int, regimes: tuple[str, ...] = ("as is", "+ 100"), also: Mapping[str, Any] | None = None
) -> Case:
    """One call with eight arguments, from states near their limit."""

    def draw(seed: int) -> dict[str, np.ndarray]:
        rng, state = np.random.default_rng(seed), hot(config, seed, batch)
        widths = {"x_obs": config.obs_dim, "a_prev": config.action_dim, "r_t": 1}
        inputs = {name: rng.normal(size=(batch, width)) for name, width in widths.items()} | {f"{name}_prev": state[name] for name in "swp"}
        inputs |= {f"memory_{level}": rows for level, rows in enumerate(state["memories"])}
        return inputs | {f"key_{level}": rows for level, rows in enumerate(state["keys"])}

    return Case(
        name=name,
        reference=lambda: TorchWaveCore(config, config.obs_dim, config.action_dim, config.output_dim),
        candidate=lambda: port(config),
        inputs=draw,
        call=(stepped, stepped),
        also=also or {},
        leaves=leaves(config),
        regimes=regimes,
        trajectory=Trajectory(),
        bounds=BOUNDS,
        unobservable=alone(config),
        sizes=sizes(config, batch),
    )


FULL = [rollout("wavecore", DEFAULT, ("as is", "carried state"))]
CASES = [
    *FULL,
    step("wavecore_step", STATE3, batch=5, also=specs_voters.wavecore_step(STATE3)),
    step("wavecore_linear_step", LINEAR, batch=3, also=specs_voters.wavecore_step(LINEAR)),
    rollout("wavecore_linear", LINEAR, ("as is", "carried state"), batch=3, length=7, split=3),
]
