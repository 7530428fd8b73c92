"""DeltaNet's layer and language model: what they see, what they carry, what they refuse, and how they start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.models import DeltaNetConfig
from torch_impl.deltanet import DeltaNetLayer, DeltaNetLM
from torch_impl.ops.delta_rule import delta_rule, hierarchical_delta_rule, l2norm, normalised
from torch_impl.ops.short_conv import causal_conv, short_conv

CONFIG = DeltaNetConfig(vocab_size=37, dim=30, depth=2, heads=3, ffn_dim=23, chunk_size=7)


@pytest.fixture
def model() -> DeltaNetLM:
    torch.manual_seed(0)
    return DeltaNetLM(CONFIG).double()


def ids(batch: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(length).integers(0, CONFIG.vocab_size, (batch, length)))


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("token", [0, 6, 7, 12, 19])
def test_no_output_sees_a_later_token(token: int, impl: str) -> None:
    torch.manual_seed(1)
    model, first = DeltaNetLM(CONFIG, impl=impl), ids(2, 20)
    second = first.clone()
    second[:, token] = (second[:, token] + 1) % CONFIG.vocab_size
    before, after = (model(x)[0] for x in (first, second))
    assert torch.equal(before[:, :token], after[:, :token])
    assert all((before[:, t] != after[:, t]).any() for t in range(token, 20))


def test_streaming_equals_the_full_pass_for_every_split(model: DeltaNetLM) -> None:
    x = ids(3, 17)
    whole, last = model(x)
    for split in range(1, 17):
        first, states = model(x[:, :split])
        second, states = model(x[:, split:], states)
        # a chunk that starts elsewhere adds the same numbers in another order
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-13)
        for found, expected in zip(states, last, strict=True):
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-13)


def test_one_token_at_a_time(model: DeltaNetLM) -> None:
    x, states, outputs = ids(2, 9), None, []
    for t in range(9):
        logits, states = model(x[:, t : t + 1], states)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(x)[0], rtol=0, atol=1e-13)


def test_states_come_in_detached_and_leave_attached(model: DeltaNetLM) -> None:
    states = [{name: value.requires_grad_() for name, value in state.items()} for state in model.init_states(2)]
    logits, after = model(ids(2, 5), states)
    (logits.sum() + sum(value.sum() for state in after for value in state.values())).backward()
    assert all(value.grad is None for state in states for value in state.values())
    assert model.blocks[0].delta.k_proj.weight.grad.abs().sum() > 0
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {f"blocks.{i}.delta.o_norm.gate" for i in range(2)}  # frozen: every trained parameter has a gradient


def test_generation_goes_on_where_the_prompt_ended(model: DeltaNetLM) -> None:
    prompt = ids(2, 5)
    drawn = model.generate(prompt, 6, temperature=0.0)
    assert drawn.shape == (2, 11) and torch.equal(drawn[:, :5], prompt)
    assert torch.equal(drawn[:, 5:], model(drawn)[0][:, 4:-1].argmax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv": "causal"}, "conv must be 'same' with rule='hierarchical', found 'causal': its chunk means look ahead"),
        ({"rule": "gated"}, "rule must be one of 'hierarchical', 'plain', found 'gated'"), ({"conv": "valid"}, "conv must be one of"),
        ({"impl": "fused"}, "impl must be one of"), ({"heads": 7}, "dim must be divisible by heads, found dim=30 and heads=7"),
    ],
)
def test_layer_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaNetLayer(30, **{"heads": 3, **arguments})


def test_plain_layer_refuses_a_mask_and_the_model_bad_states(model: DeltaNetLM) -> None:
    layer = DeltaNetLayer(30, 3, rule="plain")
    with pytest.raises(ValueError, match="mask must be None for a layer on the plain rule"):
        layer(torch.zeros(2, 5, 30), torch.ones(2, 5, dtype=torch.bool))
    states = model.init_states(2)
    with pytest.raises(ValueError, match=r"states\[0\]\['S'\] must have shape \(3, 3, 10, 10\), found \(2, 3, 10, 10\)"):
        model(ids(3, 4), [{**state, **{f"conv_{x}": torch.zeros(3, 3, 30).double() for x in "qkv"}} for state in states])
    with pytest.raises(ValueError, match=r"input_ids \(1, 1\) must lie in \[0, 37\), found 37"):
        model(torch.tensor([[37]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, found 0"), ({"transform": "wy"}, "transform must be 'lam' or 'exact'"),
        ({"impl": "scan"}, "impl of the delta rule must be"), ({"impl": "recurrent", "transform": "lam"}, "has transform 'exact'"),
    ],
)
def test_rule_refuses(arguments: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        delta_rule(x, x, x, x[..., 0], **arguments)


def test_convolutions_see_what_they_should() -> None:
    """Centred: t - 2 .. t + 1; causal: t - 3 .. t. Tap j of four reads t - 2 + j, or t - 3 + j."""
    x = torch.zeros(1, 9, 2)
    x[0, 4, 0] = 1.0
    weight, bias = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]]), torch.tensor([0.0, 0.5])
    centred = short_conv(x, weight, bias, 2)
    assert centred[0, :, 0].tolist() == [0, 0, 0, 4, 3, 2, 1, 0, 0] and (centred[..., 1] == 0.5).all()
    causal, past = causal_conv(x, weight, bias, torch.zeros(1, 3, 2))
    assert causal[0, :, 0].tolist() == [0, 0, 0, 0, 4, 3, 2, 1, 0] and torch.equal(past, x[:, 6:])
    reference = torch.nn.functional.conv1d(x.mT, weight, bias, padding=2, groups=2)[..., :9].mT
    torch.testing.assert_close(centred, reference, rtol=0, atol=0)


def test_zero_rows_and_zero_states_have_gradient_zero() -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = l2norm(x)
    y.backward(torch.ones_like(y))
    assert y.detach().tolist() == [[0.6, -0.8], [0.0, 0.0]]
    assert x.grad[1].tolist() == [0.0, 0.0] and x.grad[0].abs().sum() > 0
    # at S = 0 the norm has no gradient, and S / (|S| + 1e-8) that of S / 1e-8
    state = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    normalised(state).sum().backward()
    torch.testing.assert_close(state.grad, torch.full_like(state, 1e8), rtol=1e-15, atol=0)


def test_hierarchical_states_are_handed_on_at_the_end_of_a_chunk() -> None:
    torch.manual_seed(3)
    layer = DeltaNetLayer(30, 3, chunk_size=7).double()
    q, k, v = (torch.randn(2, 3, 20, 10, dtype=torch.float64) for _ in range(3))
    gates = [torch.rand(2, 3, 20, dtype=torch.float64) for _ in range(5)]
    weights = (layer.rule.token_flux.mlp(), layer.rule.chunk_flux.mlp(), layer.rule.W_bilinear, layer.rule.temp)

    def run(cut: slice, states: Any) -> Any:
        return hierarchical_delta_rule(*(x[:, :, cut] for x in (q, k, v, *gates)), *weights, None, states, chunk_size=7)

    whole, last = run(slice(0, 20), None)
    first, middle = run(slice(0, 14), None)
    second, after = run(slice(14, 20), middle)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=0, atol=1e-13)  # order of sums
    for found, expected in zip(after, last, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_initial_values() -> None:
    torch.manual_seed(5)
    layer = DeltaNetLayer(96, 3)
    named = {name: value.detach() for name, value in layer.named_parameters()}
    for name, value in named.items():
        if name.endswith(("proj.weight", "conv1d.weight")):
            bound = (4 if "conv" in name else 96) ** -0.5
            assert value.abs().max() <= bound and value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name  # 288 values or more
        elif "flux" in name and name.endswith("weight"):
            bound = 0.1 * math.sqrt(6 / sum(value.shape))
            assert 0.5 * bound < value.abs().max() <= bound, name
        elif name.endswith((".bias", "proj.bias")):
            assert (value == 0).all(), name
    assert torch.equal(named["fast_decay_bias"], torch.full((3,), math.log(0.3)))
    assert torch.equal(named["slow_decay_bias"], torch.full((3,), math.log(0.9)))
    assert torch.equal(named["rule.temp"], torch.full((3,), math.sqrt(32)))
    bound = 0.1 * math.sqrt(6 / 64)
    assert 0.9 * bound < named["rule.W_bilinear"].abs().max() <= bound
    assert (named["o_norm.weight"] == 1).all() and (named["o_norm.gate"] == 1).all() and not layer.o_norm.gate.requires_grad
    learned = DeltaNetLayer(96, 3, output_gate=False)
    assert learned.o_norm.gate.requires_grad and "g_proj.weight" not in dict(learned.named_parameters())
