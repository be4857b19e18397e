import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from huggingface_hub import ModelCard

from hf_ternary import TernaryConfig
from hf_ternary.hub import save_pretrained
from hf_ternary.info import read_info
from hf_ternary.model_card import PLACEHOLDER, create, set_repo_id
from hf_ternary.provenance import weights
from tests.conftest import save_tiny_bert, save_tiny_vit
from tests.helpers import write_results, write_summary

ORIENTATION = 0x0112  # Exif's tag


def quantized(source: Path, target: Path, model_class: str = "BertModel", **options: Any) -> Path:
    loaded = getattr(transformers, model_class).from_pretrained(source, quantization_config=TernaryConfig(**options))
    return save_pretrained(loaded, target)


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    return quantized(tiny_bert, tmp_path / "packed", embedding_bits=4)


def test_metadata(folder: Path) -> None:
    data = create(folder, "packed", base_model="tester/teacher").data.to_dict()
    assert data == {
        "base_model": "tester/teacher",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["ternary", "1.58-bit"],
    }


def test_sizes_are_measured(folder: Path) -> None:
    info, text = read_info(folder), create(folder, "packed").text
    ratio = info.bytes / info.float32_bytes
    assert f"| {info.bytes / 1e6:.2f} MB | {info.float32_bytes / 1e6:.2f} MB | {ratio:.3f} |" in text
    assert weights(folder)["sha256"] in text
    assert "12 linear layers" in text
    assert "the embedding tables hold 4 and 8 bits a weight" in text


def test_no_quality_is_claimed_without_results(folder: Path) -> None:
    card = create(folder, "packed")
    assert "Quality" not in card.text
    assert card.data.eval_results is None


def test_quality_comes_from_the_results(folder: Path, tmp_path: Path) -> None:
    card = create(folder, "packed", results=write_results(tmp_path / "results.json", folder))
    assert "| STSBenchmark | STS | cosine_spearman | 81.23 | 82.00 | 99.1 % |" in card.text
    assert "mean cosine of 0.951" in card.text
    assert "tester/teacher" in card.text
    assert "seed 7" in card.text
    (result,) = ModelCard(str(card)).data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("STSBenchmark", "cosine_spearman", 0.81234)


def test_results_without_a_baseline(folder: Path, tmp_path: Path) -> None:
    score = {"task": "SciFact", "type": "Retrieval", "metric": "ndcg_at_10", "score": 0.6}
    results = write_results(tmp_path / "r.json", folder, baseline=None, fidelity=None, scores=[score])
    text = create(folder, "packed", results=results).text
    head = "| task | type | metric | this model |\n|---|---|---|---:|\n"
    assert head + "| SciFact | Retrieval | ndcg_at_10 | 60.00 |\n" in text
    assert "retention" not in text
    assert "cosine" not in text


def test_results_of_other_weights_are_refused(folder: Path, tiny_bert: Path, tmp_path: Path) -> None:
    other = quantized(tiny_bert, tmp_path / "other", weight_scheme="absmean")
    with pytest.raises(ValueError, match=r"was measured on other weights .* Fix: evaluate the saved model"):
        create(folder, "packed", results=write_results(tmp_path / "results.json", other))
    with pytest.raises(ValueError, match=r"holds no scores\. Fix"):
        create(folder, "packed", results=write_results(tmp_path / "results.json", folder, scores=[]))


def test_training_comes_from_the_summaries_of_the_runs(folder: Path, tmp_path: Path) -> None:
    summary = write_summary(tmp_path / "summary.json", folder)
    text = create(folder, "packed", training=summary).text
    assert "| 1 | the full-precision weights, compensated | 5,500 | 20,415,428 | 0.0004 | 420 | 0.925 |\n| 2 |" in text
    told = "run 1; ternary weights fixed, the rest trained; Dense layer fitted to 60,000 texts"
    assert f"| 2 | {told} | 5,500 | 20,415,428 | 0.0004 | 420 |  |\n\n" in text
    sources = "| wiki.jsonl | 1,200 | abababababab |\n| me/news | 30 |  |\n\n"
    assert "| source | texts in it | SHA-256 |\n|---|---:|---|\n" + sources + "## Provenance" in text
    alone = create(folder, "packed", training=json.loads(write_summary(summary, folder, earlier=[]).read_text()))
    assert "| 1 | ternary weights cdcdcdcdcdcd; ternary weights fixed" in alone.text
    assert "Training" not in create(folder, "packed").text


def test_the_training_of_other_weights_is_refused(folder: Path, tiny_bert: Path, tmp_path: Path) -> None:
    other = quantized(tiny_bert, tmp_path / "other", weight_scheme="absmean")
    with pytest.raises(ValueError, match=r"training of other weights .* Fix: give the one beside"):
        create(folder, "packed", training=write_summary(tmp_path / "summary.json", other))
    with pytest.raises(ValueError, match=r"tells of no training\. Fix"):
        create(folder, "packed", training=tmp_path / "missing.json")


