"""Random clean configurations of our models: sizes, choices, weights and inputs are drawn, nothing is wrong with them.

A seed gives the sizes and choices, a draw the weights, the inputs and one of the regimes, so that several configurations share what has to be
compiled. All axes have different sizes, none a power of two or a square (the harness's lint decides). What a seed gives depends on no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, SizedWaveCoreConfig, WaveCoreConfig
from parity_tests import specs, specs_wavecore
from parity_tests.harness import Case, lint
from parity_tests.harness.adapters.base import digest
from parity_tests.harness.leaves import moved
from parity_tests.harness.recording import Recording
from parity_tests.harness.regimes import STANDARD

FREE = tuple(n for n in range(3, 90) if n & (n - 1) and round(n**0.5) ** 2 != n)  # sizes that the lint lets through by themselves
TRIES = 2000  # of sizes until none equals another; a wave with four levels takes the most, some hundreds
PLAIN = ("as is", "carried state")
SAME_SHAPE = tuple(regime.name for regime in STANDARD if regime.length is None and regime.batch is None and not regime.carried)
MARGIN = 2e-5  # of a discrete choice from another one: norms and gates of float32 err by less than 1e-6, and 16 times that is allowed
REDRAWS = 50  # of the inputs, until they keep that margin and write to every level
STEPS = 5  # of the optimiser
FULL, HALF = ("float64", "float32"), ("float64", "float32", "bfloat16")
HALF_MARGIN = 0.05  # the same of bfloat16, whose norms and gates err by less than 0.02

Draw = Callable[[np.random.Generator, np.random.Generator], tuple[Case, dict[str, Any]]]


def pick(rng: np.random.Generator, low: int, high: int) -> int:
    """A size in [low, high]."""
    return int(rng.choice([n for n in FREE if low <= n <= high]))


def choose(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def heads_and_width(rng: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    """Number of heads and the width of them all, low <= width <= high."""
    pairs = [(heads, heads * width) for heads in FREE for width in FREE if heads != width and low <= heads * width <= high]
    return pairs[int(rng.integers(len(pairs)))]


def rounded(rng: np.random.Generator, low: float, high: float) -> float:
    """A number of three digits, so that a list of configurations stays readable."""
    return float(f"{rng.uniform(low, high):.3g}")


def regimes(rng: np.random.Generator, case: Case) -> tuple[str, ...]:
    """The plain regimes, the offset, and one more that changes no shape: lengths and batch sizes are those of the configuration.

    A rollout of WaveCore keeps to the plain ones: its norms and scales belong to its memory, and a transformation would tear them apart.
    """
    if case.states is not None and case.states.axis == 0:
        return PLAIN
    others = [name for name in SAME_SHAPE if name not in ("as is", "+ 100")]
    return ("as is", *(["carried state"] if case.states is not None else []), "+ 100", others[int(rng.integers(len(others)))])


def batch_and_length(rng: np.random.Generator, longest: int) -> dict[str, int]:
    """One configuration in eight has a single sequence, one in eight a single token."""
    lone = rng.integers(8)
    return {"batch": 1 if lone == 0 else pick(rng, 3, 7), "length": 1 if lone == 1 else pick(rng, 3, longest)}


def grounded_mamba(rng: np.random.Generator, fixed: np.random.Generator) -> tuple[Case, dict[str, Any]]:
    """GroundedMamba with any of its choices."""
    with_bank, bank = fixed.random() < 0.6, []
    while not bank:
        heads, dim = heads_and_width(rng, 15, 84)
        bank = [n for n in FREE if n != heads and dim % n == 0 and dim // n > 2] if with_bank else [1]
    config = GroundedMambaConfig(
        vocab_size=pick(rng, 11, 47), dim=dim, depth=int(rng.choice([1, 2], p=[0.85, 0.15])), ssm_dim=pick(rng, 5, 13), rwkv_heads=heads,
        dt_min=rounded(rng, 0.0005, 0.005), dt_max=rounded(rng, 0.06, 0.3), dt_bias=choose(rng, (0.7,), (1.0, 0.5), (-0.4, 0.2)),
        dt_clamp=choose(rng, "smooth", "hard"), max_singular=rounded(rng, 0.5, 1.1), gate=choose(rng, "fixed", "learned"),
        gate_ssm=rounded(rng, 0.2, 0.8), decay=choose(rng, "exp_exp", "direct"), time_first=choose(rng, "bonus", "gain"),
        normalised_key=choose(rng, True, False), readout_norm=choose(rng, True, False), memory_size=pick(rng, 6, 19) if with_bank else 0,
        memory_alpha=rounded(rng, 0.005, 0.1), memory_every=int(rng.integers(1, 4)), memory_writes=pick(rng, 3, 23),
        retrieval_heads=choose(rng, *bank), norm_eps=choose(rng, 1e-6, 1e-5, 1e-4))
    choices = {"chunk": pick(rng, 3, 14), "impl": choose(rng, "chunked", "recurrent"), "split": int(rng.integers(2, 4)), **batch_and_length(rng, 23)}
    return specs.grounded_mamba("grounded_mamba", config, None, **choices), {**dataclasses.asdict(config), **choices}


def lam(rng: np.random.Generator, fixed: np.random.Generator) -> tuple[Case, dict[str, Any]]:
    """LAM, a DeltaNetLayer with choices that it leaves open, or DeltaNetLM."""
    kind = choose(fixed, "encoder", "layer", "deltanet_lm")
    heads, dim = heads_and_width(rng, 15, 60)
    # two chunks at least: decays and fluxes of the hierarchical rule do nothing within the first one
    choices = {"impl": choose(rng, "chunked", "recurrent"), "batch": pick(rng, 3, 7), "length": pick(rng, 7, 23)}
    chunk = pick(rng, 3, choices["length"] - 1)
    if kind == "layer":
        choices |= {"dim": dim, "heads": heads, "chunk": chunk, "rule": choose(rng, "hierarchical", "plain"),
                    "transform": choose(rng, "lam", "exact"), "output_gate": choose(rng, True, False), "conv_kernel": int(rng.integers(2, 6)),
                    "rms_eps": choose(rng, 1e-6, 1e-5)}
        if choices["rule"] == "plain" and choices["impl"] == "recurrent":
            choices["transform"] = "exact"  # the recurrence of the plain rule has no other
        choices["conv"] = choose(rng, "same", "causal") if choices["rule"] == "plain" else "same"
        return specs.layer("delta_net_layer", None, **choices), {"kind": kind, **choices}
    sizes = {"vocab_size": pick(rng, 11, 47), "dim": dim, "heads": heads, "depth": int(rng.choice([1, 2], p=[0.85, 0.15])),
             "ffn_dim": pick(rng, 10, 60), "chunk_size": chunk}
    if kind == "deltanet_lm":
        choices |= batch_and_length(rng, 23)
        config = DeltaNetConfig(**sizes, conv_kernel=pick(rng, 3, 7), norm_eps=choose(rng, 1e-6, 1e-5))
        choices["split"] = int(rng.integers(2, 4))
        case = specs.deltanet_lm("deltanet_lm", None, config, **choices)
    else:
        config = LamConfig(**sizes, max_positions=pick(rng, 10, 30), transform=choose(rng, "lam", "exact"), gelu_repeats=int(rng.integers(1, 3)),
                           norm_eps=choose(rng, 1e-12, 1e-6, 1e-5), rms_eps=choose(rng, 1e-6, 1e-5))
        case = specs.encoder("lam", None, config, **choices)
    return case, {"kind": kind, **dataclasses.asdict(config), **choices}


def wavecore_config(rng: np.random.Generator, levels: int) -> SizedWaveCoreConfig:
    """WaveCore with presets' proportions at random sizes: widths, levels, waves, outputs and decays."""
    mamba = rng.random() < 0.6
    sizes = [int(n) for n in rng.permutation([n for n in FREE if 10 <= n <= 60])]
    state = choose(rng, 1, 3) if mamba else 1
    config = WaveCoreConfig(
        d_s=sizes.pop(), d_w=state * sizes.pop(), d_p=sizes.pop(), d_e=sizes.pop(), d_k=sizes.pop(), d_c=sizes.pop(), num_levels=levels,
        cms_sizes=tuple(pick(rng, 6, 40) for _ in range(levels)), cms_dims=tuple(sizes.pop() for _ in range(levels)),
        cms_decays=tuple(sorted((rounded(rng, 0.01, 0.35) for _ in range(levels)), reverse=True)), use_mamba_wave=mamba, mamba_state_dim=state,
        mamba_dt_min=rounded(rng, 0.0001, 0.01), mamba_dt_scale=rounded(rng, 0.3, 1.2), state_saturation_limit=choose(rng, 0.0, 10.0),
        cms_write=choose(rng, "least_salient", "slot0"), salience_threshold=rounded(rng, 0.3, 0.6), output_type=choose(rng, "continuous", "discrete"),
        heads=choose(rng, ("action",), ("action", "value"), ("action", "value", "world_model")))
    return config.sized(sizes.pop(), sizes.pop(), sizes.pop())


