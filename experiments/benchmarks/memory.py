"""Peak memory of the GroundedMamba engine over a prompt: what a constant state is for."""

from __future__ import annotations

import numpy as np

from conf.models import GroundedMambaConfig
from experiments.benchmarks.case import Met, Result, Target
from experiments.benchmarks.measure import Ratio
from experiments.monitors.memory import peak_bytes, reset_peak
from runtime import build

SHORT, LONG = 1_024, 16_384


def prefill(threads: int) -> Result:
    """Resident memory of this process at its peak, while the engine takes a prompt of SHORT and one of LONG tokens."""
    config = GroundedMambaConfig()
    engine, ids = build("grounded_mamba", config, "cython").engine, np.random.default_rng(0).integers(0, config.vocab_size, (1, LONG))
    engine.prefill(ids[:, :SHORT])  # what only a first call takes
    peaks = {}
    for length in (SHORT, LONG):
        reset_peak()
        engine.prefill(ids[:, :length])
        peaks[length] = peak_bytes()
    target = Target(f"peak memory of a prompt of {LONG:,} tokens over one of {SHORT:,}", f"{LONG:,} tokens", f"{SHORT:,} tokens", most=1.2)
    found = peaks[LONG] / peaks[SHORT]
    return Result(
        name="mamba_memory", title="GroundedMamba engine, peak memory over a prompt", timings={}, bound=None, shares={},
        targets=[Met(target, Ratio(found, found, found), target.holds(found))], checks=[], operations=0.0, bytes=0.0, left_out={},
        extra={"peak_megabytes": {str(length): peak / 2**20 for length, peak in peaks.items()}},
    )


CASES = [prefill]
