"""Models on disk: what is refused, and that a kill leaves the old set or the new one."""

import io
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conf.models import GroundedMambaConfig
from runtime import checkpoint, files
from runtime.arrays import layout
from runtime.init import init_arrays

NAME = "grounded_mamba"
CONFIG = GroundedMambaConfig(vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, memory_size=7, retrieval_heads=3, dt_bias=(0.25,))


def arrays_of(seed):
    return init_arrays(NAME, CONFIG, seed)


def saved(directory, seed=3, **options):
    checkpoint.save_arrays(NAME, CONFIG, arrays_of(seed), directory, dtype="float64", **options)
    return directory


def assert_holds(directory, seed):
    name, config, arrays, dtype = checkpoint.load_arrays(directory)
    assert (name, config, dtype) == (NAME, CONFIG, "float64")
    expected = arrays_of(seed)
    assert arrays.keys() == expected.keys() - {"lm_head.weight"}
    for key, value in arrays.items():
        assert value.dtype == expected[key].dtype and value.tobytes() == expected[key].tobytes(), key


def reseal(directory, **changes):
    """Rewrite config.json to match the files as they are now, as somebody would who wants to deceive; `changes` go in besides."""
    path = directory / "config.json"
    description = {**json.loads(path.read_text()), **changes}
    for name in description["files"]:
        description["files"][name] = {"bytes": (directory / name).stat().st_size, "sha256": files.digest(directory / name)}
    path.write_text(json.dumps(description))


