"""Files of named arrays: every format there and back, transposed views included, and one clear line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from parity_tests.harness.formats import FormatError, load, save

ARRAYS = {"a.kernel": np.arange(15.0).reshape(3, 5).T, "n": np.array(3, np.int64), "f": np.arange(7, dtype=np.float32)}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    if suffix == ".pt":
        pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    save(path, ARRAYS)
    back = load(path)
    assert set(back) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert back[name].dtype == value.dtype and np.array_equal(back[name], value)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_torch_reads_the_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    save(tmp_path / "w.safetensors", ARRAYS)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a.kernel"], torch.from_numpy(np.ascontiguousarray(ARRAYS["a.kernel"])))


def shards(folder: Path, table: dict[str, str]) -> Path:
    for shard in set(table.values()):
        save_file({name: np.ascontiguousarray(ARRAYS[name]) for name, place in table.items() if place == shard}, folder / shard)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": table}))
    return path


def test_shards_by_index_or_by_folder(tmp_path: Path) -> None:
    path = shards(tmp_path, {"a.kernel": "model-1.safetensors", "n": "model-2.safetensors", "f": "model-2.safetensors"})
    for place in (path, tmp_path):
        assert np.array_equal(load(place)["a.kernel"], ARRAYS["a.kernel"]) and set(load(place)) == set(ARRAYS)


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    path = shards(tmp_path, {"a.kernel": "model-1.safetensors", "n": "model-2.safetensors"})
    path.write_text(json.dumps({"weight_map": {"a.kernel": "model-1.safetensors"}}).replace("a.kernel", "other"))
    with pytest.raises(FormatError, match="other arrays than its index says"):
        load(path)
    path.write_text(json.dumps({"weight_map": {"a.kernel": "../model-1.safetensors"}}))
    with pytest.raises(FormatError, match="expected a file beside it"):
        load(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(FormatError, match="cannot be read"):
        load(tmp_path / "w.npz")


def test_pt_files_hold_tensors_only(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3), "b": 3}, tmp_path / "w.pt")
    with pytest.raises(FormatError, match="expected a flat dict of named tensors"):
        load(tmp_path / "w.pt")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("missing.npz", None, "does not exist"), ("w.txt", b"", "unknown format"), ("w.safetensors", b"short", "cannot be read"),
    ("w.npz", b"no archive", "cannot be read"), ("w.pt", b"no archive", "cannot be read"),
])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=words) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown format"):
        save(tmp_path / "w.txt", ARRAYS)
    with pytest.raises(FormatError, match="cannot be written"):
        save(tmp_path / "missing" / "w.npz", ARRAYS)
    with pytest.raises(FormatError, match="holds 0 safetensors"):
        load(tmp_path)
