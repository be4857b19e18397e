"""The bare path: the same folder and the same embeddings as SentenceTransformer, with neither torch nor transformers."""

import copy
import json
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hf_ternary
from hf_ternary.architectures import MODEL_TYPES, UnsupportedError
from hf_ternary.ops import backends
from hf_ternary.threads import cores
from tests.conftest import SENTENCES, VOCAB_SIZE, save_sentence_transformer, tiny_tokenizer

pytestmark = pytest.mark.skipif(backends.choose().backend == "reference", reason="the C++ kernels are not built")

MODELS = Path(__file__).parents[1] / "model_cards"
TEXTS = [*SENTENCES, "a", "naïve café 😀 日本", "nul\0byte", "one\ntwo", "word " * 600]


def save_ternary(source: Path, path: Path) -> Path:
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": hf_ternary.TernaryConfig()}
    SentenceTransformer(str(source), device="cpu", model_kwargs=options).save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM, ternarized."""
    return save_ternary(minilm, tmp_path_factory.mktemp("minilm") / "ternary")


@pytest.mark.parametrize("published", sorted(MODELS.iterdir()), ids=lambda p: p.name)
def test_published_models_load(published: Path):
    """With every supported version of the libraries: `make test-oldest`."""
    from sentence_transformers import SentenceTransformer

    of_images = (published / "preprocessor_config.json").exists()
    if of_images:
        Image = pytest.importorskip("PIL.Image")
    model = SentenceTransformer(str(published), device="cpu")
    if of_images:
        red, blue = model.encode([Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")])
        assert red.shape == (384,)
        assert np.isfinite([red, blue]).all()
        assert not np.allclose(red, blue)
    else:
        np.testing.assert_allclose(hf_ternary.load(published).encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_the_published_model_agrees_with_its_teacher(minilm: Path):
    """0.948 on the texts held out of its training (recipes/README.md); rounded weights have 0.4, others 0."""
    from sentence_transformers import SentenceTransformer

    texts = [
        "The old bridge was closed for repairs after the flood.",
        "How do I reset the password of my account?",
        "Interest rates are expected to rise again next year.",
        "A small dog is running along the beach.",
        "The function returns a list of all files in the folder.",
        "Which planet has the most moons?",
        "She ordered a cup of coffee and a slice of cake.",
        "The treatment reduced the symptoms of most patients.",
        "Take the second street on the left, then go straight on.",
        "The band released their third album in the spring.",
        "Water boils at a lower temperature in the mountains.",
        "He lost his keys somewhere between the station and the office.",
    ]
    teacher = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    cosines = (hf_ternary.load(MODELS / "all-MiniLM-L6-v2-ternary").encode(texts) * teacher).sum(1)
    assert cosines.mean() > 0.85


@pytest.fixture
def tiny(tiny_sentence_transformer: Path, tmp_path: Path) -> Path:
    return save_ternary(tiny_sentence_transformer, tmp_path / "tiny")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_same_embeddings_as_sentence_transformer(folder: Path):
    from sentence_transformers import SentenceTransformer

    ours, theirs = hf_ternary.load(folder).encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # torch sums and normalizes in another order


def test_modernbert(tmp_path: Path):
    from sentence_transformers import SentenceTransformer
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = ModernBertConfig(**sizes, **special, intermediate_size=64, local_attention=16, initializer_range=0.2)
    ModernBertModel(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base")
    folder = save_ternary(save_sentence_transformer(tmp_path / "base", tmp_path / "float"), tmp_path / "ternary")
    ours, theirs = hf_ternary.load(folder).encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    edit(folder / "config.json", layer_types=["chunked_attention"] * 3)
    with pytest.raises(ValueError, match="chunked_attention.*use SentenceTransformer"):
        hf_ternary.load(folder)


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES.keys() - {"bert", "modernbert"}))
def test_the_other_families(model_type: str, tmp_path: Path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig, AutoModel

    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    options = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 160, "pad_token_id": 0, "initializer_range": 0.2}
    AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **options)).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base")
    folder = save_ternary(save_sentence_transformer(tmp_path / "base", tmp_path / "float"), tmp_path / "ternary")
    ours, theirs = hf_ternary.load(folder).encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_shards_are_read_together(tiny: Path):
    from transformers import AutoModel

    expected = hf_ternary.load(tiny).encode(SENTENCES)
    model = AutoModel.from_pretrained(tiny)
    (tiny / "model.safetensors").unlink()
    model.save_pretrained(tiny, max_shard_size="10KB")
    assert len(list(tiny.glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(hf_ternary.load(tiny).encode(SENTENCES), expected)


def test_settings_of_sentence_transformers_count(tiny: Path):
    from sentence_transformers import SentenceTransformer

    edit(tiny / "1_Pooling" / "config.json", pooling_mode="cls")
    edit(tiny / "sentence_bert_config.json", max_seq_length=12, do_lower_case=True)
    edit(
        tiny / "config_sentence_transformers.json",
        prompts={"query": "find the ", "document": "the red "},
        default_prompt_name="query",
    )
    ours, theirs = hf_ternary.load(tiny), SentenceTransformer(str(tiny), device="cpu")
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(ours.encode("a DOG", prompt=""), theirs.encode("a DOG", prompt=""), atol=1e-6)
    for prompt in ({"prompt_name": "document"}, {"prompt": "run to "}):
        np.testing.assert_allclose(ours.encode("a dog", **prompt), theirs.encode("a dog", **prompt), atol=1e-6)
    with pytest.raises(ValueError, match="prompt_name='passage' is unknown"):
        ours.encode("a dog", prompt_name="passage")
    assert ours.threads == cores()
    assert hf_ternary.load(tiny, threads=3).threads == 3


def test_the_longest_text_can_be_set(tiny: Path):
    from sentence_transformers import SentenceTransformer

    ours, theirs = hf_ternary.load(tiny), SentenceTransformer(str(tiny), device="cpu")
    before = ours.encode(TEXTS)
    ours.max_seq_length = theirs.max_seq_length = 5
    assert ours.max_seq_length == 5
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-6)
    assert not np.allclose(ours.encode(TEXTS), before, atol=1e-3)
    for length in (2, 100_000):
        with pytest.raises(ValueError, match=f"max_seq_length={length} is not allowed: use 3 to "):
            ours.max_seq_length = length


@pytest.mark.parametrize("normalize", [None, True, False])
def test_truncated_embeddings(normalize: bool | None, tiny: Path, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    shutil.copytree(tiny, tmp_path / "model")
    settings = tmp_path / "model" / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "truncate_dim": 8}))
    ours = hf_ternary.load(tmp_path / "model")
    # sentence-transformers before 6 does not read it from the files
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu", truncate_dim=8)
    y = ours.encode(SENTENCES, normalize=normalize)
    assert ours.dimension == y.shape[1] == 8
    if normalize is not False:  # which sentence-transformers has no option for: its module normalizes
        np.testing.assert_allclose(y, theirs.encode(SENTENCES, normalize_embeddings=bool(normalize)), atol=1e-6)


@pytest.mark.parametrize(
    "prompts", [{}, {"query": "find the ", "passage": "the red "}, {"document": "the red ", "corpus": "run to "}]
)
def test_queries_and_documents(prompts: dict[str, str], tiny: Path):
    from sentence_transformers import SentenceTransformer

    edit(tiny / "config_sentence_transformers.json", prompts={**prompts, "other": "a day "}, default_prompt_name="other")
    ours, theirs = hf_ternary.load(tiny), SentenceTransformer(str(tiny), device="cpu")
    for name in ("encode_query", "encode_document"):
        for options in ({}, {"prompt": "run to "}, {"prompt_name": "other"}):
            expected = getattr(theirs, name)(TEXTS, **options)
            np.testing.assert_allclose(getattr(ours, name)(TEXTS, **options), expected, atol=1e-6)
    assert ours.encode_query("a dog", truncate_dim=8).shape == (8,)
    del ours.prompts["document"]
    for name in [name for name in ("passage", "corpus") if name in prompts]:
        assert np.array_equal(ours.encode_document("a dog"), ours.encode("a dog", prompt_name=name))


@pytest.mark.parametrize("normalize", [None, True])
def test_embeddings_are_truncated_by_the_call(normalize: bool | None, tiny: Path):
    from sentence_transformers import SentenceTransformer

    ours, theirs = hf_ternary.load(tiny), SentenceTransformer(str(tiny), device="cpu", truncate_dim=8)
    y = ours.encode(SENTENCES, normalize=normalize, truncate_dim=8)
    np.testing.assert_allclose(y, theirs.encode(SENTENCES, normalize_embeddings=bool(normalize)), atol=1e-6)
    assert ours.encode("a dog", truncate_dim=99).shape == (ours.dimension,) == (32,)
    edit(tiny / "config_sentence_transformers.json", truncate_dim=8)
    assert hf_ternary.load(tiny).encode("a dog", truncate_dim=16).shape == (16,)


@pytest.mark.parametrize("truncate_dim", [0, -1, 1.5, "8"])
def test_an_impossible_truncation_is_an_error(truncate_dim: Any, tiny: Path):
    with pytest.raises(ValueError, match=f"truncate_dim={truncate_dim!r} is no length of an embedding.*Fix"):
        hf_ternary.load(tiny).encode("a dog", truncate_dim=truncate_dim)
    edit(tiny / "config_sentence_transformers.json", truncate_dim=truncate_dim)
    with pytest.raises(ValueError, match=f"truncate_dim={truncate_dim!r} is no length of an embedding.*Fix"):
        hf_ternary.load(tiny)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(copied: Callable[[Any], Any], tiny: Path, monkeypatch: pytest.MonkeyPatch):
    model, asked, changed = hf_ternary.load(tiny), hf_ternary.load(tiny, threads=3), hf_ternary.load(tiny)
    changed.threads = model.threads + 2
    monkeypatch.setattr("hf_ternary.serving.cores", lambda: 7)  # as on another machine
    assert [copied(each).threads for each in (model, asked, changed)] == [7, 3, changed.threads]
    assert np.array_equal(copied(model).encode(TEXTS), model.encode(TEXTS))


def test_one_thread_is_one_thread_of_the_tokenizer_too(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    model = hf_ternary.load(tiny, threads=1)
    expected = hf_ternary.load(tiny, threads=2).encode(TEXTS)
    monkeypatch.setattr(model, "_tokenizer", SimpleNamespace(encode=model._tokenizer.encode))
    assert np.array_equal(model.encode(TEXTS), expected)


def test_options_of_the_download(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def download(model: str, **options: Any) -> str:
        calls.append((model, options))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"token": "hf_x", "cache_dir": "cache", "local_files_only": True}
    hf_ternary.load("tester/model", "v2", **options)
    assert calls == [("tester/model", {"revision": "v2", "allow_patterns": ["*.json", "*.safetensors"], **options})]


def test_settings_that_are_not_known_are_errors(tiny: Path):
    edit(tiny / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 8}})
    with pytest.raises(UnsupportedError, match="sets processing_kwargs.*Fix: use SentenceTransformer"):
        hf_ternary.load(tiny)


def test_the_side_on_which_texts_are_cut(tiny: Path):
    from sentence_transformers import SentenceTransformer

    right = hf_ternary.load(tiny).encode("the cat " * 300)
    edit(tiny / "tokenizer_config.json", truncation_side="left")
    left = hf_ternary.load(tiny).encode("a dog " + "the cat " * 300)
    np.testing.assert_allclose(
        left, SentenceTransformer(str(tiny), device="cpu").encode("a dog " + "the cat " * 300), atol=1e-6
    )
    np.testing.assert_array_equal(left, right)


def test_a_normalize_module_of_something_else_is_an_error(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "2_Normalize" / "config.json").write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(UnsupportedError, match="consists of Transformer, Pooling, Normalize"):
        hf_ternary.load(tmp_path / "model")


@pytest.mark.parametrize("model", ["./no-such-model", "no/such/model", "tester/unknown"])
def test_a_model_that_is_not_there(model: str):
    with pytest.raises(ValueError, match=rf"^{model} is no folder.*Fix: "):
        hf_ternary.load(model)


def add_dense(source: Path, path: Path, *activations: Any) -> Path:
    """The model with Dense modules of 24, 16, ... outputs before its normalisation, ternarized."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import Dense
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers.models import Dense

    *modules, normalize = SentenceTransformer(str(source), device="cpu")
    widths = range(32, 0, -8)
    dense = [Dense(n, n - 8, True, activation) for n, activation in zip(widths, activations, strict=False)]
    SentenceTransformer(modules=[*modules, *dense, normalize], device="cpu").save_pretrained(str(path / "float"))
    return save_ternary(path / "float", path / "ternary")


