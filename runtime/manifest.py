"""What lies beside the weights of a WaveCore: `manifest.json`, which says what it is, and `proof_of_learning.json`, which says that it learned.

    manifest   version, type, created, model {type, architecture, param_count, embedding_model}, config, training {steps, final_loss, text_samples}
    proof      loss_before, loss_after, curve (the loss of every step), data, seed, and whatever else the run has to say
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conf.models import SizedWaveCoreConfig
from runtime import files
from runtime.arrays import parameter_count

MANIFEST = "manifest.json"
PROOF = "proof_of_learning.json"
VERSION = "1.0"
_TRAINING = {"steps": 0, "final_loss": None, "text_samples": 0}
_PROOF = ("loss_before", "loss_after", "curve", "data", "seed")


def manifest_text(config: SizedWaveCoreConfig, training: Mapping[str, Any] | None = None, embedding_model: str | None = None) -> str:
    """The content of `manifest.json`. training: some of steps, final_loss and text_samples; 0, null and 0 where it says nothing.

    Raises ValueError for other keys, for counts that are no whole numbers and for a loss that is not finite; TypeError for an
    `embedding_model` that is no str.
    """
    said = dict(training or {})
    unknown = [key for key in said if key not in _TRAINING]
    if unknown:
        raise ValueError(f"training must hold some of {', '.join(_TRAINING)}, found {', '.join(map(str, unknown))}")
    said = _TRAINING | said
    for key in ("steps", "text_samples"):
        if not _whole(said[key]):
            raise ValueError(f"training: {key} must be a whole number of at least 0, found {said[key]!r}")
    if said["final_loss"] is not None and not _finite(said["final_loss"]):
        raise ValueError(f"training: final_loss must be a finite number or None, found {said['final_loss']!r}")
    if embedding_model is not None and not isinstance(embedding_model, str):
        raise TypeError(f"embedding_model must be a str or None, found {type(embedding_model).__name__}")
    return _json({
        "version": VERSION,
        "type": "core_model",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "type": "wavecore",
            "architecture": "mamba_wave" if config.use_mamba_wave else "linear_wave",
            "param_count": parameter_count("wavecore", config),
            "embedding_model": embedding_model,
        },
        "config": dataclasses.asdict(config),
        "training": said,
    })


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file. FileNotFoundError where there is none; ValueError, naming it, for one that is not JSON or counts no parameters."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; a WaveCore's directory says in its {MANIFEST} what it holds")
    manifest = files.read_json(path)
    model = manifest.get("model")
    count = model.get("param_count") if isinstance(model, dict) else None
    if not _whole(count):
        raise ValueError(f"{path} must hold a whole number under model.param_count, found {count!r}")
    if not isinstance(manifest.get("config", {}), dict):
        raise ValueError(f"{path} must hold an object under config, found {type(manifest['config']).__name__}")
    return manifest


def check_count(path: Path, manifest: Mapping[str, Any], count: int) -> None:
    """Raise ValueError, naming both, unless the manifest read from `path` says that there are `count` parameters."""
    said = manifest["model"]["param_count"]
    if said != count:
        raise ValueError(f"{path} says param_count={said}, but the weights have {count} parameters")


def check_fields(path: Path, said: Mapping[str, Any], config_path: Path, held: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first, for a field that two descriptions of one model give differently. A list equals a tuple."""
    for key in said:
        if key in held and _plain(said[key]) != _plain(held[key]):
            raise ValueError(f"{path} says {key}={said[key]!r} where {config_path} says {held[key]!r}")


def proof_text(proof: Mapping[str, Any]) -> str:
    """The content of `proof_of_learning.json`. Raises ValueError for one that lacks an entry or holds what is no finite number or no JSON."""
    missing = [key for key in _PROOF if key not in proof]
    if missing:
        raise ValueError(f"proof must hold {', '.join(_PROOF)}; missing: {', '.join(missing)}")
    for key in ("loss_before", "loss_after"):
        if not _finite(proof[key]):
            raise ValueError(f"proof: {key} must be a finite number, found {proof[key]!r}")
    curve = proof["curve"]
    if not isinstance(curve, Sequence) or isinstance(curve, str) or not curve or not all(map(_finite, curve)):
        raise ValueError("proof: curve must be a list of finite numbers, one per step")
    if not _whole(proof["seed"]):
        raise ValueError(f"proof: seed must be a whole number of at least 0, found {proof['seed']!r}")
    try:
        return _json(dict(proof))
    except (TypeError, ValueError) as error:
        raise ValueError(f"proof must be plain JSON with finite numbers: {error}") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
