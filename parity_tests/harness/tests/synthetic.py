"""Results made of numbers, without any model: for tests of what is done with results. Numbers differ from place to place, so none stands for two."""

from __future__ import annotations

import zlib

from parity_tests.harness.battery import Result, TierResult
from parity_tests.harness.compare import Check, Place, passed
from parity_tests.harness.locate import sentence
from parity_tests.harness.measure import Measure
from parity_tests.harness.series import TIME, TRAINING, Series

REGIMES = ("as is", "carried state", "x 1e-3", "+ 100", "one-hot", "repeated token", "length 1", "length 63")


def spread(*where: object) -> float:
    """A number between 1 and 10 that depends on where it stands."""
    return 1.0 + 9.0 * (zlib.crc32(repr(where).encode()) % 9973) / 9973


def check(tier: str, where: str, leaf: str, regime: str, value: float, allowed: float, order: int = 0, dtype: str = "float64",
          own: float | None = None, quantity: str = "relative L2") -> Check:
    """One check with a measure."""
    found = Measure(35, value, 1.0 + value / 3.0, 1.0 - value / 7.0, 1.0 - value / 5.0, value, (1, 2), value * 2.0**52, 300.0, value, 1.0, (1,), 2,
                    3, 0)
    rule = {"rounding": 3, "splits": 5, "optimiser": 6}.get(tier, 2)
    return Check(tier, rule, where, leaf, regime, dtype, value <= allowed, value, allowed, "a reason of some words", quantity, "", order, found, own)


def result(name: str = "made", layers: int = 5, wrong: str = "", regimes: tuple[str, ...] = REGIMES, **meta: object) -> Result:
    """A result of `layers` layers and the whole model in every tier that has numbers; the layer `wrong` does not hold in float64."""
    paths = [f"blocks.{place}.norm" for place in range(layers)]
    order = {path: place for place, path in enumerate([*paths, ""])}
    tiers: dict[str, list[Check]] = {name: [] for name in ("forced", "free", "rounding", "gradients", "splits", "optimiser")}
    for path, place in order.items():
        bad = 1e7 if path == wrong and wrong else 1.0
        for regime in regimes:
            here = (name, path, regime)
            if path:
                tiers["forced"].append(check("forced", path, "", regime, 1e-15 * bad * spread("forced", *here), 1e-12, place))
            tiers["free"].append(check("free", path, "0", regime, 1e-14 * bad * spread("free", *here), 1e-11, place))
            for dtype, size in (("float32", 1e-7), ("bfloat16", 1e-2)):
                own = size * spread(dtype, "own", *here)
                label = regime if path else f"{regime}, end to end"
                tiers["rounding"].append(check("rounding", path, "0", label, own * spread(dtype, *here) / 10.0, 2.0 * own, place, dtype, own,
                                               f"{dtype} error"))
        for leaf in ("weight", "bias") if path else ():
            for kind in ("layer", "end to end"):
                value = 1e-13 * bad * spread("gradient", name, path, leaf, kind)
                tiers["gradients"].append(check("gradients", path, f"{path}.{leaf}", f"as is, {kind}", value, 1e-10, place,
                                                quantity="gradient, relative L2"))
            trained = 1e-12 * spread("trained", name, path, leaf)
            tiers["optimiser"].append(check("optimiser", path, f"{path}.{leaf}", "50 steps", trained, 1e-9, place))
    for cut in range(1, 17):
        for side in ("", ", reference"):
            where = f"split at {cut} of 17 from a carried state{side}"
            tiers["splits"].append(check("splits", "", "0", where, 1e-15 * spread(cut, side), 1e-11, cut))
    series = [Series(TIME, path, "0", "as is", "float64", [1e-15 * spread("time", path, t) for t in range(63)]) for path in order]
    series.append(Series(TIME, "", "0", "as is", "float32", [1e-7 * spread(t) for t in range(63)], [2e-7 * spread(t) for t in range(63)]))
    loss = [3.0 / (1.0 + step) + 0.01 * spread("loss", step) for step in range(50)]
    series.append(Series(TRAINING, "", "loss", "50 steps", "float64", [value + 1e-13 for value in loss], loss))
    done = [TierResult("conversion", [passed(Place("conversion", "", "as is", "float64"), 9, "bit for bit", quantity="bits")], 0.25)]
    done += [TierResult(tier, checks, 1.5, sentence=sentence(checks, {})) for tier, checks in tiers.items()]
    done.append(TierResult("effects", [], 0.0, "a made result calls nothing"))
    policy = {"matmul": "highest", "tf32": False, "threads": 1, "versions": {"numpy": "2.0.1", "torch": "2.11.3"}}
    provenance = {"seed": 0, "dtypes": ["float64", "float32", "bfloat16"], "time": "2026-01-01T00:00:00+00:00", "commit": "ab12" * 10, **meta}
    return Result(name, done, ["a note"], ["a lint"], policy, order, {path: 3e-16 for path in paths}, 2 * layers,
                  sentence([c for tier in done for c in tier.checks], {path: 3e-16 for path in paths}), meta=provenance, series=series)