def test_a_malformed_base_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Repo id must"):
        create(folder, "packed", base_model="https://example.com/a/b/c")


def test_license_and_language_are_the_base_models(minilm: Path, folder: Path) -> None:
    data = create(folder, "packed", source=str(minilm)).data
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert data.base_model is None  # a folder is no name on the Hub


def test_a_damaged_card_of_the_source_is_as_none(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\ntitle: a: b\n---\n# A model\n")
    assert create(folder, "packed", source=str(source)).data.license is None


@pytest.mark.parametrize("error", [RuntimeError("a proxy's"), KeyError("commit")])
def test_a_card_that_cannot_be_looked_up_costs_no_model(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("hf_ternary.model_card.get_hf_file_metadata", fail)
    monkeypatch.setattr("hf_ternary.model_card.hf_hub_download", fail)
    with caplog.at_level(logging.INFO, "hf_ternary.model_card"):
        assert create(folder, "packed", base_model="tester/teacher").data.license is None
    assert f"The card of tester/teacher is not read: {error!r}" in caplog.text


def test_without_network_a_card_is_given_up_at_once() -> None:
    code = (
        "import time; from hf_ternary.model_card import load_card; start = time.monotonic()\n"
        "assert load_card('tester/teacher') is None; print(time.monotonic() - start)"
    )
    unreachable = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=unreachable, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 10, done.stderr  # huggingface_hub's own retries take 24 s


def test_a_model_loaded_packed_keeps_its_card(folder: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results.json", folder)
    create(folder, "packed", base_model="tester/teacher", results=results).save(folder / "README.md")
    again = save_pretrained(transformers.BertModel.from_pretrained(folder), tmp_path / "again")
    assert (again / "README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_changed_weights_lose_their_quality_but_not_their_base(folder: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results.json", folder)
    create(folder, "packed", base_model="tester/teacher", results=results).save(folder / "README.md")
    model = transformers.BertModel.from_pretrained(folder)
    model.embeddings.LayerNorm.weight.data.add_(1)
    card = ModelCard.load(save_pretrained(model, tmp_path / "again") / "README.md")
    assert card.data.base_model == "tester/teacher"
    assert "Quality" not in card.text


@pytest.mark.parametrize(
    ("model_class", "tag"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_task_and_example_of_a_transformers_model(model_class: str, tag: str, tmp_path: Path) -> None:
    folder = quantized(save_tiny_bert(tmp_path / "float", model_class), tmp_path / "packed", model_class)
    card = create(folder, "packed")
    assert card.data.pipeline_tag == tag
    assert f'{model_class}.from_pretrained("{PLACEHOLDER}")' in card.text


@pytest.mark.parametrize(
    ("fixture", "name", "tag"),
    [
        ("tiny_sentence_transformer", "SentenceTransformer", "sentence-similarity"),
        ("tiny_cross_encoder", "CrossEncoder", "text-ranking"),
        ("tiny_sparse_encoder", "SparseEncoder", "feature-extraction"),
    ],
)
def test_task_and_example_of_sentence_transformers(
    fixture: str, name: str, tag: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import sentence_transformers

    options = {"quantization_config": TernaryConfig()}
    model = getattr(sentence_transformers, name)(str(request.getfixturevalue(fixture)), device="cpu", model_kwargs=options)
    folder = save_pretrained(model, tmp_path / "packed")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", tag)
    example = card.text.split("```python\n")[1].split("```")[0].replace(PLACEHOLDER, str(folder))
    exec(example, {})


def test_the_example_of_images_turns_photographs_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", minversion="6", reason="images need sentence-transformers 6")
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": TernaryConfig()}
    model = SentenceTransformer(str(save_tiny_vit(tmp_path / "vit")), device="cpu", model_kwargs=options)
    folder = save_pretrained(model, tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    turned = image.Exif()
    turned[ORIENTATION] = 6  # taken with the camera on its side
    image.fromarray(pixels).save("one.jpg")
    image.fromarray(pixels).save("another.jpg", exif=turned)
    example = ModelCard.load(folder / "README.md").text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(example.replace(PLACEHOLDER, str(folder)), names)
    upright = [image.open("one.jpg"), image.open("another.jpg").transpose(image.Transpose.ROTATE_270)]
    np.testing.assert_allclose(names["embeddings"], model.encode(upright), atol=5e-3)
    assert not np.allclose(*names["embeddings"], atol=0.05)


def test_set_repo_id(folder: Path) -> None:
    readme = folder / "README.md"
    assert PLACEHOLDER in readme.read_text()
    set_repo_id(readme, "me/model")
    assert 'BertModel.from_pretrained("me/model")' in readme.read_text()
    set_repo_id(folder / "no-such-file.md", "me/model")
