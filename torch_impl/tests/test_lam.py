"""LAM in torch: positions, padding, activations, refusals. The public code's vectors are in `parity_tests/test_golden_lam.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conf.models import LamConfig
from torch_impl.lam import LAM

CONFIG = LamConfig(vocab_size=41, dim=30, heads=5, depth=2, ffn_dim=37, max_positions=11, max_length=60, chunk_size=7)


@pytest.fixture
def model() -> LAM:
    torch.manual_seed(0)
    return LAM(CONFIG).double()


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(length).integers(0, CONFIG.vocab_size, (batch, length)))


def test_both_forms_are_the_same_function(model: LAM) -> None:
    torch.manual_seed(0)
    other = LAM(CONFIG, impl="recurrent").double()
    x, mask = ids(3, 29), torch.arange(29) < torch.tensor([[29], [14], [1]])
    for found, expected in zip(model(x, mask, True).hidden_states, other(x, mask, True).hidden_states, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # five chunks, two layers of order 1


@pytest.mark.parametrize("length", [12, 19, 60])
def test_more_tokens_than_positions_stretch_the_table(model: LAM, length: int) -> None:
    table = model.position_embeddings.weight
    expected = F.interpolate(table.T[None], size=length, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(model.positions(length, None)[0], expected, rtol=0, atol=1e-14)
    # by the valid tokens of each sentence, not by the length of the batch
    mask = torch.arange(length) < torch.tensor([[length], [11], [5], [12]])
    found = model.positions(length, mask)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-14)
    assert torch.equal(found[1, :11], table) and torch.equal(found[2, :5], table[:5])
    twelve = F.interpolate(table.T[None], size=12, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(found[3, :12], twelve, rtol=0, atol=1e-14)


def test_positions_of_a_long_text_are_exact_in_float32() -> None:
    """i (P - 1) / (n - 1) in float32 is wrong by up to 1e-5 of a row here; whole numbers and a remainder are not."""
    model = LAM(dataclasses.replace(CONFIG, max_positions=512, max_length=32768))
    model.position_embeddings.weight.data = torch.arange(512.0)[:, None].expand(512, 30).contiguous()
    found = model.positions(30011, None)[0, :, 0].double()
    expected = torch.arange(30011, dtype=torch.float64) * 511 / 30010
    assert (found - expected).abs().max() <= 511 * 2**-24  # half a place of the largest


def test_embedding_is_the_unit_mean_of_valid_tokens(model: LAM) -> None:
    x, mask = ids(2, 9), torch.arange(9) < torch.tensor([[9], [4]])
    output = model(x, mask)
    mean = output.last_hidden_state[1, :4].mean(0)
    torch.testing.assert_close(output.embedding[1], mean / mean.norm(), rtol=0, atol=1e-15)
    assert output.hidden_states is None and (output.last_hidden_state[1, 4:] == 0).all()
    torch.testing.assert_close(output.embedding[1], model(x[1:, :4]).embedding[0], rtol=0, atol=1e-13)


def test_gelu_is_exact_and_repeated(model: LAM) -> None:
    """One block by hand, from what its parts give."""
    block, x = model.blocks[1], torch.randn(2, 6, 30, dtype=torch.float64)
    h = block.norm_delta(x + block.delta(x)[0])
    inner = block.ffn_in(h)
    for _ in range(2):
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(block(x), block.norm_ffn(h + block.ffn_out(inner)), rtol=0, atol=1e-13)


def test_every_trained_parameter_gets_a_gradient(model: LAM) -> None:
    """From the third chunk on, decays and chunk flux too."""
    model(ids(2, 29), torch.arange(29) < torch.tensor([[29], [23]])).embedding[:, 0].sum().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None or (parameter.grad == 0).all()}
    assert silent == {f"blocks.{i}.delta.o_norm.gate" for i in range(2)}


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 61, dtype=torch.int64), None, "at most max_length=60 tokens, found 61"), (torch.full((1, 3), 41), None, "must lie in"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "neither of them 0"), (torch.zeros(1, 3), None, "must be int64 or int32"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), "row 0 has padding before a valid token"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), "row 0 has no valid token"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.ones(3), r"must have the shape of input_ids, \(1, 3\), found \(3,\)"),
    ],
    ids=["too_long", "vocabulary", "empty", "dtype", "hole", "no_token", "shape"],
)
def test_refusals(model: LAM, x: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(x, mask)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 4}, "dim must be divisible by heads, found dim=30 and heads=4"), ({"transform": "wy"}, "transform must be one of 'lam', 'exact'"),
        ({"conv": "causal"}, "conv of an encoder on the hierarchical rule must be 'same'"), ({"gelu_repeats": 0}, "gelu_repeats must be an integer"),
        ({"max_positions": 1}, "max_positions must be an integer of at least 2"), ({"norm_eps": 0.0}, "norm_eps must lie in"),
    ],
)
def test_impossible_configurations(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **sizes)
