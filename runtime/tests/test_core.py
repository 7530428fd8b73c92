"""`save_core` and `load_core`: the directory, its manifest and proof, the public seed, and what is refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runtime
from conf.models import DeltaNetConfig
from runtime import checkpoint, core, files, public
from runtime.arrays import parameter_count

BACKENDS = ("torch", "jax", "cython")
PROOF = dict(loss_before=1.5, loss_after=0.25, curve=[1.5, 0.75, 0.25], data="Pendulum-v1, 3 episodes", seed=7, episodes=3)


@pytest.fixture(params=BACKENDS)
def backend(request):
    for package in {"torch": ["torch"], "jax": ["jax", "flax"], "cython": ["cython_ext.wavecore_engine"]}[request.param]:
        pytest.importorskip(package)
    return request.param


@pytest.fixture
def model(core_config, core_arrays):
    pytest.importorskip("torch")
    return runtime.build("wavecore", core_config, "torch", core_arrays, "float64")


@pytest.fixture
def directory(model, tmp_path):
    """A saved core with a proof of learning."""
    runtime.save_core(model, tmp_path / "core", training=dict(steps=3, final_loss=0.25), proof=PROOF, embedding_model="all-MiniLM-L6-v2")
    return tmp_path / "core"


@pytest.fixture
def seed(core_config, core_arrays, tmp_path):
    """A directory with the public file and its manifest; a function that writes both, with changes."""
    directory, config = tmp_path / "seed", replace(core_config, cms_write="slot0")
    directory.mkdir()

    def write(manifest=None, arrays=None, **changes):
        said = asdict(config) | changes
        content = {"model": {"param_count": parameter_count("wavecore", config)}, "config": {key: said[key] for key in said if said[key] is not None}}
        (directory / "manifest.json").write_text(json.dumps(content | (manifest or {})))
        np.savez(directory / "wavecore_seed.npz", **(public.export("wavecore", core_arrays) | (arrays or {})))
        return directory

    write()
    return write


def bits(arrays):
    return {key: (value.dtype, value.shape, value.tobytes()) for key, value in arrays.items()}


def observed(batch=3):
    generator = np.random.default_rng(5)
    return tuple(generator.standard_normal((batch, width)) for width in (19, 17, 1))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(directory):
    """Rewrite config.json to match the files as they are now, as somebody would who wants to deceive."""
    def seal(content):
        for name in content["files"]:
            content["files"][name] = {"bytes": (directory / name).stat().st_size, "sha256": files.digest(directory / name)}

    edit(directory / "config.json", seal)


def test_what_lies_there(directory, core_config):
    names = ["config.json", "manifest.json", "model.safetensors", "proof_of_learning.json"]
    assert sorted(path.name for path in directory.iterdir()) == names
    manifest, proof = core.describe_core(directory)
    assert list(manifest) == ["version", "type", "created", "model", "config", "training"]
    count = sum(value.size for value in load_file(directory / "model.safetensors").values())
    assert manifest["model"] == dict(type="wavecore", architecture="mamba_wave", param_count=count, embedding_model="all-MiniLM-L6-v2")
    assert manifest["training"] == dict(steps=3, final_loss=0.25, text_samples=0)
    assert type(core_config)(**manifest["config"]) == core_config
    assert proof == PROOF


def test_written_on_one_backend_and_loaded_in_the_other(directory, model, backend, tmp_path):
    loaded = runtime.load_core(directory, backend)
    assert (loaded.name, loaded.backend, loaded.dtype, loaded.config) == ("wavecore", backend, "float64", model.config)
    assert bits(loaded.arrays()) == bits(model.arrays())
    y, state, _ = loaded.step(loaded.init_state(3), *observed())
    expected, after, _ = model.step(model.init_state(3), *observed())
    # The bound that the project promises between two backends in float64, end to end.
    assert np.linalg.norm(y - expected) < 1e-11 * np.linalg.norm(expected)
    assert np.linalg.norm(np.asarray(state.s) - after.s.numpy()) < 1e-11 * np.linalg.norm(after.s.numpy())
    runtime.save_core(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert core.describe_core(tmp_path / "again")[1] is None
    narrow = runtime.load_core(directory, backend, dtype="float32")
    assert bits(narrow.arrays()) == bits({key: value.astype(np.float32) for key, value in model.arrays().items()})


def test_the_plain_save_writes_a_manifest_too_and_clears_away_a_proof_of_other_weights(directory, model):
    runtime.save(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    manifest, proof = core.describe_core(directory)
    assert proof is None and manifest["training"] == dict(steps=0, final_loss=None, text_samples=0)
    assert bits(runtime.load(directory).arrays()) == bits(runtime.load_core(directory).arrays()) == bits(model.arrays())


@pytest.mark.parametrize("resealed", [False, True])
def test_a_manifest_that_lies(directory, core_config, resealed):
    count = parameter_count("wavecore", core_config)
    edit(directory / "manifest.json", lambda content: content["model"].update(param_count=954_697))
    if resealed:
        reseal(directory)
    for load in (runtime.load_core, runtime.load):
        with pytest.raises(ValueError, match=rf"manifest\.json says param_count=954697, but the weights have {count} parameters$"):
            load(directory)
    edit(directory / "manifest.json", lambda content: content["model"].update(param_count=count))
    edit(directory / "manifest.json", lambda content: content["config"].update(cms_decays=[0.3, 0.1]))
    if resealed:
        reseal(directory)
    with pytest.raises(ValueError, match=r"manifest\.json says cms_decays=\[0\.3, 0\.1\] where .*config\.json says \(0\.3, 0\.2\)$"):
        runtime.load_core(directory)


def test_a_manifest_that_is_altered_broken_or_gone(directory):
    path = directory / "manifest.json"
    whole = path.read_text()
    for content, message in (
        (whole.replace("MiniLM", "miniLM"), r"manifest\.json is altered: its sha256 is not the one in config\.json$"),
        (whole[:-30], r"manifest\.json is not JSON: "),
        ("[]", r"manifest\.json must hold one JSON object, found list$"),
        ("{}", r"manifest\.json must hold a whole number under model\.param_count, found None$"),
        ('{"model": {"param_count": "17"}}', r"manifest\.json must hold a whole number under model\.param_count, found '17'$"),
        ('{"model": {"param_count": 17}, "config": 5}', r"manifest\.json must hold an object under config, found int$"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            runtime.load_core(directory)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json lists manifest\.json, which is not there$"):
        runtime.load_core(directory)
    edit(directory / "config.json", lambda content: content["files"].pop("manifest.json"))
    with pytest.raises(FileNotFoundError, match=r"no file .*manifest\.json; a WaveCore's directory says in its manifest\.json what it holds$"):
        runtime.load_core(directory)


def test_weights_that_are_truncated_or_of_another_size(directory):
    path = directory / "model.safetensors"
    held = load_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: it has \d+ bytes"):
        runtime.load_core(directory)
    save_file(held | {"core.U_w": held["core.U_w"][:, :20].copy()}, path)
    reseal(directory)
    with pytest.raises(ValueError, match=r"do not fit wavecore: wrong shape: core\.U_w is \(13, 20\), expected \(13, 21\)$"):
        runtime.load_core(directory)
    edit(directory / "config.json", lambda content: content["config"].update(num_levels=10**12))
    with pytest.raises(ValueError, match=r"config\.json: cms_sizes must have num_levels=1000000000000 entries, found \[3, 6\]$"):
        runtime.load_core(directory)


def test_directories_that_hold_no_core(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere; models are read from local directories"):
        runtime.load_core(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds neither a config\.json that runtime\.save wrote nor wavecore_seed\.npz$"):
        runtime.load_core(tmp_path / "empty")
    config = DeltaNetConfig(vocab_size=11, dim=6, depth=1, heads=2, ffn_dim=5)
    checkpoint.save_arrays("deltanet_lm", config, runtime.init.init_arrays("deltanet_lm", config), directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"core holds a 'deltanet_lm', expected a 'wavecore'$"):
        runtime.load_core(directory)
    with pytest.raises(TypeError, match=r"model must be one that runtime\.build made under the name 'wavecore', found dict"):
        runtime.save_core({}, tmp_path)


@pytest.mark.parametrize("name", ["jax_compiled", "numpy"])
def test_backends_that_do_not_run_it(directory, name):
    with pytest.raises(ValueError, match=f"backend of 'wavecore' must be one of 'torch', 'torch_compiled', 'jax', 'cython', found '{name}'"):
        runtime.load_core(directory, name)


@pytest.mark.parametrize("said, message", [
    (dict(training=dict(loss=1.0)), "training must hold some of steps, final_loss, text_samples, found loss$"),
    (dict(training=dict(steps=-1)), "training: steps must be a whole number of at least 0, found -1$"),
    (dict(training=dict(final_loss=float("nan"))), "training: final_loss must be a finite number or None, found nan$"),
    (dict(proof={key: PROOF[key] for key in ("loss_before", "curve")}), "proof must hold .*; missing: loss_after, data, seed$"),
    (dict(proof=PROOF | dict(loss_after=float("inf"))), "proof: loss_after must be a finite number, found inf$"),
    (dict(proof=PROOF | dict(curve=[1.0, float("nan")])), "proof: curve must be a list of finite numbers, one per step$"),
    (dict(proof=PROOF | dict(curve=[])), "proof: curve must be a list"),
    (dict(proof=PROOF | dict(seed=1.5)), "proof: seed must be a whole number of at least 0, found 1.5$"),
    (dict(proof=PROOF | dict(data=np.zeros(2))), "proof must be plain JSON with finite numbers: "),
])
def test_training_and_proof_that_say_nothing_sound(model, tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        runtime.save_core(model, tmp_path / "core", **said)
    assert not (tmp_path / "core").exists()


def test_the_public_seed(seed, core_config, core_arrays):
    pytest.importorskip("torch")
    loaded = runtime.load_core(seed())
    assert (loaded.config, loaded.dtype) == (replace(core_config, cms_write="slot0"), "float64") and bits(loaded.arrays()) == bits(core_arrays)
    direct = runtime.build("wavecore", loaded.config, "torch", core_arrays, "float64")
    assert np.allclose(loaded.step(loaded.init_state(3), *observed())[0], direct.step(direct.init_state(3), *observed())[0], rtol=1e-11, atol=0)


def test_the_public_seed_takes_from_both_files_what_no_array_shows(seed, core_config):
    directory = seed(cms_write=None, cms_decays=None, state_saturation_limit=None)
    for content in (dict(cms_decays=[0.2, 0.1], state_saturation_limit=5.0), dict(config=dict(cms_decays=[0.2, 0.1], state_saturation_limit=5.0))):
        (directory / "config.json").write_text(json.dumps(content))
        expected = replace(core_config, cms_write="slot0", cms_decays=(0.2, 0.1), state_saturation_limit=5.0)
        assert runtime.load_core(directory).config == expected
    with pytest.warns(RuntimeWarning, match="describes fields that no WaveCore here has, left out: obs_type$"):
        assert runtime.load_core(seed(obs_type="vector", cms_decays=[0.2, 0.1], state_saturation_limit=5.0)).config == expected
    (directory / "config.json").write_text('{"cms_decays": [0.2, 0.05]}')
    with pytest.raises(ValueError, match=r"manifest\.json says cms_decays=\[0\.3, 0\.2\] where .*config\.json says \[0\.2, 0\.05\]$"):
        runtime.load_core(seed())


def test_a_public_seed_that_cannot_be_read(seed, core_config):
    directory, count = seed(), parameter_count("wavecore", core_config)
    for change, message in (
        (dict(manifest={"model": {"param_count": 17}}), rf"manifest\.json says param_count=17, but the weights have {count} parameters$"),
        (dict(cms_sizes=None), r"manifest\.json must say cms_sizes under config: wavecore_seed\.npz does not show them$"),
        (dict(d_s=14), r"manifest\.json says d_s=14 where .*wavecore_seed\.npz says 13$"),
        (dict(cms_decays=[0.1, 0.2]), r"manifest\.json: cms_decays must not increase from level to level, found \[0\.1, 0\.2\]$"),
        (dict(arrays={"decoder/Dense_7/bias": np.zeros(2)}), r"seed\.npz: arrays do not fit the public WaveCore: unmapped: decoder/Dense_7/bias$"),
        (dict(arrays={"hope_core/U_w": np.zeros((13, 2))}), r"wavecore_seed\.npz: d_w must be divisible by mamba_state_dim, found d_w=2 and"),
        (dict(arrays={"hope_core/U_p": np.array([{"an": "object"}], dtype=object)}), r"seed\.npz is truncated or holds more than plain arrays"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            runtime.load_core(seed(**change))
        assert "\n" not in str(caught.value)
    seed()
    path = directory / "wavecore_seed.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"wavecore_seed\.npz is truncated"):
        runtime.load_core(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*manifest\.json"):
        runtime.load_core(directory)
