"""What LAM takes from a BERT: every array accounted for by name, the rest of the checkpoint refused."""

import json
import sys

import numpy as np
import pytest

from conf.models import LamConfig
from runtime.arrays import layout
from runtime.teacher import read_teacher


@pytest.fixture
def teacher(tmp_path, make_teacher):
    return make_teacher(tmp_path)


def rewrite(directory, change):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(directory / "model.safetensors")
    change(arrays)
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})


def test_embeddings_feed_forwards_and_norms(tmp_path, teacher):
    config, taken = read_teacher(tmp_path)
    assert config == LamConfig(vocab_size=61, dim=30, heads=3, depth=2, ffn_dim=23, max_positions=13, gelu_repeats=1)
    assert len(taken) == 5 + 2 * 8  # and 5 + 6 * 8 = 53 of MiniLM's
    assert taken.keys() == {name for name in layout("lam", config) if ".delta." not in name}
    for ours, theirs in (
        ("word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("position_embeddings.weight", "embeddings.position_embeddings.weight"),
        ("token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
        ("embedding_norm.bias", "embeddings.LayerNorm.bias"),
        ("blocks.1.norm_delta.weight", "encoder.layer.1.attention.output.LayerNorm.weight"),
        ("blocks.1.ffn_in.weight", "encoder.layer.1.intermediate.dense.weight"),
        ("blocks.0.ffn_out.weight", "encoder.layer.0.output.dense.weight"),
        ("blocks.0.norm_ffn.bias", "encoder.layer.0.output.LayerNorm.bias"),
    ):
        assert taken[ours].dtype == np.float32 and np.array_equal(taken[ours], teacher[theirs])


def test_reading_leaves_torch_as_it_was(tmp_path, teacher):
    import torch
    from transformers.utils import logging

    before = torch.random.get_rng_state(), logging.is_progress_bar_enabled()
    rewrite(tmp_path, lambda arrays: arrays.pop("pooler.dense.weight"))  # transformers draws it anew
    read_teacher(tmp_path)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == logging.is_progress_bar_enabled()


def test_old_position_ids_and_pretraining_heads_are_known(tmp_path, make_teacher):
    arrays = make_teacher(tmp_path, "BertForPreTraining")
    assert "cls.seq_relationship.bias" in arrays
    rewrite(tmp_path, lambda held: held.update({"bert.embeddings.position_ids": np.arange(13)[None]}))
    taken = read_teacher(tmp_path)[1]
    assert np.array_equal(taken["blocks.1.ffn_out.bias"], arrays["bert.encoder.layer.1.output.dense.bias"])


def test_other_precisions_become_float32(tmp_path, teacher):
    rewrite(tmp_path, lambda arrays: arrays.update({key: value.astype(np.float16) for key, value in arrays.items()}))
    taken = read_teacher(tmp_path)[1]
    assert all(value.dtype == np.float32 for value in taken.values())
    assert np.array_equal(taken["word_embeddings.weight"], teacher["embeddings.word_embeddings.weight"].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("encoder.layer.1.output.dense.bias"), r"missing: encoder\.layer\.1\.output\.dense\.bias$"),
    (lambda arrays: arrays.update({"encoder.layer.0.adapter.weight": np.zeros(3, np.float32)}), r"unknown: encoder\.layer\.0\.adapter\.weight$"),
    (lambda arrays: arrays.update({"embeddings.LayerNorm.bias": np.zeros(7, np.float32)}), r"of another shape: .*embeddings\.LayerNorm\.bias"),
])
def test_arrays_that_do_not_fit(tmp_path, teacher, change, message):
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=rf"the arrays of the teacher .* do not fit: .*{message}"):
        read_teacher(tmp_path)


@pytest.mark.parametrize("field, value", [("model_type", "roberta"), ("hidden_act", "relu"), ("type_vocab_size", 5)])
def test_another_architecture(tmp_path, teacher, field, value):
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"must be a BERT with model_type='bert', .*, found {field}={value!r}"):
        read_teacher(tmp_path)


def test_truncated_and_missing_files(tmp_path, teacher):
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"the weights of the teacher .* are truncated or altered"):
        read_teacher(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        read_teacher(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        read_teacher(tmp_path)


def test_without_transformers(tmp_path, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs PyTorch and transformers: pip install torch transformers"):
        read_teacher(tmp_path)
