from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from hf_ternary.files import model_folder


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
