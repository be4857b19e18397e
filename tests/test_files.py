import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from hf_ternary import TernaryConfig
from hf_ternary.files import check_writable, is_ternary, library_class, model_folder, read_config


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the download of any model end in ``error``."""

    def download(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def test_what_was_downloaded_is_enough_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = LocalEntryNotFoundError("1 file(s) are missing (onnx/config.json)")
    fail_with(error, monkeypatch)
    with pytest.raises(ValueError, match=r"no model by that name can be reached on the Hub \(LocalEntryNotFoundError"):
        model_folder("tester/model", ["*.json"])
    monkeypatch.setattr(error, "snapshot_path", str(tmp_path), raising=False)  # as its IncompleteSnapshotError
    assert model_folder("tester/model", ["*.json"]) == tmp_path


def test_an_error_of_the_network_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(HTTPError("the proxy says no"), monkeypatch)
    with pytest.raises(ValueError, match=r"tester/model is no folder.*\(HTTPError\)\. Fix: check the name, the connection"):
        model_folder("tester/model", ["*.json"])


def test_a_revision_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no revision 'v2' of a model by that name can be reached"):  # nor is the Hub
        model_folder("tester/model", ["*.json"], "v2")


def test_a_packed_model_is_known_by_its_config(tiny_bert: Path, tmp_path: Path) -> None:
    assert not is_ternary(tiny_bert)
    with pytest.raises(ValueError, match=r"holds no ternary model\. Fix: make one with `hf-ternary quantize"):
        read_config(tiny_bert)
    config = TernaryConfig(group_size=16)
    module = tmp_path / "0_Transformer"  # where sentence-transformers keeps some
    module.mkdir()
    (module / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
    assert is_ternary(tmp_path)
    assert read_config(tmp_path) == config


def test_library_class(
    tiny_bert: Path, tiny_sentence_transformer: Path, tiny_cross_encoder: Path, tiny_sparse_encoder: Path, minilm: Path
) -> None:
    assert library_class(tiny_bert) is None
    assert library_class(tiny_sentence_transformer) == "SentenceTransformer"
    assert library_class(tiny_cross_encoder) == "CrossEncoder"
    assert library_class(tiny_sparse_encoder) == "SparseEncoder"
    assert library_class(minilm) == "SentenceTransformer"  # saved before the files named the class


def test_library_class_of_an_older_cross_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sentence_transformers": {"version": "5.2.0"}}))
    assert library_class(tmp_path) == "CrossEncoder"


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "folder")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # the tests may run as root, who writes anywhere
    with pytest.raises(ValueError, match=rf"nothing can be written to {tmp_path}. Fix: choose a folder"):
        check_writable(tmp_path / "new" / "folder")
