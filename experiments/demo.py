"""`python -m experiments.demo [--steps N] [OVERRIDE ...]`: the default run in torch, its first steps in JAX, and whether the curves agree.

Three runs from the same weights and text, one after another, each a process of its own: the default run with the compiled kernels; its
first `--steps` steps in JAX; the same steps in torch with sums in another order, which is the band for `experiments.compare`.
Ends with status 1 if the model does not beat the trigram or the curves part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import compare
from experiments.cli import writable
from experiments.errors import RunError

STEPS = 150  # well past the growth of rounding to its full size, which takes about a hundred


def plan(folder: Path, steps: int, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of the three runs by the name of their folder."""
    prefix = [f"training.stop_at={steps}", "evaluation.sample_tokens=0", "long_context=false"]
    own = {
        "torch": ["backend=torch_compiled"],
        "jax": ["backend=jax", *prefix],
        "torch-permuted": ["backend=torch_compiled", "data.permute_rows=true", *prefix],
    }
    shared = ["training.log_every=1", f"tracker.group={folder.name}", *overrides]
    return {name: _last([*shared, *given, f"run_dir='{(folder / name).absolute()}'"]) for name, given in own.items()}


def _last(overrides: Sequence[str]) -> list[str]:
    """Each key with the last of its values."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the three, compare, and say where everything is. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description="train in torch and in JAX and compare the curves")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the second and the third run (default %(default)s)")
    parser.add_argument("--output", type=Path, default=None, metavar="FOLDER", help="default: runs/demo-TIME")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for groundwave train, for all three runs")
    chosen = parser.parse_args(arguments)
    folder = chosen.output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        writable(folder)
        for name, overrides in plan(folder, chosen.steps, chosen.overrides).items():
            print(f"\n{name}: groundwave train {' '.join(overrides)}\n", flush=True)
            status = subprocess.run([sys.executable, "-m", "experiments.train", *overrides], check=False).returncode
            if status:
                return status
        print(f"\nTorch and JAX, the first {chosen.steps} steps from the same weights and text:\n", flush=True)
        apart = compare.main([str(folder / "torch"), str(folder / "jax"), "--band", str(folder / "torch-permuted"), "--output", str(folder)])
    except RunError as error:
        print(f"groundwave: {error}", file=sys.stderr)
        return 2
    summary = json.loads((folder / "torch" / "summary.json").read_text(encoding="utf-8"))
    model, trigram = summary["validation_bits_per_byte"], summary["trigram_bits_per_byte"]
    beaten = model < trigram
    print(f"Validation: {model:.4f} bits per byte, {'below' if beaten else 'NOT below'} the trigram's {trigram:.4f}.\nEverything is in {folder}.")
    return 0 if beaten and not apart else 1


if __name__ == "__main__":
    sys.exit(main())
