"""What a distillation leaves to look at: the curve, and the table of student, teacher and what needs no student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.report import curve


def figure(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Loss by step, held-out error, and Spearman's correlation with the teacher's where there are pairs."""
    drawn = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.plot(*curve(rows, "train/loss"), linewidth=1, color="tab:gray", label="training loss")
    for kind, colour in (("sentences", "tab:blue"), ("passages", "tab:orange")):
        left.plot(*curve(rows, f"held_out/{kind}/hidden"), marker="o", markersize=3, color=colour, label=f"held-out {kind}, hidden states")
        right.plot(*curve(rows, f"held_out/{kind}/cosine"), marker="o", markersize=3, color=colour, label=f"cosine to the teacher, {kind}")
    left.set_yscale("log")
    right.plot(*curve(rows, "sts/spearman"), marker="s", markersize=3, color="tab:green", label="STS, Spearman")
    if "teacher" in scores:
        right.axhline(scores["teacher"]["spearman"], linestyle="--", linewidth=1, color="tab:green", label="STS, Spearman of the teacher")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return drawn


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Tables of `experiments.distil`'s summary."""
    if found["sts"]:
        table = Table(title="STS: correlation of cosines with scores")
        for name in ("model", "Spearman", "Pearson"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for name, scores in found["sts"].items():
            table.add_row(name, f"{scores['spearman']:.4f}", f"{scores['pearson']:.4f}")
        console.print(table)
    table = Table(title="Held-out text: student against teacher")
    for name in ("measure", "before", "after"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for key, before in found["before"].items():
        if key.startswith("sts/") or "/layer" in key:
            continue
        table.add_row(_words(key), f"{before:.4f}", f"{found['after'][key]:.4f}")
    console.print(table)
    console.print(
        f"{found['steps']} steps, {found['training_seconds']:.0f} s of training at {found['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {found['peak_megabytes']:.0f} MB",
        highlight=False,
    )


def _words(key: str) -> str:
    kind, *rest = key.split("/")
    if kind == "similarity":
        return f"mean cosine of embeddings, {rest[0]} tokens"
    return f"{rest[0]}, {'relative squared error of hidden states' if rest[1] == 'hidden' else 'mean cosine of embeddings'}"
