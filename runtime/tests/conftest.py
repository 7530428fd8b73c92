"""A tiny LAM and a tiny WaveCore for the tests of this room: sizes, weights in which every leaf matters, a tokenizer, a BERT to be LAM's teacher."""

import numpy as np
import pytest

from conf.models import LamConfig, WaveCoreConfig
from runtime.init import init_arrays

WORDS = [
    "the", "a", "man", "woman", "child", "plays", "reads", "rides", "sings", "guitar", "book", "horse", "song", "in", "on", "near", "of", "and",
    "river", "house", "garden", "slowly", "today",
]
LAM_CONFIG = LamConfig(vocab_size=61, dim=30, heads=3, depth=1, ffn_dim=23, max_positions=13, max_length=30, chunk_size=5)
CORE_CONFIG = WaveCoreConfig(
    d_s=13, d_w=21, d_p=9, d_e=11, d_k=5, d_c=15, num_levels=2, cms_sizes=(3, 6), cms_dims=(10, 14), cms_decays=(0.3, 0.2), mamba_state_dim=3,
    heads=("action", "value", "world_model"), salience_threshold=0.45,
).sized(19, 17, 22)


@pytest.fixture(scope="session")
def core_config():
    """Awkward in every size, and so small a memory, with gates near the threshold, that a few steps choose rows and refuse others."""
    return CORE_CONFIG


@pytest.fixture(scope="session")
def core_arrays():
    """No leaf at zero or one."""
    arrays, generator = init_arrays("wavecore", CORE_CONFIG, 4), np.random.default_rng(4)
    return {key: value + 0.1 * generator.standard_normal(value.shape) for key, value in arrays.items()}


@pytest.fixture(scope="session")
def lam_config():
    """Awkward in every size; texts soon pass 13 positions and several chunks of 5 tokens. JAX rounds lengths to 16 and 30 only."""
    return LAM_CONFIG


@pytest.fixture(scope="session")
def lam_arrays():
    """No leaf at zero or one, and embeddings large enough for sentences to differ."""
    arrays, generator = init_arrays("lam", LAM_CONFIG, 5), np.random.default_rng(5)
    return {key: value * (30 if "embeddings" in key else 1) + 0.1 * generator.standard_normal(value.shape) for key, value in arrays.items()}


@pytest.fixture(scope="session")
def tokenizer_text():
    """A tokenizer.json that, as MiniLM's does, carries a truncation and a padding of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(names[:5])
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    frame = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]")
    tokenizer.post_processor = TemplateProcessing(**frame, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def sentences():
    """Two dozen texts of 0 to 28 words, in no order of length."""
    generator = np.random.default_rng(8)
    return [" ".join(generator.choice(WORDS, count)) for count in (3, 28, 0, 12, 5, 23, 1, 11, 9, 27, 2, 5, 5, 17, 26, 4, 14, 6, 13, 1, 8, 19, 7, 25)]


@pytest.fixture(scope="session")
def make_teacher(tokenizer_text):
    """A function that writes a tiny BERT checkpoint, `changes` to its configuration included, and the tokenizer; it returns the arrays."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def make(directory, model="BertModel", **changes):
        sizes = dict(
            vocab_size=61, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=23, max_position_embeddings=13)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            bert = getattr(transformers, model)(transformers.BertConfig(**{**sizes, **changes}))
            with torch.no_grad():
                for parameter in bert.parameters():  # norms and biases begin at one and zero
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        bert.save_pretrained(directory)
        (directory / "tokenizer.json").write_text(tokenizer_text)
        return {key: value.numpy() for key, value in bert.state_dict().items()}

    return make
