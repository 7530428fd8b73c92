"""Where a run is logged besides its own folder: W&B, offline by default, or nothing.

Whatever goes wrong in a tracker is said once, as a warning, and the run goes on without it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import TrackerConfig

# Every place that W&B writes to, below the run's folder; artifacts would else be staged in the user's cache.
_PLACES = {
    "WANDB_DIR": "", "WANDB_DATA_DIR": "wandb/data", "WANDB_CACHE_DIR": "wandb/cache", "WANDB_CONFIG_DIR": "wandb/config",
    "WANDB_ARTIFACT_DIR": "wandb/artifacts",
}


class Tracker:
    """Logs nothing. `run_id` identifies the run to the tracker, for a resumed run to go on under it."""

    run_id: str | None = None
    folder: Path | None = None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers at a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table at a step."""

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture file at a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """Text at a step."""

    def html(self, name: str, page: str, step: int) -> None:
        """A page that needs nothing else, at a step."""

    def artifact(self, name: str, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """A file or folder, copied."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Numbers about the whole run."""

    def finish(self) -> None:
        """Nothing more will be logged."""


class WandbTracker(Tracker):
    """W&B in `run_dir`/wandb. The first failure warns; nothing is sent to W&B after it."""

    def __init__(
        self, config: TrackerConfig, run_dir: Path, *, settings: Mapping[str, Any], name: str, group: str | None, tags: Sequence[str],
        run_id: str | None,
    ) -> None:
        """`settings` is the run's whole configuration; `run_id` that of the run to go on with, or None."""
        self._config, self._run_dir = config, run_dir
        self._run: Any = None
        self._wandb: Any = None
        self._places: dict[str, str | None] = {}
        self._guard(lambda: self._start(dict(settings), name, config.group or group, list(tags), run_id))

    def _start(self, settings: dict[str, Any], name: str, group: str | None, tags: list[str], run_id: str | None) -> None:
        for variable, place in _PLACES.items():
            self._places[variable] = os.environ.get(variable)
            os.environ[variable] = str(self._run_dir / place)
            (self._run_dir / place).mkdir(parents=True, exist_ok=True)
        self._places["WANDB_SILENT"] = os.environ.get("WANDB_SILENT")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            dir=str(self._run_dir),
            config=settings,
            name=name,
            group=group,
            tags=tags,
            id=run_id,
            resume="allow" if run_id else None,
            settings=self._wandb.Settings(x_transaction_log_flush_interval=1.0, silent=True, console="off", init_timeout=30),
        )
        self.run_id = self._run.id
        if self._config.mode != "disabled":
            self.folder = Path(self._run.settings.sync_dir)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker may fail in any way, and none of them may stop a training run
            self._run = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            warnings.warn(f"W&B failed and is left out from here on: {reason}", RuntimeWarning, stacklevel=3)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log(dict(values), step=step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step))

    def image(self, name: str, path: Path, step: int) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({name: self._wandb.Image(str(path))}, step=step))

    def text(self, name: str, text: str, step: int) -> None:
        self.table(name, ["step", "text"], [[step, text]], step)

    def html(self, name: str, page: str, step: int) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({name: self._wandb.Html(page, inject=False)}, step=step))

    def artifact(self, name: str, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        def add() -> None:
            artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
            if path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path))
            self._run.log_artifact(artifact)

        if self._run is not None:
            self._guard(add)

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.summary.update(dict(values)))

    def finish(self) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.finish())
            self._guard(lambda: self._wandb.teardown())  # its service keeps the places of the run that started it
        self._run = None
        for variable, value in self._places.items():  # the next run of a sweep has a folder of its own
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        self._places = {}


def make(
    config: TrackerConfig, run_dir: Path, *, settings: Mapping[str, Any], name: str, group: str | None, tags: Sequence[str], run_id: str | None
) -> Tracker:
    """The tracker of the configuration."""
    if config.name == "none":
        return Tracker()
    return WandbTracker(config, run_dir, settings=settings, name=name, group=group, tags=tags, run_id=run_id)
