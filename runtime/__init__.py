"""One door for users: build a model on any backend, save it, load it on another, read public checkpoints.

    model = build("grounded_mamba", config, backend="torch", arrays=None, dtype="float32", seed=0)
    embeddings = LAM.from_pretrained(directory, backend="cython").encode(["Hello world"])

Importing this package imports no framework.
"""

from runtime import init, public
from runtime.build import BACKENDS, build
from runtime.checkpoint import load, save
from runtime.files import read_arrays
from runtime.lam import LAM

__all__ = ["BACKENDS", "LAM", "build", "init", "load", "public", "read_arrays", "save"]
