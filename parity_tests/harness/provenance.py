"""Where a result comes from: the commit of the code that was compared, the time, and what of the case can be chosen."""

from __future__ import annotations

import functools
import inspect
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from .case import Case
from .regimes import chosen


def described(case: Case) -> dict:
    """Plain values for a report: seed, dtypes, regimes, time (UTC) and, where there is a repository, its commit."""
    record = {"seed": int(case.seed), "dtypes": list(case.dtypes), "regimes": [regime.name for regime in chosen(case.regimes)],
              "time": datetime.now(UTC).isoformat(timespec="seconds")}
    revision = commit(_folder(case))
    return record | ({"commit": revision} if revision else {})


def _folder(case: Case) -> Path:
    """The folder of the file that defines the case's inputs; the working directory where that is no file."""
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(case.inputs)) or "")
    except TypeError:
        return Path.cwd()
    return path.resolve().parent if path.is_file() else Path.cwd()


@functools.cache
def commit(folder: Path) -> str:
    """Commit of the repository that holds `folder`, with "+" when files that it tracks were changed; empty where there is none."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