def wavecore(rng: np.random.Generator, fixed: np.random.Generator) -> tuple[Case, dict[str, Any]]:
    """A rollout on the lazy memory or one step on a plain one."""
    config, kind = wavecore_config(rng, int(fixed.integers(1, 5))), choose(fixed, "rollout", "step")
    if kind == "step":
        choices = {"batch": pick(rng, 3, 7)}
        case = specs_wavecore.step("wavecore_step", config, regimes=None, **choices)
    else:
        choices = {"batch": pick(rng, 3, 7), "length": pick(rng, 3, 7), "split": int(rng.integers(2, 4))}
        case = specs_wavecore.rollout("wavecore_rollout", config, PLAIN, **choices)
    return case, {"kind": kind, **dataclasses.asdict(config), **choices}


MODELS: Mapping[str, Draw] = {"grounded_mamba": grounded_mamba, "lam": lam, "wavecore": wavecore}


def margin(case: Case) -> float:
    """How far every discrete choice of WaveCore's memory is from another one: of a gate from its threshold, of the least norm from the next one;
    0 where a level is never written to."""
    recording, closest, written = Recording(case), np.inf, set()
    config = recording.adapter("float64").module.config
    for regime in recording.regimes:
        for call in recording.run(regime).calls:
            if call.path == "cms_write" and config.cms_write == "least_salient":
                for norms in call.args[5] if len(call.args) > 5 else [np.square(rows).sum(-1) for rows in call.args[3]]:
                    least, second = np.sort(norms, -1)[:, :2].T
                    tied = second == least  # equal rows, empty or one-hot: exactly so in any precision, and the first is taken
                    closest = min(closest, np.where(tied, 1.0, (second - least) / np.where(tied, 1.0, second)).min())
            elif call.path.startswith("cms_write.gate"):
                over = 0.5 + 0.5 * np.tanh(0.5 * call.outputs) - config.salience_threshold
                closest = min(closest, np.abs(over).min())
                written |= {call.path} if regime in recording.plain() and (over > 0.0).any() else set()
    return float(closest) if len(written) == config.num_levels else 0.0


