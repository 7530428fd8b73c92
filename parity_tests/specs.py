"""Our models as cases of the harness: the only file, with the other specs_*.py, that knows both torch_impl and jax_impl.

Every variant is a tiny model whose axes all have different sizes, none a power of two or a square, with random weights and, where it has
a bank, slots that were written a different number of times. `parity run` without arguments runs CASES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig
from jax_impl import deltanet as jax_deltanet
from jax_impl.grounded_mamba import GroundedMamba as JaxGroundedMamba
from jax_impl.lam import LAM as JaxLAM
from parity_tests import specs_baselines, specs_voters, specs_wavecore
from parity_tests.harness import Bound, Case, StateProtocol, Trajectory
from torch_impl import deltanet as torch_deltanet
from torch_impl.grounded_mamba import GroundedMamba as TorchGroundedMamba
from torch_impl.lam import LAM as TorchLAM

BATCH, LENGTH = 3, 19
DEFAULT = GroundedMambaConfig(
    vocab_size=29, dim=70, depth=2, ssm_dim=6, rwkv_heads=7, retrieval_heads=14, memory_size=13, memory_writes=11, memory_every=10)
VARIANTS = {
    "grounded_mamba": DEFAULT,
    "grounded_mamba_learned_gate": dataclasses.replace(DEFAULT, gate="learned", dt_bias=(0.7,), time_first="gain"),
    "grounded_mamba_direct": dataclasses.replace(DEFAULT, decay="direct", dt_clamp="hard", normalised_key=False),
    "grounded_mamba_direct_gain": dataclasses.replace(DEFAULT, decay="direct", time_first="gain", readout_norm=False, memory_size=0),
    "groundthink": GroundedMambaConfig.groundthink(vocab_size=29, dim=70, depth=2, ssm_dim=6, rwkv_heads=7),
}
BOUNDS = (
    Bound(1e-12, "one layer on equal input: float64 rounding of a port that computes in another order", on="forced"),
    Bound(1e-10, "an offset of 100 costs two digits, and a norm over the few channels of a head divides by the little that they differ", on="forced",
          regime="+ 100"),
    Bound(1e-11, "two blocks on top of each other lose one digit more", on="free"),
    Bound(1e-11, "a split only changes the order of float64 sums", on="splits"),
    Bound(1e-10, "the way back through 19 normalised steps loses another digit", on="gradients"),
    Bound(300.0, "a mean over up to 600 tokens, one after another in XLA: n / 2 eps, all of one sign where the tokens are equal", on="floor",
          where="blocks.*", leaf="2.gate"),
)


def token_ids(vocab: int, batch: int = BATCH, length: int = LENGTH) -> Callable[..., dict[str, np.ndarray]]:
    """Random token ids (B, L) of a seed, `batch` sequences of `length` tokens unless said otherwise."""
    own = (batch, length)

    def draw(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        shape = tuple(size if given is None else given for given, size in zip((batch, length), own, strict=True))
        return {"input_ids": np.random.default_rng(seed).integers(0, vocab, shape)}

    return draw


inputs = token_ids(DEFAULT.vocab_size)


def leaves(config: GroundedMambaConfig) -> dict[str, Callable[..., np.ndarray]]:
    """Values in the range of their meaning where the harness's default would leave it."""
    ranges: dict[str, Callable[..., np.ndarray]] = {
        "blocks.*.rwkv.time_decay": lambda rng, shape: rng.uniform(-4.0, 0.5, shape) if config.decay == "exp_exp" else rng.uniform(0.3, 0.98, shape),
        "blocks.*.ssm.A": lambda rng, shape: rng.normal(size=shape),  # largest singular value well above max_singular
    }
    if config.dt_clamp == "hard":  # its gradient lives between the clamps, and softplus(-4) = 0.018 lies there
        ranges["blocks.*.ssm.dt_proj.bias"] = lambda rng, shape: rng.uniform(-4.5, -3.5, shape)
        ranges["blocks.*.ssm.dt_proj.weight"] = lambda rng, shape: rng.normal(0.0, 0.05, shape)
    if config.memory_size:
        def counts(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            occupied = shape[0] - 4  # a prefix; four slots are still empty
            return np.where(np.arange(shape[0]) < occupied, rng.integers(1, 200, shape), 0)

        ranges |= {
            "blocks.*.rwkv.memory_count": counts,
            "blocks.*.rwkv.update_counter": lambda rng, shape: np.asarray(3 * config.memory_every),
            "blocks.*.rwkv.writes": lambda rng, shape: np.asarray(3),
        }
    return ranges


def initial_states(config: GroundedMambaConfig) -> Callable[[int, int], list[dict[str, np.ndarray]]]:
    """Random states for `batch` sequences."""

    def draw(seed: int, batch: int) -> list[dict[str, np.ndarray]]:
        rng, head = np.random.default_rng(seed), (config.rwkv_heads, config.head_dim, config.head_dim)
        return [{"ssm": rng.normal(size=(batch, config.ssm_dim)), "wkv": rng.normal(size=(batch, *head))} for _ in range(config.depth)]

    return draw


def with_aux(module: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    return module(inputs["input_ids"], return_aux=True)


def write_memory(module: Any, outputs: tuple[Any, ...]) -> None:
    module.update_memory(outputs[2])


def torch_loss(outputs: tuple[Any, ...], inputs: dict[str, Any]) -> torch.Tensor:
    """Next-token cross-entropy, and the size of the states, so that every output has a gradient."""
    logits, labels = outputs[0][:, :-1], inputs["input_ids"][:, 1:]
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) if labels.numel() else 0.0
    return entropy + sum(s.square().mean() for state in outputs[1] for s in state.values())


def jax_loss(outputs: tuple[Any, ...], inputs: dict[str, Any]) -> jax.Array:
    logits, labels = outputs[0][:, :-1], inputs["input_ids"][:, 1:]
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean() if labels.size else 0.0
    return entropy + sum(jnp.square(s).mean() for state in outputs[1] for s in state.values())


def grounded_mamba(
    name: str, config: GroundedMambaConfig, regimes: tuple[str, ...] | None = None, split: int = 17, *, batch: int = BATCH, length: int = LENGTH,
    chunk: int = 6, impl: str = "chunked", also: Mapping[str, Any] | None = None,
) -> Case:
    """torch's chunked form against the NNX port, layer by layer and end to end, 50 AdamW steps with the bank written every 10th.

    `regimes` None runs them all. `split` tokens are split everywhere: 17 are three chunks.
    """
    return Case(
        name=name,
        reference=lambda: TorchGroundedMamba(config, impl=impl, chunk_size=chunk),
        candidate=lambda: JaxGroundedMamba(config, chunk_size=chunk, rngs=nnx.Rngs(0)),
        inputs=token_ids(config.vocab_size, batch, length),
        ties={"lm_head.weight": "embedding.weight"},
        leaves=leaves(config),
        regimes=regimes,
        states=StateProtocol(initial=initial_states(config), detached=True, split_length=split),
        # 50 steps of four blocks at 3e-3 multiply a rounding by 1e10, at 1e-3 by 1e4; of two blocks at 3e-3 by 1e3
        trajectory=Trajectory(call=(with_aux, with_aux), after=(write_memory, write_memory), lr=3e-3 if config.depth <= 2 else 1e-3),
        loss=(torch_loss, jax_loss),
        bounds=BOUNDS,
        unpaired={"lm_head": "the port ties its head by attending to the embedding"},
        also=also or {},
        not_forced={"*.state_norm": "its weights are read by the scan, which normalises inside its loop"},
        unobservable={} if config.gate == "learned" else {"blocks.*.gate_proj.*": "kept in the fixed mode, where the gate is a constant"},
        sizes={
            "batch": batch, "length": length, "vocab": config.vocab_size, "dim": config.dim, "ssm_dim": config.ssm_dim,
            "heads": config.rwkv_heads, "head_dim": config.head_dim,
        } | ({"slots": config.memory_size, "retrieval_heads": config.retrieval_heads, "retrieval_dim": config.dim // config.retrieval_heads,
              "rows": config.memory_writes} if config.memory_size else {}),
    )


LAM = LamConfig(vocab_size=29, dim=35, heads=7, depth=2, ffn_dim=31, max_positions=23, chunk_size=6)
DELTANET = DeltaNetConfig(vocab_size=29, dim=35, heads=7, depth=2, ffn_dim=31, chunk_size=6)
LAYER_BOUNDS = (
    Bound(1e-12, "one layer on equal input: float64 rounding of a port that computes in another order", on="forced"),
    Bound(1e-10, "an offset of 100 costs two digits, and a norm over the few channels of a head divides by the little that they differ", on="forced",
          regime="+ 100"),
    Bound(1e-11, "four chunks, each on the states of the one before, lose one digit more", on="free"),
    Bound(1e-11, "a split only changes the order of float64 sums", on="splits"),
    Bound(1e-10, "the way back through the chunks loses another digit", on="gradients"),
)


HOLDING = ("", "blocks.?", "*delta")  # what is given a state of the delta rule


def delta_bounds(rule: str) -> tuple[Bound, ...]:
    """LAYER_BOUNDS, and what a layer on the plain rule may lose under an offset of all that it is given, its state included."""
    reason = ("the offset makes beta one and keys and queries parallel, so that a read cancels the state of 100 that the write erased, and the norm "
              "of the heads divides what is left by as little as sqrt(1e-6): 1e5 eps, which the order of the sums decides")
    if rule != "plain":
        return LAYER_BOUNDS
    forced = (Bound(1e-10, reason, on="free", where=where, regime="+ 100") for where in HOLDING)
    return (*LAYER_BOUNDS, *forced, *(Bound(2e5, reason, on="floor", where=where, regime="+ 100*") for where in HOLDING))


INSIDE_THE_RULE = {
    "*.token_flux*": "its weights are read by the rule, which computes the flux before it cuts into chunks",
    "*.chunk_flux*": "its weights are read by the rule, which computes the flux from the means of a chunk",
}


def right_padded(batch: int, length: int) -> np.ndarray:
    """Masks (B, L) int64 of sentences of different lengths, the first one full."""
    lengths = np.maximum(1, length - np.arange(batch) * length // 3)
    return (np.arange(length) < lengths[:, None]).astype(np.int64)


def sentences(config: LamConfig, batch: int = BATCH, length: int = LENGTH) -> Callable[..., dict[str, np.ndarray]]:
    """Random token ids (B, L) of a seed, and their masks."""
    ids = token_ids(config.vocab_size, batch, length)

    def draw(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        given = ids(seed, batch, length)
        return given | {"attention_mask": right_padded(*given["input_ids"].shape)}

    return draw


def rule_leaves(prefix: str) -> dict[str, Callable[..., np.ndarray]]:
    """temp divides: it stays away from zero; decays are spread over (0, 1), fluxes too, some tokens' as far as their clamps."""
    return {
        f"{prefix}rule.temp": lambda rng, shape: rng.uniform(1.0, 3.0, shape),
        f"{prefix}*_decay_bias": lambda rng, shape: rng.uniform(-1.5, 1.5, shape),
        f"{prefix}rule.*_flux.out.weight": lambda rng, shape: rng.uniform(-16.0, 16.0, shape),
        f"{prefix}rule.*_flux.out.bias": lambda rng, shape: rng.uniform(-0.7, 0.7, shape),
    }


def encoder(
    name: str, regimes: tuple[str, ...] | None = None, config: LamConfig = LAM, *, batch: int = BATCH, length: int = LENGTH, impl: str = "recurrent",
    also: Mapping[str, Any] | None = None,
) -> Case:
    """LAM, padded batches: one chunk after another in torch against all chunks at once in the port. More tokens than positions at length 63."""
    return Case(
        name=name,
        reference=lambda: TorchLAM(config, impl=impl),
        candidate=lambda: JaxLAM(config, rngs=nnx.Rngs(0)),
        inputs=sentences(config, batch, length),
        leaves=rule_leaves("blocks.*.delta."),
        regimes=regimes,
        bounds=LAYER_BOUNDS,
        also=also or {},
        not_forced=INSIDE_THE_RULE,
        unobservable={"blocks.*.o_norm.gate": "kept for layers without an output gate"},
        sizes={"batch": batch, "length": length, "vocab": config.vocab_size, "dim": config.dim, "heads": config.heads, "head_dim": config.head_dim,
               "ffn": config.ffn_dim, "positions": config.max_positions, "chunk": config.chunk_size},
    )


def layer(
    name: str, regimes: tuple[str, ...] | None = None, *, dim: int = LAM.dim, heads: int = LAM.heads, chunk: int = 6, batch: int = BATCH,
    length: int = LENGTH, impl: str = "recurrent", **choices: Any,
) -> Case:
    """One DeltaNetLayer from given states, with the choices that LAM and DeltaNetLM leave out."""
    hierarchical, width, kernel, sizes = choices["rule"] == "hierarchical", dim // heads, choices.get("conv_kernel", 4), (batch, length)
    head = (heads, width, width)
    shapes = {"S_fast": head, "S_slow": head} if hierarchical else {"S": head}
    if choices.get("conv") == "causal":
        shapes |= {f"conv_{x}": (kernel - 1, dim) for x in "qkv"}

    def draw(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        shape = tuple(size if given is None else given for given, size in zip((batch, length), sizes, strict=True))
        given = {"x": np.random.default_rng(seed).normal(size=(*shape, dim))} | ({"mask": right_padded(*shape) != 0} if hierarchical else {})
        return given | {kind: np.random.default_rng([seed, i]).normal(size=(shape[0], *size)) for i, (kind, size) in enumerate(shapes.items())}

    def call(module: Any, inputs: dict[str, Any], _: Any) -> Any:
        return module(inputs["x"], inputs.get("mask"), {kind: inputs[kind] for kind in shapes})

    return Case(
        name=name,
        reference=lambda: torch_deltanet.DeltaNetLayer(dim, heads, chunk_size=chunk, impl=impl, **choices),
        candidate=lambda: jax_deltanet.DeltaNetLayer(dim, heads, chunk_size=chunk, **choices, rngs=nnx.Rngs(0)),
        inputs=draw,
        call=(call, call),
        leaves=rule_leaves("") if hierarchical else {},
        regimes=regimes,
        bounds=delta_bounds(choices["rule"]),
        not_forced=INSIDE_THE_RULE if hierarchical else {},
        unobservable={"o_norm.gate": "kept for layers without an output gate"} if choices.get("output_gate", True) else {},
        sizes={"batch": batch, "length": length, "dim": dim, "heads": heads, "head_dim": width, "chunk": chunk},
    )


def deltanet_lm(
    name: str, regimes: tuple[str, ...] | None = None, config: DeltaNetConfig = DELTANET, *, split: int = 17, batch: int = BATCH,
    length: int = LENGTH, impl: str = "recurrent",
) -> Case:
    """The causal model: token after token in torch against the port's chunks, streams split anywhere."""
    def states(seed: int, batch: int) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(seed)
        shapes = {f"conv_{x}": (batch, config.conv_kernel - 1, config.dim) for x in "qkv"}
        shapes |= {"S": (batch, config.heads, config.head_dim, config.head_dim)}
        return [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(config.depth)]

    return Case(
        name=name,
        reference=lambda: torch_deltanet.DeltaNetLM(config, impl=impl),
        candidate=lambda: jax_deltanet.DeltaNetLM(config, rngs=nnx.Rngs(0)),
        inputs=token_ids(config.vocab_size, batch, length),
        ties={"lm_head.weight": "embedding.weight"},
        regimes=regimes,
        states=StateProtocol(initial=states, detached=True, split_length=split),
        trajectory=Trajectory(lr=3e-3),
        loss=(torch_loss, jax_loss),
        bounds=delta_bounds("plain"),
        unpaired={"lm_head": "the port ties its head by attending to the embedding"},
        unobservable={"blocks.*.o_norm.gate": "kept for layers without an output gate"},
        sizes={"batch": batch, "length": length, "vocab": config.vocab_size, "dim": config.dim, "heads": config.heads,
               "head_dim": config.head_dim, "ffn": config.ffn_dim, "kernel": config.conv_kernel},
    )


# The default and the public variant under every regime; the others, which share their layers, where a variant can part from them: one block, a
# carried state, an offset and a last chunk that is ragged, which 19 tokens in chunks of 6 have, and 8 where they are split. Every further shape
# costs a compilation.
SOME = ("as is", "carried state", "+ 100")
LANGUAGE_FULL = [
    grounded_mamba("grounded_mamba", DEFAULT, also=specs_voters.grounded_mamba(DEFAULT)),
    grounded_mamba("groundthink", VARIANTS["groundthink"], split=8, also=specs_voters.grounded_mamba(VARIANTS["groundthink"])),
    encoder("lam", ("as is", "+ 100", "repeated token", "length 1", "length 63"),
            also=specs_voters.lam(LAM) | {"torch, chunked": lambda: TorchLAM(LAM, impl="chunked")}),
    deltanet_lm("deltanet_lm", ("as is", "carried state", "+ 100", "repeated token", "length 1", "length 63")),
]
LANGUAGE = [
    *LANGUAGE_FULL,
    *(grounded_mamba(name, dataclasses.replace(config, depth=1), SOME, split=8) for name, config in VARIANTS.items()
      if name not in ("grounded_mamba", "groundthink")),
    layer("delta_net_layer_learned_gate", ("as is", "+ 100"), rule="hierarchical", output_gate=False, transform="exact"),
    layer("delta_net_layer_plain_same", ("as is",), rule="plain", conv_kernel=3),
]
FULL = [*LANGUAGE_FULL, *specs_wavecore.FULL]
BASELINES = specs_baselines.cases((torch_loss, jax_loss))
CASES = [*LANGUAGE, *BASELINES, *specs_wavecore.CASES]
