"""The exceptions of this package that the command line turns into a single line and exit status 2."""

from __future__ import annotations


class RunError(Exception):
    """A run that cannot start or go on, for a reason that the user can act on; the message is one line."""


class EchoError(RunError):
    """A RunError of process 0, in the other processes of its group: it has been said."""
