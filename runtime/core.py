"""`load_core` and `save_core`: a WaveCore in a directory, and the router to the backend that runs it.

    model = load_core(path, backend="torch")                 "torch", "jax" or "cython"
    state = model.init_state()
    y, state, info = model.step(state, x_obs, a_prev, r_t)

    directory/config.json, model.safetensors     as `runtime.save` writes them; or wavecore_seed.npz, in the public parameter-tree names
    directory/manifest.json                      what the model is; its parameter count is held to the weights
    directory/proof_of_learning.json             where there is one: losses before and after, the curve between them, data and seed
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conf.models import SizedWaveCoreConfig
from runtime import files, public
from runtime.build import build, check_backend
from runtime.checkpoint import load_set, save_arrays
from runtime.manifest import MANIFEST, PROOF, check_count, check_fields, manifest_text, proof_text, read_manifest

SEED = "wavecore_seed.npz"
_SHOWN = {"d_s", "d_w", "d_p", "d_e", "d_k", "d_c", "num_levels", "cms_dims", "use_mamba_wave", "mamba_state_dim", "obs_dim", "action_dim"}
_NEEDED = ("cms_sizes", "cms_decays")


def save_core(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    proof: Mapping[str, Any] | None = None,
    embedding_model: str | None = None,
) -> None:
    """Write a WaveCore made by `build`, `load` or `load_core`, its manifest and, when `proof` is given, its proof of learning.

    training: some of steps, final_loss, text_samples. proof: loss_before, loss_after, curve (a number per step), data, seed, and any other
    plain JSON. embedding_model: what made the observations, where they are embeddings of text. What the directory held before stays valid
    until all of it is replaced; a proof of other weights does not stay.

    Raises TypeError for another model, ValueError for a training or proof that lacks or misstates an entry, OSError where the directory
    cannot be written.
    """
    if getattr(model, "name", None) != "wavecore":
        raise TypeError(f"model must be one that runtime.build made under the name 'wavecore', found {type(model).__name__}")
    texts = {MANIFEST: manifest_text(model.config, training, embedding_model)}
    if proof is not None:
        texts[PROOF] = proof_text(proof)
    save_arrays("wavecore", model.config, model.arrays(), directory, model.dtype, texts=texts)


def load_core(path: str | os.PathLike[str], backend: str = "torch", dtype: str | None = None, weights: str | None = None) -> Any:
    """The WaveCore in a local directory, on any backend, as `runtime.build` makes it; `dtype`, "float32" or "float64", as stored unless given;
    `weights`, "bfloat16", for the engine of "cython" alone.

    A directory of `save_core` or `save`, or one that holds `wavecore_seed.npz` beside a `manifest.json`. The sizes of the latter are read off
    its shapes; what no array shows comes from the manifest's config or from a `config.json`, of which `cms_sizes` and `cms_decays` must be
    there; the rest is the public code's default, and `cms_write` its "slot0". A RuntimeWarning names the fields that are not ours.

    Raises FileNotFoundError for a directory or file that is not there, ValueError, naming the file, for one that is broken, altered or
    contradicts another, parameter counts included, and for a backend that WaveCore does not have; ImportError for one that is not installed.
    """
    check_backend("wavecore", backend)
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}; models are read from local directories, nothing is downloaded")
    if files.is_saved_set(directory):
        name, config, arrays, stored, _ = load_set(directory)
        if name != "wavecore":
            raise ValueError(f"{directory} holds a {name!r}, expected a 'wavecore'")
    elif (directory / SEED).is_file():
        config, arrays = _read_seed(directory)
        stored = str(next(iter(arrays.values())).dtype)
    else:
        raise FileNotFoundError(f"{directory} holds neither a {files.CONFIG} that runtime.save wrote nor {SEED}")
    return build("wavecore", config, backend, arrays, stored if dtype is None else dtype, weights=weights)


def describe_core(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The manifest and the proof of learning, None where there is none, that `save_core` wrote. Raises as `load_core`."""
    _, paths = files.read_set(Path(path))
    if MANIFEST not in paths:
        raise FileNotFoundError(f"{path} lists no {MANIFEST}, so it is no saved WaveCore")
    return read_manifest(paths[MANIFEST]), files.read_json(paths[PROOF]) if PROOF in paths else None


def _read_seed(directory: Path) -> tuple[SizedWaveCoreConfig, dict[str, np.ndarray]]:
    """Configuration and arrays, under our names, of a public checkpoint."""
    path = directory / SEED
    manifest = read_manifest(directory / MANIFEST)
    held = files.read_arrays(path)
    try:
        arrays, shown = public.rename("wavecore", held), public.config("wavecore", held)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_count(directory / MANIFEST, manifest, sum(value.size for value in arrays.values()))
    said = _said(directory, manifest)
    fields = dataclasses.asdict(shown)
    check_fields(directory / MANIFEST, said, path, {key: value for key, value in fields.items() if key in _SHOWN})
    missing = [key for key in _NEEDED if key not in said]
    if missing:
        raise ValueError(f"{directory / MANIFEST} must say {' and '.join(missing)} under config: {SEED} does not show them")
    unknown = [key for key in said if key not in fields]
    if unknown:
        warnings.warn(f"{directory} describes fields that no WaveCore here has, left out: {', '.join(unknown)}", RuntimeWarning, stacklevel=3)
    try:
        config = dataclasses.replace(shown, **{key: value for key, value in said.items() if key in fields})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / MANIFEST}: {error}") from error
    return config, arrays


def _said(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the manifest's config and of a config.json, plain or under "config". Raises ValueError where the two differ."""
    said, path = dict(manifest.get("config", {})), directory / files.CONFIG
    if not path.is_file():
        return said
    content = files.read_json(path)
    more = content["config"] if isinstance(content.get("config"), dict) else content
    check_fields(directory / MANIFEST, said, path, more)
    return said | more
