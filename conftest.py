"""Settings of a test run, made before any framework is imported."""

import os

# waiting threads give their core away: on a shared machine, spinning ones cost seconds per training step
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "disabled")
