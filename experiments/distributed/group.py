"""What training asks of the processes that share it, whatever the framework; `Group` itself is one process alone.

Every process runs the same loop over the same global batches. Losses, gradients, the memory bank and what recovery decides are those of the
whole batch on all of them. Process 0 alone reads and writes the run's folder, logs and speaks: `share` hands the others what it found.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from conf.schema import TrainingConfig
from experiments.errors import EchoError, RunError

T = TypeVar("T")


class Group:
    """`rank` of `size` processes; `parts`: into how many parts a batch is divided, processes or devices."""

    name = "none"
    rank = 0
    size = 1
    parts = 1
    broken = False  # whether another process was lost, or this one leaves without the others knowing
    _told: BaseException | None = None  # the error that the others were sent

    @property
    def main(self) -> bool:
        """Whether this process reads, writes, logs and speaks."""
        return self.rank == 0

    def check(self, training: TrainingConfig) -> None:
        """Raise RunError unless every micro-batch can be divided among the parts."""
        if training.batch_size % (training.accumulation * self.parts):
            raise RunError(
                f"training.batch_size must be divisible by training.accumulation times the {self.parts} {self._parts_are}, "
                f"found batch_size={training.batch_size} and accumulation={training.accumulation}"
            )

    _parts_are = "processes"

    def describe(self) -> str:
        """For the environment that a checkpoint records: another number of parts sums in another order."""
        return self.processes()

    def processes(self) -> str:
        """Their number, in words."""
        return f"{self.size} processes" if self.size > 1 else "one process"

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, in all of them; a RunError there is one everywhere. Every process has to call it."""
        if self.size == 1:
            return make()
        if not self.main:
            with self.watched():
                value, problem = pickle.loads(self._send(None))
            if problem is not None:
                raise EchoError(problem)
            return value
        try:
            value, failed = make(), None
        except RunError as error:
            value, failed = None, error
            self._told = error
        with self.watched():
            self._send(pickle.dumps((value, None if failed is None else str(failed))))
        if failed is not None:
            raise failed
        return value

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Around what goes wrong with a RunError in every process or in none: process 0 says it."""
        try:
            yield
        except RunError as error:
            self._told = error
            if self.main or isinstance(error, EchoError):
                raise
            raise EchoError(str(error)) from error

    def same(self, what: str, value: object) -> None:
        """Raise RunError, in the process where it is so, unless `value` is process 0's."""
        expected = self.share(lambda: value)
        if value != expected:
            raise RunError(f"distributed: {what} is {value} here, {expected} in process 0; they must be the same")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the errors of a process that lost another into a RunError of one line; any error that is not everybody's breaks the group."""
        try:
            yield
        except BaseException as error:
            self.broken = self.broken or not (isinstance(error, EchoError) or error is self._told)
            # JAX makes a ValueError of what gloo says where a program is run at once.
            of_gloo = isinstance(error, ValueError) and "gloo" in str(error).lower()
            reason = self._lost(error) if of_gloo or isinstance(error, RuntimeError) else None
            if reason is None:
                raise
            raise RunError(f"distributed: another of the {self.size} processes ended or did not answer in time: {reason}") from error

    def close(self) -> None:
        """Leave the group."""

    def _send(self, message: bytes | None) -> bytes:
        """The message of process 0, which alone gives one."""
        raise NotImplementedError("one process has nobody to send to")

    def _lost(self, error: Exception) -> str | None:
        """What an error says about the connection to the others; None if it is about something else."""
        return None


ALONE = Group()
