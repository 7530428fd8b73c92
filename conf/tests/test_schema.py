"""The schemas refuse impossible values and name the field, without Hydra."""

from __future__ import annotations

from typing import Any

import pytest

from conf import schema
from conf.baselines import GruConfig, TransformerConfig
from conf.models import GroundedMambaConfig


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (schema.BackendConfig, {"name": "numpy"}, "name must be one of"),
        (schema.BackendConfig, {"dtype": "float16"}, "dtype must be one of"),
        (schema.BackendConfig, {"threads": 0}, "threads must be an integer of at least 1"),
        (schema.DataConfig, {"vocab_size": 300}, "vocab_size must be 258 with tokenizer='bytes', found 300"),
        (schema.DataConfig, {"tokenizer": "bpe", "vocab_size": 200}, "vocab_size must be an integer of at least 258"),
        (schema.DataConfig, {"validation_fraction": 0.0}, "validation_fraction must lie in"),
        (schema.DataConfig, {"parts": ["novels"]}, "parts must name some of"),
        (schema.DataConfig, {"parts": []}, "parts must name some of"),
        (schema.DataConfig, {"path": ""}, "path must name a file"),
        (schema.GroupConfig, {"rate": -0.1}, "rate must lie in"),
        (schema.GroupConfig, {"weight_decay": float("nan")}, "weight_decay must lie in"),
        (schema.OptimiserConfig, {"rate": 0.0}, "rate must lie in"),
        (schema.OptimiserConfig, {"beta2": 1.0}, "beta2 must lie in"),
        (schema.OptimiserConfig, {"clip_norm": -1.0}, "clip_norm must lie in"),
        (schema.OptimiserConfig, {"warmup": -1}, "warmup must be an integer of at least 0"),
        (schema.LossConfig, {"state_penalty": ["ssm", "ssm"]}, "state_penalty must name each of"),
        (schema.LossConfig, {"smooth_weight": -1.0}, "smooth_weight must lie in"),
        (schema.TrainingConfig, {"batch_size": 6, "accumulation": 4}, "accumulation must divide batch_size"),
        (schema.TrainingConfig, {"context": 1}, "context must be an integer of at least 2"),
        (schema.TrainingConfig, {"stop_at": 0}, "stop_at must be an integer of at least 1"),
        (schema.TrainingConfig, {"precision": "float16"}, "precision must be one of 'full', 'bfloat16'"),
        (schema.EarlyStoppingConfig, {"patience": 0}, "patience must be an integer of at least 1"),
        (schema.EarlyStoppingConfig, {"min_delta": -0.1}, "min_delta must lie in"),
        (schema.DebugConfig, {"target": 0.0}, "target must lie in"),
        (schema.DebugConfig, {"profile_steps": -1}, "profile_steps must be an integer of at least 0"),
        (schema.RateFinderConfig, {"low": 2.0, "high": 1.0}, "low must be below high, found low=2.0 and high=1.0"),
        (schema.RateFinderConfig, {"steps": 9}, "steps must be an integer of at least 10"),
        (schema.RateFinderConfig, {"smoothing": 1.0}, "smoothing must lie in"),
        (schema.SweepConfig, {"trials": 0}, "trials must be an integer of at least 1"),
        (schema.SweepConfig, {"sampler": "grid"}, "sampler must be one of 'tpe', 'random'"),
        (schema.EvaluationConfig, {"lengths": []}, "lengths must hold positive numbers"),
        (schema.EvaluationConfig, {"top_k": 0}, "top_k must be an integer of at least 1"),
        (schema.EvaluationConfig, {"context_shift": 1.1}, "context_shift must lie in"),
        (schema.UnfreezeConfig, {"method": "melt"}, "method must be one of 'none', 'soft_reset'"),
        (schema.UnfreezeConfig, {"noise": -0.1}, "noise must lie in"),
        (schema.RecoveryConfig, {"skip_factor": 0.0}, "skip_factor must lie in"),
        (schema.RecoveryConfig, {"rollback_factor": 1.5}, "rollback_factor must lie in"),
        (schema.RecoveryConfig, {"explosion": 1.0}, "explosion must lie in"),
        (schema.RecoveryConfig, {"floor": 0.0}, "floor must lie in"),
        (schema.RecoveryConfig, {"good_states": 0}, "good_states must be an integer of at least 1"),
        (schema.RecoveryConfig, {"minimum": 60}, "minimum must be at most window, found minimum=60 and window=50"),
        (schema.MonitorsConfig, {"state_low": 20.0}, "state_low < state_high <= state_warn must hold"),
        (schema.MonitorsConfig, {"opposed": 0.5}, "opposed must lie in"),
        (schema.MonitorsConfig, {"opposed_looks": 0}, "opposed_looks must be an integer of at least 1"),
        (schema.MonitorsConfig, {"dying": 1.0}, "dying must lie in"),
        (schema.MonitorsConfig, {"alert": -1}, "alert must be an integer of at least 0"),
        (schema.MonitorsConfig, {"drift_tokens": 1000}, "drift_tokens must hold at least two chunks"),
        (schema.CheckpointConfig, {"keep": 0}, "keep must be an integer of at least 1"),
        (schema.TrackerConfig, {"mode": "sometimes"}, "mode must be one of"),
        (schema.TrackerConfig, {"artifacts": "some"}, "artifacts must be one of"),
        (schema.TrainConfig, {"architecture": "lstm"}, "architecture must be one of"),
        (schema.TrainConfig, {"architecture": "transformer"}, "loss.state_penalty of transformer may name nothing, found"),
        (TransformerConfig, {"dim": 97}, "dim must be divisible by heads, found dim=97 and heads=4"),
        (TransformerConfig, {"dim": 12}, "dim must give heads of an even width for rotary positions, found dim=12 and heads=4"),
        (TransformerConfig, {"window": 0}, "window must be an integer of at least 1"),
        (TransformerConfig, {"rope_base": 1.0}, "rope_base must lie in"),
        (GruConfig, {"depth": 0}, "depth must be an integer of at least 1"),
        (GruConfig, {"norm_eps": 0.0}, "norm_eps must lie in"),
        (schema.TrainConfig, {"seed": -1}, "seed must be an integer of at least 0"),
        (schema.TrainConfig, {"resume": "maybe"}, "resume must be one of"),
        (schema.TrainConfig, {"loss": schema.LossConfig(state_penalty=["S"])}, "loss.state_penalty of grounded_mamba may name ssm, wkv, found"),
        (schema.TrainConfig, {"model": GroundedMambaConfig(vocab_size=100)}, "model.vocab_size must be at least data.vocab_size"),
    ],
)
def test_impossible_value_is_refused_by_name(kind: type, fields: dict[str, Any], message: str) -> None:
    kind()  # the defaults are possible
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_stop_at_ends_early_and_never_late() -> None:
    assert schema.TrainingConfig(steps=9).last_step == 9
    assert schema.TrainingConfig(steps=9, stop_at=4).last_step == 4
    assert schema.TrainingConfig(steps=9, stop_at=40).last_step == 9
