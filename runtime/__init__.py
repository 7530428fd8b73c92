"""One door for users: build a model on any backend, save it, load it on another, read public checkpoints.

    model = build("grounded_mamba", config, backend="torch", arrays=None, dtype="float32", seed=0)
    embeddings = LAM.from_pretrained(directory, backend="cython").encode(["Hello world"])
    y, state, info = load_core(directory, backend="jax").step(state, x_obs, a_prev, r_t)

Importing this package imports no framework.
"""

from runtime import init, public
from runtime.build import BACKENDS, build
from runtime.checkpoint import load, save
from runtime.core import load_core, save_core
from runtime.files import read_arrays
from runtime.lam import LAM
from runtime.observations import TextObservations

__all__ = ["BACKENDS", "LAM", "TextObservations", "build", "init", "load", "load_core", "public", "read_arrays", "save", "save_core"]
