"""Parity between a reference and a candidate: do they compute the same thing, and if not, where do they first part?

Any `torch.nn.Module` (or a function over named arrays) against any Flax `nnx.Module` or `flax.linen.Module` (or such a function). A port
needs one case:

    import numpy as np
    from parity_tests.harness import Bound, Case, StateProtocol

    case = Case(
        name="my port",
        reference=lambda: my_torch.Model(dim=15, state=7),                # a torch.nn.Module
        candidate=lambda: my_nnx.Model(dim=15, state=7),                  # an nnx.Module with the same dotted paths
        inputs=lambda seed, batch=3, length=6: {"ids": np.random.default_rng(seed).integers(0, 11, (batch, length))},
        states=StateProtocol(output=1, detached=True),                    # logits, states = model(ids, states)
        ties={"head.weight": "embedding.weight"},
        unpaired={"head": "the candidate reuses its embedding"},
        bounds=[Bound(1e-12, "measured 3e-15 on clean ports", on="forced")],
        sizes={"batch": 3, "length": 6, "dim": 15, "state": 7, "vocabulary": 11},
    )

and one command, `parity run my_case.py:case` (`--html page.html` for a page to look at), or in a test file

    from parity_tests.harness import parity_case

    @parity_case(case)
    def test_port(parity): ...

The harness randomises every weight of the reference, converts them by kind of layer, records the reference once, and compares: layers fed
the reference's own inputs ("forced") and whole runs ("free") in float64 under many regimes, the same in lower precision against the float64
oracle, gradients by name, every split of the sequence, an AdamW run, side effects, and whether every weight matters at all. `parity mutate`
and `run_mutations` put known bugs into the candidate to prove that they would be noticed. Neither framework is imported before a case needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Case": "case", "CaseError": "case", "StateProtocol": "case", "Trajectory": "case",
    "Bound": "bounds", "BoundError": "bounds", "Regime": "regimes", "STANDARD": "regimes", "Policy": "policy",
    "Battery": "battery", "Result": "battery", "TIERS": "battery", "run_case": "battery",
    "Rule": "convert", "Transpose": "convert", "Reshape": "convert", "Split": "convert", "Concat": "convert", "Constant": "convert",
    "HeadPermutation": "convert", "WeightMap": "convert", "ConversionError": "convert",
    "Measure": "measure", "MeasureError": "measure", "cosine": "measure", "relative_l2": "measure",
    "Injector": "mutate", "Mutation": "mutate", "run_mutations": "mutate", "Kills": "kills",
    "Engine": "adapters.callable_adapter", "Patch": "adapters.nnx_trace",
    "Diagnosis": "explain", "to_json": "report", "from_json": "report", "ReportError": "records", "page": "html",
    "parity_case": "plugin", "mutation_tests": "plugin",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
