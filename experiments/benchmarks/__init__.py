"""What `python -m experiments.bench` measures: one module for every model, and how it is timed, gated, bounded and shown."""
