"""Settings of a test run, made before any framework is imported, and what one process must give back between files."""

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# waiting threads give their core away: on a shared machine, spinning ones cost seconds per training step
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "disabled")

# The JAX programs of the tests are small and run a few times: XLA compiles them in a third of the time without its fusion emitters and LLVM's
# optimisation. XLA aborts on flags that it does not know, and the second is not for ever.
QUICK, USUAL = "--xla_backend_optimization_level=0", {"xla_backend_optimization_level": 3}
with contextlib.suppress(metadata.PackageNotFoundError):
    if metadata.version("jaxlib").startswith("0.10."):
        QUICK, USUAL = f"{QUICK} --xla_cpu_use_fusion_emitters=false", {**USUAL, "xla_cpu_use_fusion_emitters": True}
os.environ.setdefault("XLA_FLAGS", QUICK)

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def what_is_compiled_ahead_is_compiled_as_usual() -> Iterator[None]:
    """`Lowered.compile` without options optimises as a user's program does: so do the harness where it measures the rounding of a model end to
    end, and tests of what is compiled. Everything else is compiled quickly."""
    if "jax" not in sys.modules or os.environ["XLA_FLAGS"] != QUICK:
        yield
        return
    lowered = sys.modules["jax"].stages.Lowered
    plain = lowered.compile

    def compile_as_usual(self: Any, compiler_options: dict[str, Any] | None = None, **rest: Any) -> Any:
        return plain(self, compiler_options=USUAL if compiler_options is None else compiler_options, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowered, "compile", compile_as_usual)
        yield


@pytest.fixture(scope="module")
def whatever_is_jitted_is_compiled_as_usual() -> Iterator[None]:
    """For a file whose programs run longer than they take to compile: `jax.jit` optimises from here to its end."""
    with pytest.MonkeyPatch.context() as patch:
        if "jax" in sys.modules and os.environ["XLA_FLAGS"] == QUICK:
            patch.setattr(sys.modules["jax"], "jit", functools.partial(sys.modules["jax"].jit, compiler_options=USUAL))
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_given_back() -> Iterator[None]:
    """Every program that XLA compiles holds memory mappings, of which Linux allows a process 65,530: past them, compiling crashes."""
    yield
    if "jax" in sys.modules and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 20_000:  # the most seen: 5,500
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def absl_does_not_close_what_pytest_captures_into() -> None:
    """Hydra's logging set-up closes every handler, and absl's (which optax imports) closes the stream that stderr was when it was made."""
    if "absl.logging" in sys.modules:
        sys.modules["absl.logging"].get_absl_handler().python_handler.stream = sys.__stderr__
