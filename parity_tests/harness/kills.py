"""What became of injected bugs, counted: how many were noticed, located, named, and how many cosine >= 0.99 alone would have noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .compare import RULES
from .mutate import Mutation

UNSEEN = "not seen while tuning"


@dataclass(frozen=True)
class Kills:
    """Counts of mutations. `known` are those that have a family to be named by, `diagnosed` those of them that were given it first."""

    count: int
    killed: int
    located: int
    cosine_alone: int
    diagnosed: int
    known: int

    @classmethod
    def of(cls, found: Iterable[Mutation]) -> Kills:
        """The counts of some mutations."""
        found = list(found)
        named = [item.named for item in found if item.named is not None]
        return cls(len(found), sum(item.detected for item in found), sum(item.held for item in found), sum(item.cosine_alone for item in found),
                   sum(named), len(named))

    def __str__(self) -> str:
        named = f", named right {self.diagnosed} of {self.known}" if self.known else ""
        return f"killed {self.killed} of {self.count}, located {self.located} of {self.count}{named}; " \
               f"cosine >= 0.99 alone notices {self.cosine_alone} of {self.count}"


@dataclass(frozen=True)
class Row:
    """A line of the kill matrix. `marks` has every rule of the verdict by number, and whether it was broken where the run ended."""

    item: Mutation
    marks: tuple[tuple[int, bool], ...]

    @property
    def numbers(self) -> str:
        """The broken rules, "2, 10"."""
        return ", ".join(str(number) for number, broken in self.marks if broken)


def matrix(found: Sequence[Mutation]) -> list[Row]:
    """The kill matrix: survivors first, then what was located elsewhere, then the others in the order in which they were injected."""
    rows = [Row(item, tuple((number, any(rule.partition(" ")[0] == str(number) for rule in item.rules)) for number in RULES)) for item in found]
    return sorted(rows, key=lambda row: (row.item.detected, row.item.held))


def parts(found: Sequence[Mutation]) -> list[tuple[str, list[Mutation]]]:
    """The mutations that were seen while tuning, under no heading, and those that were not, apart; empty parts are left out."""
    split = (("", [item for item in found if not item.unseen]), (UNSEEN, [item for item in found if item.unseen]))
    return [(heading, part) for heading, part in split if part]