def flowing(case: Case) -> bool:
    """Whether W_bilinear, where there is one, reaches the outputs: not where every flux lies beyond its clamps."""
    recording = Recording(case)
    names = [name for name in recording.leaves if name.endswith("W_bilinear")]
    adapter, regime = recording.adapter("float64"), recording.plain()[0]
    before = digest(recording.run(regime).outputs)
    for name in names:
        adapter.load({**recording.weights, name: moved(recording.weights[name], name, case.seed)})
        if digest(adapter.run(recording.inputs(regime), recording.states(regime), tap=False).outputs) == before:
            return False
    return True


def made(model: str, seed: int, draw: int) -> tuple[Case, dict[str, Any]]:
    """The configuration of a seed and a draw, as a case and as plain values.

    Every fourth one of LAM, and of WaveCore's single steps where their choices are far enough apart, has bfloat16 as well; GroundedMamba has
    not: the bound on its A is a singular value decomposition, which torch has not in half precision. Raises ValueError when no sizes without a
    flaw are found, or no inputs that keep WaveCore's choices apart, or LAM's fluxes between their clamps.
    """
    rng = np.random.default_rng([seed, list(MODELS).index(model)])
    for _ in range(TRIES):
        # what decides how many axes there are is the same in every try: few axes collide less often
        case, described = MODELS[model](rng, np.random.default_rng([seed, list(MODELS).index(model), 1]))
        if not lint.sizes(case.sizes):
            break
    else:
        raise ValueError(f"no sizes of {model} without a flaw in {TRIES} tries from seed {seed}")
    # a single token has no next one: the loss would leave the logits out, and their weights would only decay
    length = 3 if described.get("length") == 1 else case.trajectory.length
    factory, own = case.candidate, np.random.default_rng([seed, draw, 1])
    trajectory = dataclasses.replace(case.trajectory, steps=STEPS, length=length)
    case = dataclasses.replace(
        case, name=f"{model} {seed}.{draw}", candidate=lambda: specs_wavecore.unfilled(factory), trajectory=trajectory,
        regimes=regimes(own, case), dtypes=HALF if model == "lam" and seed % 4 == 0 else FULL)
    for _ in range(REDRAWS):
        case = dataclasses.replace(case, seed=int(own.integers(1 << 30)))
        if model == "grounded_mamba" or (model == "lam" and flowing(case)):
            return case, described
        if model == "lam":
            continue
        apart = margin(case)
        if apart > MARGIN:
            return dataclasses.replace(case, dtypes=HALF if apart > HALF_MARGIN and case.states is None and seed % 4 == 0 else FULL), described
    if model == "lam":
        raise ValueError(f"no inputs of lam {seed}.{draw} bring a flux between its clamps in {REDRAWS} draws")
    raise ValueError(f"no inputs of {model} {seed}.{draw} write to every level with choices {MARGIN:g} apart in {REDRAWS} draws")