def test_round_trip_and_what_lies_there(tmp_path):
    directory = saved(tmp_path / "deep" / "model")
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert_holds(directory, 3)
    description = json.loads((directory / "config.json").read_text())
    assert description["parameters"] == sum(arrays_of(3)[k].size for k, e in layout(NAME, CONFIG).items() if e.role == "parameter")
    with open(directory / "model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert json.loads(file.read(length))["__metadata__"] == {"format": "pt"}


def test_arrays_that_are_not_contiguous(tmp_path):
    arrays = arrays_of(3)
    turned = {key: np.asfortranarray(value) if value.ndim else value for key, value in arrays.items()}
    turned["blocks.0.ssm.D"] = np.repeat(arrays["blocks.0.ssm.D"], 2)[::2]
    assert not turned["embedding.weight"].flags.c_contiguous and not turned["blocks.0.ssm.D"].flags.c_contiguous
    checkpoint.save_arrays(NAME, CONFIG, turned, tmp_path, dtype="float64")
    assert_holds(tmp_path, 3)
    files.write_arrays(tmp_path / "x.safetensors", {"turned": turned["embedding.weight"], "scalar": np.array(5)})
    again = load_file(tmp_path / "x.safetensors")
    assert np.array_equal(again["turned"], arrays["embedding.weight"]) and again["scalar"].shape == ()


@pytest.mark.parametrize("limit", [1, 1800, 5000])  # smaller than any array; than the largest; a few shards
def test_shards(tmp_path, limit):
    saved(tmp_path, shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit
        assert all(index["weight_map"][key] == shard for key in held)
    assert_holds(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path, seed=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert_holds(tmp_path, 8)


def test_a_kill_at_any_point_leaves_the_old_set_or_the_new(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    steps = {"replace": os.replace, "unlink": os.unlink, "fsync": os.fsync}
    countdown = [0]

    def dying(step):
        def call(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed
            return step(*arguments, **options)

        return call

    seen = set()
    for point in range(100):
        directory = saved(tmp_path / str(point), seed=3, shard_bytes=5000)
        with monkeypatch.context() as patch:
            for name, step in steps.items():
                patch.setattr(os, name, dying(step))
            countdown[0] = point
            try:
                saved(directory, seed=8, shard_bytes=[5000, 10**6][point % 2])
                finished = True
            except Killed:
                finished = False
        same = checkpoint.load_arrays(directory)[2]["embedding.weight"].tobytes()
        seed = 3 if same == arrays_of(3)["embedding.weight"].tobytes() else 8
        assert_holds(directory, seed)
        seen.add(seed)
        saved(directory, seed=11)
        assert_holds(directory, 11)
        assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
        if finished and point % 2 == 0:  # the longer of the two writes came through
            break
    assert finished and seen == {3, 8} and point > 20  # five shards, an index and config.json, each written, flushed and renamed


def test_truncated(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: it has \d+ bytes"):
        checkpoint.load_arrays(tmp_path)
    reseal(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        checkpoint.load_arrays(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        checkpoint.load_arrays(tmp_path)


def test_altered_by_one_bit_or_longer(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is altered: its sha256"):
        checkpoint.load_arrays(tmp_path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors is altered: it has"):
        checkpoint.load_arrays(tmp_path)


def test_missing_extra_and_misshapen_arrays(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    held = load_file(path)
    del held["blocks.1.gate_proj.bias"]
    held["blocks.7.ssm.A"] = np.zeros((5, 5))
    held["blocks.0.ssm.D"] = held["blocks.0.ssm.D"].astype(np.float32)
    save_file(held, path)
    reseal(tmp_path)
    with pytest.raises(ValueError, match="do not fit grounded_mamba") as caught:
        checkpoint.load_arrays(tmp_path)
    message = str(caught.value)
    assert "missing: blocks.1.gate_proj.bias" in message and "unused: blocks.7.ssm.A" in message
    assert "blocks.0.ssm.D is float32, expected float" in message


def test_sizes_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]

    def refuse(*_):
        raise AssertionError("an array was read")

    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    for change, message in (
        ({"config": {**config, "depth": 10**12}}, r"says depth=1000000000000, but the files hold \d+ arrays"),
        ({"config": {**config, "dim": 12 * 10**12}}, "wrong shape"),
        ({"parameters": 17}, r"says 17 parameters, the files hold \d+"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', found 'float16'"),
        ({"config": {**config, "ssm_dim": 2}}, r"config\.json: ssm_dim must be an integer of at least 4, found 2"),
        ({"config": {**config, "width": 2}}, r"unknown fields \['width'\]"),
        ({"model": "lstm"}, "model must be one of"),
        ({"format": 2}, "has format 2, this version reads format 1"),
        ({"config": 5}, "missing or of the wrong type: config"),
    ):
        saved(tmp_path)
        reseal(tmp_path, **change)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_arrays(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".hidden", "a/b"])
def test_config_may_not_name_files_elsewhere(tmp_path, name):
    path = saved(tmp_path) / "config.json"
    description = json.loads(path.read_text())
    description["files"][name] = description["files"].pop("model.safetensors")
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"config\.json must list its files"):
        checkpoint.load_arrays(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        checkpoint.load_arrays(tmp_path / "nowhere")
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists model\.safetensors, which is not there"):
        checkpoint.load_arrays(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        checkpoint.load_arrays(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        saved(tmp_path / "file")


def test_what_others_left_in_the_directory_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(FileExistsError, match=r"will not replace .*config\.json, which is not that of a saved model"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_npz_holds_arrays_only(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.arange(3.0))
    assert np.array_equal(files.read_arrays(path)["a"], [0.0, 1.0, 2.0])
    content = path.read_bytes()
    for broken in (content[:-30], b"", b"PK\x03\x04 nothing"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"weights\.npz is truncated"):
            files.read_arrays(path)
    np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"weights\.npz is truncated or holds more than plain arrays"):
        files.read_arrays(path)


def test_other_endings_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        files.read_arrays(tmp_path / "weights.npz")
    (tmp_path / "weights.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="must end in"):
        files.read_arrays(tmp_path / "weights.pkl")


def test_torch_files_are_read_with_weights_only(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a": torch.arange(3.0).bfloat16(), "b": torch.eye(3)[:, :2].t()}
    for held in (state, {"model_state_dict": state, "step": 4}):
        torch.save(held, tmp_path / "state.pt")
        arrays = files.read_arrays(tmp_path / "state.pt")
        assert arrays["a"].dtype == np.float32 and np.array_equal(arrays["a"], [0, 1, 2]) and np.array_equal(arrays["b"], np.eye(3)[:2])

    ran = []

    class Trap:
        def __reduce__(self):
            return ran.append, (1,)

    torch.save({"a": Trap()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is truncated or holds more than tensors"):
        files.read_arrays(tmp_path / "state.pt")
    assert not ran
    torch.save({"a": torch.zeros(2), "lr": 0.1}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="found other things under lr"):
        files.read_arrays(tmp_path / "state.pt")
    stream = io.BytesIO()
    torch.save(state, stream)
    for broken in (stream.getvalue()[:-40], b"", b"garbage"):
        (tmp_path / "state.pt").write_bytes(broken)
        with pytest.raises(ValueError, match=r"state\.pt is truncated"):
            files.read_arrays(tmp_path / "state.pt")
