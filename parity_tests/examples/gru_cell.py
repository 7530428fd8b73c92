"""torch's GRU cell and Flax's. `upstream`: Flax's has one bias less and cannot hold torch's weights. `repaired`: it is given that bias."""
import numpy as np
import torch
from flax import nnx

from parity_tests.harness import Case, Rule, Transpose


def flax_cell() -> nnx.GRUCell:
    return nnx.GRUCell(5, 7, rngs=nnx.Rngs(0))


def with_bias() -> nnx.GRUCell:
    model = flax_cell()
    model.dense_h = nnx.Linear(7, 21, rngs=nnx.Rngs(0))  # Flax makes it with use_bias=False
    return model


def inputs(seed: int, batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(batch, 5)), "h": rng.normal(size=(batch, 7))}


TURN = (Transpose((1, 0)),)
RULES = [Rule("weight_ih", "dense_i.kernel", TURN), Rule("weight_hh", "dense_h.kernel", TURN),
         Rule("bias_ih", "dense_i.bias")]
COMMON = {
    "reference": lambda: torch.nn.GRUCell(5, 7), "inputs": inputs, "sizes": {"batch": 3, "input": 5, "hidden": 7},
    "call": (lambda model, given, _: model(given["x"], given["h"]), lambda model, given, _: model(given["h"], given["x"])[1]),
}
upstream = Case("nnx.GRUCell", candidate=flax_cell, weights=RULES, **COMMON)
repaired = Case("nnx.GRUCell, with the bias", candidate=with_bias, weights=[*RULES, Rule("bias_hh", "dense_h.bias")], **COMMON)
