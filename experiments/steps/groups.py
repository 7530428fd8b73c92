"""Which AdamW group a parameter belongs to, by its torch name; the same for both frameworks."""

from __future__ import annotations

GROUPS = ("ssm", "rwkv", "norm", "other")
_NORMS = frozenset((
    "ln_ssm", "ln_rwkv", "ln_out", "state_norm", "readout_norm", "norm_delta", "norm_attention", "norm_gru", "norm_ffn", "norm", "o_norm"))


def group_of(name: str) -> str:
    """Group of the parameter `name`: norms first, wherever they sit; then the branches; then the rest."""
    parts = set(name.split("."))
    if parts & _NORMS:
        return "norm"
    return "ssm" if "ssm" in parts else "rwkv" if "rwkv" in parts else "other"
