"""GroundedMamba in torch by itself: its forms agree, it streams, it trains everywhere, and it refuses bad input by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conf.models import GroundedMambaConfig
from torch_impl.grounded_mamba import GroundedMamba
from torch_impl.ops import compiled
from torch_impl.ops.selective_scan import spectral_bound

SIZES = {"vocab_size": 29, "dim": 21, "depth": 2, "ssm_dim": 5, "rwkv_heads": 3}
SMALL = GroundedMambaConfig(**SIZES, memory_size=13, memory_every=2, memory_writes=6, retrieval_heads=7)
VARIANTS = {
    "default": SMALL,
    "learned gate": dataclasses.replace(SMALL, gate="learned"),
    "direct gain": dataclasses.replace(SMALL, decay="direct", time_first="gain"),
    "bare": dataclasses.replace(SMALL, normalised_key=False, readout_norm=False, memory_size=0),
    "groundthink": GroundedMambaConfig.groundthink(**SIZES),
}


def make(config: GroundedMambaConfig, impl: str = "chunked", **options: int) -> GroundedMamba:
    """A float64 model whose every leaf is random and whose bank, if any, has been written to twice."""
    torch.manual_seed(3)
    model = GroundedMamba(config, impl=impl, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if name.endswith("time_decay") and config.decay == "direct":
                parameter.uniform_(0.5, 0.99)
            if name.endswith("dt_proj.bias") and config.dt_clamp == "hard":
                parameter.fill_(-3.0)  # inside the clamp: where it starts, its gradient is zero
    for seed in range(2 * config.memory_every if config.memory_size else 0):
        model.update_memory(model(tokens(2, 11, seed=seed), return_aux=True)[2])
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("impl", "chunk_size"), [("chunked", 64), ("chunked", 7), ("compiled", 16)])
def test_fast_forms_equal_the_recurrent_one(variant: str, impl: str, chunk_size: int) -> None:
    truth, fast = make(VARIANTS[variant], "recurrent"), make(VARIANTS[variant], impl, chunk_size=chunk_size)
    fast.load_state_dict(truth.state_dict())
    ids, calls = tokens(3, 65), compiled.kernel_calls()
    outcomes = []
    for model in (truth, fast):
        logits, states = model(ids)
        (logits.square().mean() + sum(s.square().mean() for state in states for s in state.values())).backward()
        outcomes.append((logits, states))
    assert (compiled.kernel_calls() > calls) == (impl == "compiled")
    # another order of float64 sums over 65 tokens and 2 layers: about 1e-15, two digits of room
    assert relative(outcomes[1][0], outcomes[0][0]) < 1e-13
    for found, expected in zip(outcomes[1][1], outcomes[0][1], strict=True):
        assert max(relative(found[kind], expected[kind]) for kind in ("ssm", "wkv")) < 1e-13
    gradients = {name: parameter.grad for name, parameter in truth.named_parameters() if parameter.grad is not None}
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            assert relative(parameter.grad, gradients[name]) < 1e-12, name  # one digit more is lost on the way back


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_partition_gives_the_logits_of_one_call(variant: str) -> None:
    model, ids = make(VARIANTS[variant], chunk_size=4), tokens(2, 17)
    with torch.no_grad():
        whole, last = model(ids)
        for sizes in ([1] * 17, [5, 1, 11], [16, 1]):
            states, pieces = None, []
            for piece in ids.split(sizes, dim=1):
                logits, states = model(piece, states)
                pieces.append(logits)
            assert relative(torch.cat(pieces, dim=1), whole) < 1e-13
            assert max(relative(a[kind], b[kind]) for a, b in zip(states, last, strict=True) for kind in a) < 1e-13


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_changes_nothing_before_it(variant: str) -> None:
    model, ids = make(VARIANTS[variant], chunk_size=8), tokens(2, 23)
    other = ids.clone()
    other[:, 14] = (other[:, 14] + 1) % 29
    with torch.no_grad():
        assert torch.equal(model(ids)[0][:, :14], model(other)[0][:, :14])
        assert not torch.equal(model(ids)[0][:, 14:15], model(other)[0][:, 14:15])


def test_parameter_counts() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GroundedMamba(GroundedMambaConfig.groundthink()).parameters()) == 13_692_184
        by_sizes = GroundedMamba(vocab_size=10000, dim=512, depth=8, ssm_dim=16, rwkv_heads=4)
    assert by_sizes.config == GroundedMambaConfig()


@pytest.mark.parametrize("gate", ["fixed", "learned"])
def test_every_trainable_parameter_has_a_gradient_at_initialisation(gate: str) -> None:
    torch.manual_seed(0)
    model = GroundedMamba(GroundedMambaConfig(vocab_size=29, dim=20, depth=2, ssm_dim=6, gate=gate, memory_size=13, memory_every=1))
    ids = tokens(2, 19)
    expected = {name for name, p in model.named_parameters() if p.requires_grad and "memory_" not in name}
    assert any("gate_proj" in name for name in expected) == (gate == "learned")
    for bank in ("empty", "written", "open"):
        if bank == "written":
            model.update_memory(model(ids, return_aux=True)[2])
            expected |= {f"blocks.{i}.rwkv.memory_gate" for i in range(2)}
        if bank == "open":
            for block in model.blocks:
                torch.nn.init.constant_(block.rwkv.memory_gate, 0.3)
            expected |= {f"blocks.{i}.rwkv.memory_query.weight" for i in range(2)}
        model.zero_grad()
        logits, _ = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved == expected, bank


def test_the_learned_gate_starts_where_the_fixed_one_stands() -> None:
    ids = tokens(2, 9)
    fixed, learned = GroundedMamba(SMALL).double(), GroundedMamba(VARIANTS["learned gate"]).double()
    learned.load_state_dict(fixed.state_dict())
    assert relative(learned(ids)[0], fixed(ids)[0]) < 1e-7  # the biases +-ln(0.7 / 0.3) / 2 were rounded to float32
    assert torch.allclose(learned(ids, return_aux=True)[2]["gate"], torch.tensor(0.7, dtype=torch.float64), atol=1e-7)


def test_gradients_stop_at_a_state_passed_in() -> None:
    model = make(SMALL)
    states = [{kind: s.requires_grad_() for kind, s in state.items()} for state in model.init_states(2)]
    logits, after = model(tokens(2, 5), states)
    (logits.sum() + after[0]["ssm"].sum()).backward()
    assert all(s.grad is None for state in states for s in state.values())
    assert after[0]["wkv"].requires_grad


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0])
def test_the_spectral_bound_holds_and_has_a_finite_gradient(scale: float) -> None:
    matrix = (scale * torch.eye(5, dtype=torch.float64)).requires_grad_()  # five equal singular values
    bounded = spectral_bound(matrix, 0.99)
    bounded.sum().backward()
    assert float(torch.linalg.matrix_norm(bounded.detach(), 2)) == pytest.approx(min(scale, 0.99), rel=1e-14)
    assert torch.isfinite(matrix.grad).all()


def test_generation_streams_what_one_call_computes() -> None:
    model, ids = make(SMALL), tokens(2, 7)
    greedy = model.generate(ids, 12, temperature=0.0)
    assert greedy.shape == (2, 19) and torch.equal(greedy[:, :7], ids)
    assert torch.equal(model(greedy)[0][:, 6:-1].argmax(-1), greedy[:, 7:])
    drawn = [model.generate(ids, 12, temperature=1.5, top_k=9, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def broken_states(model: GroundedMamba, change: str) -> list[dict[str, torch.Tensor]]:
    states = model.init_states(2)
    if change == "shape":
        states[1]["wkv"] = states[1]["wkv"][..., :-1]
    if change == "batch":
        states[1]["ssm"] = states[1]["ssm"][:1]
    if change == "nan":
        states[1]["ssm"][0, 3] = torch.nan
    if change == "dtype":
        states[1]["ssm"] = states[1]["ssm"].float()
    if change == "missing":
        del states[1]["ssm"]
    return states[:1] if change == "short" else states


@pytest.mark.parametrize(("change", "message"), [
    ("shape", r"states\[1\]\['wkv'\] must have shape \(2, 3, 7, 7\), found \(2, 3, 7, 6\)"),
    ("batch", r"states\[1\]\['ssm'\] must have shape \(2, 5\), found \(1, 5\)"),
    ("nan", r"states\[1\]\['ssm'\] \(2, 5\) must be finite, found NaN"),
    ("dtype", r"states\[1\]\['ssm'\] must have dtype torch.float64, found torch.float32"),
    ("missing", r"states\[1\] must be a dict with the keys \['ssm', 'wkv'\], found \['wkv'\]"),
    ("short", "one entry per block, 2 in all, found 1"),
])
def test_bad_states_are_named(change: str, message: str) -> None:
    model = make(SMALL)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 3), broken_states(model, change))


@pytest.mark.parametrize(("ids", "message"), [
    (torch.full((2, 3), 29), r"input_ids \(2, 3\) must lie in \[0, 29\), found 29"),
    (torch.full((2, 3), -1), "found -1"),
    (torch.zeros(2, 0, dtype=torch.int64), r"neither of them 0, found \(2, 0\)"),
    (torch.zeros(0, 3, dtype=torch.int64), r"found \(0, 3\)"),
    (torch.zeros(3, dtype=torch.int64), r"found \(3,\)"),
    (torch.zeros(2, 3), "input_ids must be int64 or int32, found torch.float32"),
])
def test_bad_token_ids_are_named(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundedMamba(SMALL)(ids)


def test_bad_construction_is_named() -> None:
    with pytest.raises(ValueError, match="impl must be one of 'recurrent', 'chunked', 'compiled', found 'fast'"):
        GroundedMamba(SMALL, impl="fast")
    with pytest.raises(ValueError, match="a config or sizes, not both: found a config and dim"):
        GroundedMamba(SMALL, dim=21)
