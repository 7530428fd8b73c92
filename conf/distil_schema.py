"""Schemas of `distil.yaml` and `commands/evaluate/evaluate.yaml`: one dataclass for each section, as in `conf.schema`. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from conf.models import MINILM_PACKAGE, MINILM_SHA256, between, choice, whole
from conf.schema import BACKENDS, PARTS, CheckpointConfig, TrackerConfig

LAM_TASKS = ("sts", "documents")
TASKS = (*LAM_TASKS, "validate", "checklist", "long_context")
EVALUATION_BACKENDS = ("cython", "torch", "jax")
_HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class TeacherConfig:
    """The encoder to learn from: a local folder that transformers reads, or (`path` null) the one that an installed package carries.

    The weight file of the package must have the sha256 `package_sha256`, that of a local folder `sha256` where one is given.
    """

    path: str | None = None
    sha256: str | None = None
    package: str = MINILM_PACKAGE
    package_sha256: str = MINILM_SHA256
    max_tokens: int = 512  # the checkpoint's own files say 128, 256 and 512; its position table has 512 rows

    def __post_init__(self) -> None:
        whole(self, max_tokens=3)
        if self.path is not None and not self.path:
            raise ValueError("path must name a folder, found an empty string")
        for name in ("sha256", "package_sha256"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 64 and set(value) <= _HEX):
                raise ValueError(f"{name} must be 64 hexadecimal digits, found {value!r}")
        if self.sha256 is not None and self.path is None:
            raise ValueError("sha256 is for a local path; that of the package is package_sha256")


@dataclass(frozen=True)
class DistilDataConfig:
    """Texts of a distillation. Sentences: those of the file `sentences` first, then of the text corpus, `count` in all.

    Passages of `passage_min` to `passage_max` tokens make up `passage_share` of the training tokens; `joined_share` of them are
    sentences of the file in random order, where there is one, the rest is running text of the corpus.
    """

    path: str | None = None
    parts: list[str] = field(default_factory=lambda: ["topics", "docstrings"])
    validation_fraction: float = 0.1  # of the corpus, by file; of a file of sentences as many as are evaluated
    sentences: str | None = None
    count: int = 12000
    passage_share: float = 0.3
    passage_min: int = 65
    passage_max: int = 512
    joined_share: float = 0.5
    cache_dir: str = "runs/cache"

    def __post_init__(self) -> None:
        whole(self, count=1, passage_min=3, passage_max=3)
        between(self, "validation_fraction", 0.0, 0.5, ends="(]")
        between(self, "passage_share", 0.0, 1.0, ends="[)")
        between(self, "joined_share", 0.0, 1.0, ends="[]")
        if self.passage_min > self.passage_max:
            raise ValueError(f"passage_min must be at most passage_max, found {self.passage_min} and {self.passage_max}")
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or (self.path is None and not self.parts):
            raise ValueError(f"parts must name some of {', '.join(PARTS)}, found {list(self.parts)}")
        for name in ("path", "sentences"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"{name} must name a file, found an empty string")


@dataclass(frozen=True)
class DistilOptimiserConfig:
    """AdamW with two rates: DeltaNet layers, which start at random, and the feed-forwards and norms of the teacher.

    Weight decay is on matrices alone. `train_embeddings` moves the tables and their norm too, at the second rate.
    """

    delta_rate: float = 1e-3
    teacher_rate: float = 2e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 100
    floor: float = 0.02
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("delta_rate", "eps", "clip_norm"):
            between(self, name, 0.0, math.inf)
        for name in ("teacher_rate", "weight_decay"):
            between(self, name, 0.0, math.inf, ends="[)")
        between(self, "beta1", 0.0, 1.0, ends="[)")
        between(self, "beta2", 0.0, 1.0, ends="[)")
        between(self, "floor", 0.0, 1.0, ends="[]")
        whole(self, warmup=0)


@dataclass(frozen=True)
class DistilLossConfig:
    """Weights of the relative squared error of the hidden states and of 1 - cosine of the embeddings."""

    hidden: float = 1.0
    embedding: float = 2.0

    def __post_init__(self) -> None:
        between(self, "hidden", 0.0, math.inf, ends="[)")
        between(self, "embedding", 0.0, math.inf, ends="[)")
        if not self.hidden and not self.embedding:
            raise ValueError("hidden and embedding must not both be 0")


@dataclass(frozen=True)
class DistilTrainingConfig:
    """Passes over the texts in batches of at most `batch_tokens` tokens, padding included. `stop_at` ends a run early, schedule unchanged."""

    epochs: int = 2
    stop_at: int | None = None
    batch_tokens: int = 768
    log_every: int = 10

    def __post_init__(self) -> None:
        whole(self, epochs=1, batch_tokens=1, log_every=1)
        if self.stop_at is not None:
            whole(self, stop_at=1)


@dataclass(frozen=True)
class DistilEvaluationConfig:
    """Held-out texts, the STS file `sts` (sentence, sentence, score) if any, and passages cut to `lengths` tokens."""

    every: int = 400
    sts: str | None = None
    sentences: int = 256
    passages: int = 24
    lengths: list[int] = field(default_factory=lambda: [256, 512])
    batch_size: int = 32

    def __post_init__(self) -> None:
        whole(self, every=1, sentences=1, passages=0, batch_size=1)
        if not self.lengths or any(length < 3 for length in self.lengths):
            raise ValueError(f"lengths must hold numbers of tokens of at least 3, found {list(self.lengths)}")
        if self.sts is not None and not self.sts:
            raise ValueError("sts must name a CSV file, found an empty string")


@dataclass(frozen=True)
class DistilConfig:
    """Root of `distil.yaml`."""

    seed: int = 0
    threads: int | None = None  # None: all that torch finds
    output_dir: str = "runs"
    run_dir: str | None = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DistilDataConfig = field(default_factory=DistilDataConfig)
    optimiser: DistilOptimiserConfig = field(default_factory=DistilOptimiserConfig)
    loss: DistilLossConfig = field(default_factory=DistilLossConfig)
    training: DistilTrainingConfig = field(default_factory=DistilTrainingConfig)
    evaluation: DistilEvaluationConfig = field(default_factory=DistilEvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        whole(self, seed=0)
        if self.threads is not None:
            whole(self, threads=1)
        if self.teacher.max_tokens < max(self.data.passage_max, *self.evaluation.lengths):
            raise ValueError(
                f"teacher.max_tokens must be at least data.passage_max and evaluation.lengths, found {self.teacher.max_tokens}, "
                f"{self.data.passage_max} and {list(self.evaluation.lengths)}"
            )
        if self.training.batch_tokens < self.teacher.max_tokens:
            raise ValueError(
                f"training.batch_tokens must be at least teacher.max_tokens, found {self.training.batch_tokens} and {self.teacher.max_tokens}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Root of `evaluate.yaml`. `model`: for `LAM_TASKS` the folder of a saved LAM or "teacher", for the others a run or one of its checkpoints.

    What is null is chosen by the task: `backend` the compiled engine for a LAM and that of the run for a language model, `lengths` the task's
    own. `path` is the CSV of sts; for a language model, text in place of what the run was trained on, split in the same way.
    """

    task: str = "sts"
    path: str | None = None
    model: str | None = None
    backend: str | None = None
    batch_size: int = 32
    max_tokens: int = 512
    lengths: list[int] | None = None  # of documents or streams, in tokens
    tokens: int = 131072  # held-out tokens that a language model is validated on
    puzzles: int = 512  # of each task of reasoning
    repeats: int = 100  # calls whose variance the checklist takes
    threads: int | None = None
    output_dir: str = "runs"
    run_dir: str | None = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    tracker: TrackerConfig = field(default_factory=lambda: TrackerConfig(name="none", artifacts="none"))

    def __post_init__(self) -> None:
        choice(self, "task", TASKS)
        if self.backend is not None:
            choice(self, "backend", EVALUATION_BACKENDS if self.task in LAM_TASKS else (*BACKENDS, *(["cython"] if self.task == "checklist" else [])))
        whole(self, batch_size=1, max_tokens=3, tokens=2, puzzles=2, repeats=2)
        if self.threads is not None:
            whole(self, threads=1)
        if self.lengths is not None and (not self.lengths or any(length < 3 for length in self.lengths)):
            raise ValueError(f"lengths must hold numbers of tokens of at least 3, found {list(self.lengths)}")
        if self.task == "sts" and not self.path:
            raise ValueError(f"path must name a CSV file of (sentence, sentence, score), found {self.path!r}; give path=FILE")
        if not self.model and self.task in LAM_TASKS:
            raise ValueError(f"model must be the folder of a saved LAM or 'teacher', found {self.model!r}; give model=FOLDER or model=teacher")
        if not self.model:
            raise ValueError(f"model must be the folder of a run or of a checkpoint, found {self.model!r}; give model=FOLDER")
