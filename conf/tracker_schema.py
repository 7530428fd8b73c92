"""Schema of `tracker`: where a run is logged besides its own folder. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.models import choice

TRACKERS = ("wandb", "none")
TRACKER_MODES = ("offline", "online", "disabled")
ARTIFACTS = ("none", "final", "all")


@dataclass(frozen=True)
class TrackerConfig:
    """Where the run is logged besides its own folder. `artifacts`: which checkpoints are copied into W&B."""

    name: str = "wandb"
    mode: str = "offline"
    project: str = "groundwave"
    entity: str | None = None
    group: str | None = None
    artifacts: str = "final"

    def __post_init__(self) -> None:
        choice(self, "name", TRACKERS)
        choice(self, "mode", TRACKER_MODES)
        choice(self, "artifacts", ARTIFACTS)
