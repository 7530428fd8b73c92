"""Settings of a test run, made before any framework is imported, and what one process must give back between files."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

# waiting threads give their core away: on a shared machine, spinning ones cost seconds per training step
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_file() -> Iterator[None]:
    """Every program that XLA compiles holds memory mappings, of which Linux allows a process 65,530: past them, compiling crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def absl_does_not_close_what_pytest_captures_into() -> None:
    """Hydra's logging set-up closes every handler, and absl's (which optax imports) closes the stream that stderr was when it was made."""
    if "absl.logging" in sys.modules:
        sys.modules["absl.logging"].get_absl_handler().python_handler.stream = sys.__stderr__
