"""Schema of `comparison`: the models and seeds that `experiment=compare` trains on the same text, and what it measures. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from conf.models import whole


@dataclass(frozen=True)
class ComparisonConfig:
    """Nothing is compared while `models` is empty.

    `models` names model groups, each with fields of its model behind it: "gru_tiny", "deltanet_lm_tiny model.dim=80". With `pilot_rates` each
    model is first trained for `pilot_steps` steps at every one of them, on a seed of their own, and goes on with the best of them; without,
    all take optimiser.rate.
    """

    models: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    pilot_rates: list[float] = field(default_factory=list)
    pilot_steps: int = 200
    generated_tokens: int = 256
    memory_tokens: int = 16384
    puzzles: int = 512  # of either task, when it is scored
    puzzle_steps: int = 300  # of training on the puzzles themselves, after the text; 0: none
    puzzle_batch: int = 32

    def __post_init__(self) -> None:
        whole(self, pilot_steps=1, generated_tokens=1, memory_tokens=1, puzzles=2, puzzle_steps=0, puzzle_batch=1)
        labels = [text.split()[0] if text.split() else "" for text in self.models]
        if "" in labels or len(set(labels)) != len(labels):
            raise ValueError(f"models must each begin with the name of a group of its own, found {list(self.models)}")
        for text in self.models:
            for item in text.split()[1:]:
                if not item.startswith("model."):
                    raise ValueError(f"models: only fields of the model may stand behind a group, as in 'gru_tiny model.dim=96', found {item!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must hold different integers of at least 0, found {list(self.seeds)}")
        if len(set(self.pilot_rates)) != len(self.pilot_rates) or not all(0 < rate < math.inf for rate in self.pilot_rates):
            raise ValueError(f"pilot_rates must hold different positive numbers, found {list(self.pilot_rates)}")
