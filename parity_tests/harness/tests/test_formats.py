"""Files of named arrays: every format there and back, transposed views included, and one clear line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from parity_tests.harness.formats import FormatError, load, save

ARRAYS = {"a.kernel": np.arange(15.0).reshape(3, 5).T, "n": np.array(3, np.int64), "f": np.arange(7, dtype=np.float32)}


NEEDS = {".pt": "torch", ".msgpack": "flax", ".orbax": "orbax.checkpoint", ".safetensors.index.json": "huggingface_hub"}
SUFFIXES = (".safetensors", ".safetensors.index.json", ".npz", ".pt", ".msgpack", ".orbax")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_there_and_back(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if suffix in NEEDS:
        pytest.importorskip(NEEDS[suffix])
    path = tmp_path / f"weights{suffix}"
    save(path, ARRAYS)
    back = load(path)
    assert set(back) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert back[name].dtype == value.dtype and np.array_equal(back[name], value) and back[name].flags.writeable
    beside = ["weights.safetensors"] if suffix.endswith(".json") else []
    assert sorted(item.name for item in tmp_path.iterdir()) == [*beside, path.name]
    if not beside:
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")  # a path is one of this folder, for Orbax too
        save(Path(f"again{suffix}"), back)
        assert {name: value.tobytes() for name, value in load(f"again{suffix}").items()} == {name: value.tobytes() for name, value in back.items()}


def test_shards_are_cut_as_the_hub_cuts_them(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    path = tmp_path / "model.safetensors.index.json"
    save(path, ARRAYS, shard_size=128)  # 120 + 8 bytes, then 28
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", path.name]
    index = json.loads(path.read_text())
    assert index["metadata"]["total_size"] == 156 and index["weight_map"]["f"] == "model-00002-of-00002.safetensors"
    for place in (path, tmp_path):
        back = load(place)
        assert {name: value.tobytes() for name, value in back.items()} == {name: np.ascontiguousarray(value).tobytes()
                                                                          for name, value in ARRAYS.items()}
    with pytest.raises(FormatError, match="cannot be written"):
        save(path, ARRAYS, shard_size="few")


def test_flax_reads_its_own_formats(tmp_path: Path) -> None:
    """What is written is what Flax's users have: a nested dict, which a Linen module is applied to and an NNX module updated from."""
    flax, nnx = pytest.importorskip("flax"), pytest.importorskip("flax.nnx")
    orbax = pytest.importorskip("orbax.checkpoint")
    save(tmp_path / "w.msgpack", {"params.proj.kernel": np.ones((2, 3))})
    held = flax.serialization.msgpack_restore((tmp_path / "w.msgpack").read_bytes())
    assert held["params"]["proj"]["kernel"].shape == (2, 3)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state(model))
    with orbax.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(7, args=orbax.args.StandardSave({"a": [np.arange(3), np.float32(2)]}))
    assert np.array_equal(load(tmp_path / "nnx")["kernel"], model.kernel.get_value())
    back = load(tmp_path / "steps" / "7")
    assert list(back) == ["a.0", "a.1"] and back["a.0"].tolist() == [0, 1, 2] and back["a.1"].dtype == np.float32
    (tmp_path / "half.msgpack").write_bytes(flax.serialization.msgpack_serialize({"h": model.kernel[...].astype("bfloat16")}))
    assert load(tmp_path / "half.msgpack")["h"].dtype == np.float32


@pytest.mark.parametrize(("name", "words"), [("w.msgpack", "'a' is an array and holds 'a.b'"), ("w.orbax", "'a' is an array and holds 'a.b'")])
def test_names_that_a_nested_dict_cannot_hold(tmp_path: Path, name: str, words: str) -> None:
    pytest.importorskip("orbax.checkpoint")
    with pytest.raises(FormatError, match=words):
        save(tmp_path / name, {"a": np.ones(1), "a.b": np.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    (tmp_path / "w.orbax").mkdir()
    with pytest.raises(FormatError, match="exists; an Orbax checkpoint is a folder, which is not written over"):
        save(tmp_path / "w.orbax", ARRAYS)
    (tmp_path / "w.orbax" / "_METADATA").write_text("nonsense")
    with pytest.raises(FormatError, match="cannot be read") as caught:
        load(tmp_path / "w.orbax")
    assert "\n" not in str(caught.value)


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
    ("w.msgpack", b"\xc1 nothing", "cannot be read as .msgpack: it is no msgpack of a nested dict"), ("w.msgpack", b"\x07", "it holds a int"),
    ("w.msgpack", b"\x81\xa1a\xa1b", "'a' is a str, expected an array"), ("x.safetensors.index.json", b"{}", "cannot be read"),
])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    for suffix in NEEDS:
        if name.endswith(suffix):
            pytest.importorskip(NEEDS[suffix])
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
    pytest.importorskip("orbax.checkpoint")
    for name in ("w.orbax", "w.msgpack", "w.safetensors.index.json"):
        with pytest.raises(FormatError, match="cannot be written"):
            save(tmp_path / "missing" / name, ARRAYS)
    with pytest.raises(FormatError, match="holds 0 safetensors"):
        load(tmp_path)
