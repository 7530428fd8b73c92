"""One run per folder: RUN/run.lock holds process id and host of the run that writes there, and the system's lock on the file while it lives.

The system drops the lock of a process that ends in whatever way, so a file that is there and not locked is stale, and is taken over. The
file goes with the run; an open one is looked up again after locking, so that nobody holds a lock on a file that was deleted meanwhile.
On a file system without locks the process itself is looked up, and one on another host is taken to be alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from experiments.errors import RunError

LOCK = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """Held from `acquire` to `release`. `stale`: one line about the run that left the file behind, if one did."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.stale = ""
        self._file: int | None = None

    def acquire(self) -> RunLock:
        """Take the folder. Raises RunError, naming the run that has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                if not _locked(file):
                    refusal = _refusal(file, self.path.parent)
                    os.close(file)
                    raise refusal
                if _same(file, self.path):
                    break
                os.close(file)
            left = _owner(file)
            self.stale = f"took over from {left}, which ended without letting go" if left else ""
            os.ftruncate(file, 0)
            described = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            os.pwrite(file, (json.dumps(described) + "\n").encode(), 0)
        except OSError as error:
            raise RunError(f"run_dir: cannot lock {self.path}: {error.strerror or error}") from error
        self._file = file
        return self

    def release(self) -> None:
        """Let the folder go; a second call does nothing."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def check_free(folder: Path) -> None:
    """Raise RunError if a run is writing into `folder`, before anything is written there."""
    path = folder / LOCK
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return  # none, or one that `acquire` will name
    try:
        if not _locked(file):
            raise _refusal(file, folder)
    finally:
        os.close(file)  # and with it the lock


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _alive(file)
    return True


def _alive(file: int) -> bool:
    """Whether the run that a lock file describes may still be there."""
    try:
        described: Any = json.loads(os.pread(file, 4096, 0))
        if described["host"] != platform.node():
            return True
        os.kill(int(described["pid"]), 0)
    except PermissionError:
        return True
    except (ValueError, KeyError, TypeError, ProcessLookupError):
        return False
    return True


def _refusal(file: int, folder: Path) -> RunError:
    return RunError(
        f"run_dir: {folder} is in use by {_owner(file) or 'another run'}; wait for it, or choose another folder; delete {LOCK} there if it is gone"
    )


def _same(file: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    """The run that a lock file describes; an empty string for an empty file."""
    text = os.pread(file, 4096, 0).decode("utf-8", "replace").strip()
    if not text:
        return ""
    try:
        described: Any = json.loads(text)
        return f"process {described['pid']} on {described['host']} since {described['since']}"
    except (ValueError, KeyError, TypeError):
        return "a run whose lock file cannot be read"
