"""What LAM takes from a BERT checkpoint: embeddings, feed-forwards and norms; 53 of the 104 arrays of all-MiniLM-L6-v2.

Attention and pooler are known and left: copying attention's projections measured worse than drawing DeltaNet's at random.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from conf.models import LamConfig
from runtime.arrays import layout, shorten
from runtime.encoders import quiet
from runtime.public import LAM_UNUSED, TEACHER, lam_name

_HEADS = re.compile(r"cls\.(predictions|seq_relationship)\..+")  # of BERT's pretraining
_NEEDED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": 2}


def read_teacher(path: Path) -> tuple[LamConfig, dict[str, np.ndarray]]:
    """LAM's configuration for the BERT checkpoint in directory `path`, and what it takes of it: float32, under our names.

    Nothing is downloaded. Raises ValueError, naming what was found, for another architecture and for arrays that are unknown, missing or
    of another shape; FileNotFoundError for a directory without a config.json; ImportError where transformers or torch is missing.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json, so it is no checkpoint that transformers reads")
    try:
        import torch
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ImportError(f"reading the teacher {path} needs PyTorch and transformers: pip install torch transformers") from error
    bert = AutoConfig.from_pretrained(path, local_files_only=True)
    wrong = [f"{name}={getattr(bert, name, value)!r}" for name, value in _NEEDED.items() if getattr(bert, name, value) != value]
    if wrong:
        expected = ", ".join(f"{name}={value!r}" for name, value in _NEEDED.items())
        raise ValueError(f"the teacher {path} must be a BERT with {expected}, found {', '.join(wrong)}")
    config = LamConfig(
        vocab_size=bert.vocab_size, dim=bert.hidden_size, heads=bert.num_attention_heads, depth=bert.num_hidden_layers,
        ffn_dim=bert.intermediate_size, max_positions=bert.max_position_embeddings, gelu_repeats=1, norm_eps=bert.layer_norm_eps,
    )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, loading = AutoModel.from_pretrained(
                path, config=bert, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of the teacher {path} are truncated or altered: {error}") from error
    held = model.state_dict()
    names = {lam_name(name).removeprefix(TEACHER): name for name in layout("lam", config) if ".delta." not in name}
    problems = {
        "missing": [key for key in names if key not in held or key in loading["missing_keys"]],
        "unknown": [key for key in (*held, *sorted(loading["unexpected_keys"])) if key not in names and not _unused(key)],
        "of another shape": [str(key) for key in loading["mismatched_keys"]],
    }
    if any(problems.values()):
        raise ValueError(f"the arrays of the teacher {path} do not fit: " + "; ".join(f"{k}: {shorten(v)}" for k, v in problems.items() if v))
    return config, {name: held[key].float().numpy() for key, name in names.items()}


def _unused(key: str) -> bool:
    return bool(LAM_UNUSED.fullmatch(TEACHER + key) or _HEADS.fullmatch(key))