def test_dense_modules(tiny_sentence_transformer: Path, tmp_path: Path):
    from sentence_transformers import SentenceTransformer
    from torch import nn

    folder = add_dense(tiny_sentence_transformer, tmp_path, nn.Tanh(), nn.Identity())
    model = hf_ternary.load(folder)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert model.dimension == 16
    np.testing.assert_allclose(model.encode(TEXTS), theirs, atol=1e-6)
    assert np.array_equal(model.encode(TEXTS), np.stack([model.encode(text) for text in TEXTS]))
    assert model.encode([]).shape == (0, 16)
    lengths = np.linalg.norm(model.encode(TEXTS, normalize=False), axis=1)
    assert (abs(lengths - 1) > 1e-3).all()


def test_other_dense_modules_are_errors(tiny_sentence_transformer: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file
    from torch import nn

    folder = add_dense(tiny_sentence_transformer, tmp_path, nn.Identity())
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    for changed, message in (
        ({"linear.bias": weights["linear.bias"]}, r"holds a weight \[0\] and a bias \[24\]"),
        ({**weights, "linear.weight": weights["linear.weight"][:, :-1]}, "reads another width"),
    ):
        save_file(
            {name: np.ascontiguousarray(array) for name, array in changed.items()}, folder / "2_Dense/model.safetensors"
        )
        with pytest.raises(ValueError, match=message):
            hf_ternary.load(folder)
    edit(folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.activation.ReLU")
    with pytest.raises(ValueError, match="is no Dense module that hf_ternary.load knows.*use SentenceTransformer"):
        hf_ternary.load(folder)


def test_same_bits_alone_in_any_batch_on_any_threads(folder: Path):
    model = hf_ternary.load(folder, threads=1)
    alone = np.stack([model.encode(text) for text in TEXTS])
    for threads in (1, 2, 3):
        model.threads = threads
        assert np.array_equal(model.encode(TEXTS), alone)
        assert np.array_equal(model.encode(TEXTS[::-1])[::-1], alone)


def test_2000_texts(tiny: Path):
    model = hf_ternary.load(tiny)
    texts = [f"the cat {i} " + "ran " * (i % 50) for i in range(2000)]
    embeddings = model.encode(texts)
    assert np.isfinite(embeddings).all()
    for i in (0, 511, 512, 1999):
        assert np.array_equal(embeddings[i], model.encode(texts[i]))


def test_no_texts(tiny: Path):
    assert hf_ternary.load(tiny).encode([]).shape == (0, 32)


def test_concurrent_calls(tiny: Path):
    model = hf_ternary.load(tiny, threads=2)
    expected = model.encode(TEXTS)
    results: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(all(np.array_equal(model.encode(TEXTS), expected) for _ in range(10)))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


def test_imports_no_more_than_the_core_needs(tiny: Path):
    """Neither torch nor anything else that `pip install .` does not bring."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"import hf_ternary; print(hf_ternary.load({str(tiny)!r}).encode('a dog').shape)\n"
        "new = {name.partition('.')[0] for name, module in list(sys.modules.items())\n"
        "       if name not in before and getattr(module, '__file__', None)}\n"
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "(32,)\nhf_ternary numpy safetensors tokenizers\n", result.stderr


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_one_native_call(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """And no call takes long: a few thousand tokens."""
    model = hf_ternary.load(tiny)
    embeddings, tokens = model._native.embeddings, []

    def watched(ids: list[list[int]], *options: Any) -> np.ndarray:
        tokens.append(sum(map(len, ids)))
        if len(tokens) == 2:
            signal.raise_signal(signal.SIGINT)
        return embeddings(ids, *options)

    monkeypatch.setattr(model._native, "embeddings", watched)
    with pytest.raises(KeyboardInterrupt):
        model.encode(["the cat sat on it " * 60] * 1000)
    assert len(tokens) == 2
    assert max(tokens) < 4096 + model.max_seq_length
    monkeypatch.undo()
    assert model.encode(["a dog"]).shape == (1, 32)  # nothing is broken


@pytest.mark.parametrize("texts", [None, 3, ["a", None]])
def test_texts_that_are_no_strings(tiny: Path, texts: Any):
    model = hf_ternary.load(tiny)
    with pytest.raises(ValueError, match="use strings") if texts == ["a", None] else pytest.raises(TypeError):
        model.encode(texts)


def test_without_the_kernels_it_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "choose", lambda: backends.Choice("reference", True, "forced by HF_TERNARY_BACKEND"))
    message = r"needs the C\+\+ kernels \(forced by HF_TERNARY_BACKEND\)\. Fix: pip install .*, or use SentenceTransformer"
    with pytest.raises(ImportError, match=message):
        hf_ternary.load(tiny)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_are_not_float32_are_errors(dtype: str, tiny_sentence_transformer: Path, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": hf_ternary.TernaryConfig(), "dtype": dtype}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    model.save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="float32.*save (the model|it) again"):
        hf_ternary.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        ("layer.0.output.dense.weight_scale", np.nan, r"weight_scale holds a NaN or an infinity\. Fix"),
        ("layer.0.output.dense.weight_scale", -1, r"weight_scale holds a negative value\. Fix"),
        ("layer.1.output.dense.weight_scale", 3e38, r"an embedding is not finite: .* too large\. Fix"),
    ],
)
def test_numbers_that_cannot_be_right_are_errors(ending: str, value: float, message: str, tiny: Path):
    from safetensors.numpy import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    (name,) = (name for name in weights if name.endswith(ending))
    save_file({**weights, name: np.full_like(weights[name], value)}, tiny / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hf_ternary.load(tiny).encode(SENTENCES)


def test_missing_files_are_errors(tiny: Path):
    (tiny / "tokenizer.json").rename(tiny / "away")
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json is missing; .*Fix: use SentenceTransformer"):
        hf_ternary.load(tiny)
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no safetensors file\. Fix"):
        hf_ternary.load(tiny)


def test_a_float_model_is_an_error_that_names_the_fix(tiny_sentence_transformer: Path):
    with pytest.raises(ValueError, match="hf-ternary quantize"):
        hf_ternary.load(tiny_sentence_transformer)


def test_unsupported_models_are_errors(tiny: Path):
    edit(tiny / "1_Pooling" / "config.json", pooling_mode="max")
    with pytest.raises(ValueError, match="pools by 'max'.*use SentenceTransformer"):
        hf_ternary.load(tiny)
    edit(tiny / "1_Pooling" / "config.json", pooling_mode="mean")
    edit(tiny / "config.json", model_type="gpt2")
    with pytest.raises(ValueError, match="'gpt2' is not one of bert.*use SentenceTransformer"):
        hf_ternary.load(tiny)
    (tiny / "modules.json").unlink()
    with pytest.raises(ValueError, match="no sentence-transformers modules"):
        hf_ternary.load(tiny)


@pytest.mark.parametrize("cut", [7, 1000, -100])
def test_a_damaged_file_is_an_error(tiny: Path, cut: int):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ValueError, match="damaged"):
        hf_ternary.load(tiny)


def test_a_text_without_tokens_is_an_error(tiny: Path):
    """A tokenizer that adds no special tokens makes nothing of an empty text."""
    edit(tiny / "tokenizer.json", post_processor=None)
    model = hf_ternary.load(tiny)
    for texts in ("", ["a dog", ""], ["", "a dog"], ["a " * 60, "", "a dog"]):
        with pytest.raises(ValueError, match=r"a text has no token.*Fix: leave empty texts out"):
            model.encode(texts)
    assert model.encode(["a dog"]).shape == (1, 32)


@pytest.mark.parametrize("heads", [0, -4, 33])
def test_impossible_heads_are_an_error(heads: int, tiny: Path):
    edit(tiny / "config.json", num_attention_heads=heads)
    with pytest.raises(ValueError, match=f"{heads} heads do not divide 32 columns"):
        hf_ternary.load(tiny)


def test_too_small_a_vocabulary_is_an_error(tiny: Path, folder: Path):
    shutil.copy(folder / "tokenizer.json", tiny)
    with pytest.raises(ValueError, match="a token id outside the table"):
        hf_ternary.load(tiny).encode("extraordinary")
