"""Saving, the swap of folders, and pushes by the real huggingface_hub client to a Hub on loopback."""

import io
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from torch import nn

import hf_ternary
from hf_ternary import TernaryConfig
from hf_ternary.__main__ import main
from hf_ternary.convert import fake_ternarize_model
from hf_ternary.files import model_folder
from hf_ternary.hub import push_to_hub, save_pretrained
from hf_ternary.info import read_info
from hf_ternary.ops import backends
from tests.conftest import SENTENCES, tiny_tokenizer
from tests.helpers import build, write_results, write_summary
from tests.hub_server import TOKEN, File, HubServer, Repository

KINDS = ["SentenceTransformer", "CrossEncoder", "SparseEncoder", "BertModel"]
PACKED = {"quantization_config": TernaryConfig()}


def load(kind: str, model: str | Path, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A model by the name of its class; ``options`` go to transformers."""
    if kind == "BertModel":
        return transformers.BertModel.from_pretrained(model, **(options or {}), **arguments)
    import sentence_transformers  # only here: the processes below start faster without it

    return getattr(sentence_transformers, kind)(str(model), device="cpu", model_kwargs=options or {}, **arguments)


def outputs(model: Any) -> np.ndarray:
    """What the model makes of ``SENTENCES``."""
    match type(model).__name__:
        case "SentenceTransformer":
            return model.encode(SENTENCES)
        case "SparseEncoder":
            return model.encode(SENTENCES, convert_to_sparse_tensor=False).numpy()
        case "CrossEncoder":
            return model.predict([(text, SENTENCES[0]) for text in SENTENCES])
    with torch.no_grad():
        return model(**tiny_tokenizer()(SENTENCES, padding=True, return_tensors="pt")).last_hidden_state.numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def floats(
    tiny_sentence_transformer: Path, tiny_cross_encoder: Path, tiny_sparse_encoder: Path, tiny_bert: Path
) -> dict[str, Path]:
    """Folder of a float model of every kind."""
    return dict(zip(KINDS, (tiny_sentence_transformer, tiny_cross_encoder, tiny_sparse_encoder, tiny_bert), strict=True))


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> nn.Module:
    return load("BertModel", tiny_bert, PACKED)


@pytest.fixture
def saved(bert: nn.Module, tmp_path: Path) -> Path:
    return save_pretrained(bert, tmp_path / "model", tiny_tokenizer())


# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_bit_identical(kind: str, floats: dict[str, Path], tmp_path: Path) -> None:
    model = load(kind, floats[kind], PACKED)
    folder = save_pretrained(model, tmp_path / "new" / "model")
    assert folder == tmp_path / "new" / "model"
    np.testing.assert_array_equal(outputs(load(kind, folder)), outputs(model))
    assert "ternary" in (folder / "README.md").read_text()
    assert os.listdir(folder.parent) == ["model"]


def test_modules_are_named_as_every_version_of_sentence_transformers_knows_them(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_pretrained(load("SentenceTransformer", floats["SentenceTransformer"], PACKED), tmp_path / "model")
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert types == [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]


def test_layers_that_a_file_holds_stacked(tmp_path: Path) -> None:
    model_class = build("NomicBERT", tmp_path / "float")
    model = model_class.from_pretrained(tmp_path / "float", **PACKED)
    folder = save_pretrained(model, tmp_path / "packed")
    again, ids = model_class.from_pretrained(folder), torch.arange(3, 9)[None]
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_save_load_save_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = save_pretrained(load("BertModel", saved), tmp_path / "again", tiny_tokenizer())
    assert contents(again) == contents(saved)


def test_a_model_folder_is_replaced_whole(bert: nn.Module, saved: Path) -> None:
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    save_pretrained(bert, saved)
    assert set(os.listdir(saved)) == {"config.json", "model.safetensors", "README.md"}
    assert os.listdir(saved.parent) == ["model"]


def test_a_link_to_a_folder_stays_a_link(bert: nn.Module, saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    assert save_pretrained(bert, link) == saved
    assert link.is_symlink()
    assert not (saved / "tokenizer.json").exists()


def test_the_new_folder_has_the_usual_permissions(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_refused(bert: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"is a file. Fix: give a folder"):
        save_pretrained(bert, tmp_path / "file")
    with pytest.raises(ValueError, match="no folder can be made in"):
        save_pretrained(bert, tmp_path / "file" / "model")
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_folder_of_other_things_is_refused(bert: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and holds no model. Fix: choose another folder"):
        save_pretrained(bert, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("entry", ["checkpoint-500", ".git", "onnx", "2026_results", "notes.txt", "texts.json", "train.py"])
def test_a_model_folder_with_more_in_it_is_refused(entry: str, bert: nn.Module, saved: Path) -> None:
    (saved / entry).mkdir()
    before = contents(saved)
    with pytest.raises(ValueError, match=f"also holds '{entry}', which replacing the model would delete"):
        save_pretrained(bert, saved)
    assert contents(saved) == before


def test_the_working_directory_is_refused(bert: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save_pretrained(bert, ".")


def test_a_folder_without_permission_is_refused(bert: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as parent:  # not tmp_path, whose parents nobody else may enter
        os.chmod(parent, 0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"no folder can be made in .*Permission denied.*Fix"):
                save_pretrained(bert, Path(parent) / "model")
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(parent, 0o755)


def test_a_float_model_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ternary layer. Fix: load it with quantization_config"):
        save_pretrained(load("BertModel", tiny_bert), tmp_path / "model")
    with pytest.raises(ValueError, match="Linear cannot be saved"):
        save_pretrained(nn.Linear(4, 4), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_model_in_training_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    model = fake_ternarize_model(load("BertModel", tiny_bert), TernaryConfig())
    with pytest.raises(ValueError, match="pack_model"):
        save_pretrained(model, tmp_path / "model")


def test_a_model_that_does_not_save_its_weights_is_refused(tiny_bert: Path, saved: Path) -> None:
    from peft import LoraConfig

    before = contents(saved)
    model = load("BertModel", tiny_bert, PACKED)
    model.add_adapter(LoraConfig(target_modules=["query"]))  # from now on only the adapter is saved
    with pytest.raises(ValueError, match="BertModel holds an adapter.*Fix: save the adapter by"):
        save_pretrained(model, saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def test_a_model_that_is_not_saved_whole_is_refused(bert: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, save = contents(saved), transformers.PreTrainedModel.save_pretrained

    def lose_a_layer(self: Any, folder: Path) -> None:
        save(self, folder)
        state = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in state.items() if "layer.0.output.dense" not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lose_a_layer)
    # 2 layers of 4 x 32 + 64 + 32 rows, 200 tokens and 128 positions
    with pytest.raises(ValueError, match=r"BertModel was not saved whole: 744 of its 776 packed rows are in .*Fix"):
        save_pretrained(bert, saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("exact", [True, False])
def test_a_dense_module_takes_two_bytes_a_weight_where_that_loses_nothing(
    exact: bool, tiny_sentence_transformer: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    dense = Dense(32, 32)
    dense.linear.weight.data = dense.linear.weight.data.half().float()
    dense.linear.bias.data = dense.linear.bias.data.half().float() + (0 if exact else 1e-6)
    model = load("SentenceTransformer", tiny_sentence_transformer, PACKED)
    save_pretrained(SentenceTransformer(modules=[*model, dense], device="cpu"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*_Dense/model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16 if exact else torch.float32}
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert all(torch.equal(one, other) for one, other in zip(loaded[-1].parameters(), dense.parameters(), strict=True))


def test_modules_that_call_their_tensors_alike(tiny_sentence_transformer: Path, tmp_path: Path) -> None:
    """Two towers, and dense layers after one of them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router

    towers = [load("SentenceTransformer", path, PACKED) for path in (tiny_sentence_transformer, tiny_sentence_transformer)]
    dense = [Dense(32, 32), Dense(32, 32)]
    router = Router.for_query_document([*towers[0], *dense], [*towers[1]])
    model = SentenceTransformer(modules=[router], device="cpu")
    for _ in range(2):  # once new, once in its own place
        save_pretrained(model, tmp_path / "router")
    info = read_info(tmp_path / "router")
    assert len(info.layers) == 2 * len(read_info(save_pretrained(towers[0], tmp_path / "one")).layers)
    assert sum(name.endswith("linear.weight") for name in info.float_tensors) == 2
    again = SentenceTransformer(str(tmp_path / "router"), device="cpu")
    np.testing.assert_array_equal(again.encode_query(SENTENCES), model.encode_query(SENTENCES))


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_between_the_renames(
    error: type[BaseException], bert: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = contents(saved), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise error("between")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="between"):
        save_pretrained(bert, saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


class FailingTokenizer:
    """Its save comes when the weights are written and before the new folder takes the old one's place."""

    def __init__(self, fail: Callable[[], None]) -> None:
        self.save_pretrained = lambda folder: fail()


def test_an_exception_leaves_the_old_model(bert: nn.Module, saved: Path) -> None:
    def fail() -> None:
        raise RuntimeError("interrupted")

    before = contents(saved)
    with pytest.raises(RuntimeError, match="interrupted"):
        save_pretrained(bert, saved, FailingTokenizer(fail))
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize("room", [100, 8192])  # bytes: too little for config.json; for model.safetensors
def test_a_full_disk_leaves_the_old_model(room: int, bert: nn.Module, saved: Path) -> None:
    before = contents(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_pretrained(bert, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_and_die(source: Path, target: Path, stage: str) -> None:
    """Runs in a process of its own."""
    model = load("BertModel", source, PACKED)
    if stage == "writing":
        save_pretrained(model, target, FailingTokenizer(_die))
    rename = Path.rename

    def rename_and_die(self: Path, to: Path) -> None:
        rename(self, to)
        _die()

    Path.rename = rename_and_die  # type: ignore[method-assign, assignment]  # only in this process
    save_pretrained(model, target)


@pytest.mark.parametrize("stage", ["writing", "swapping"])
def test_a_kill_leaves_the_old_model(
    stage: str, bert: nn.Module, tiny_bert: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(saved)
    process = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(tiny_bert, saved, stage))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved.exists() == (stage == "writing")  # the swap is two renames; the kill came between them
    with caplog.at_level(logging.WARNING, "hf_ternary.hub"), pytest.raises(RuntimeError, match="look"):
        save_pretrained(bert, saved, FailingTokenizer(_raise_look))
    assert contents(saved) == before
    leftover = next(saved.parent.glob(".model.new-*"))
    assert f"left {leftover}; delete it" in caplog.text
    assert ("was brought back" in caplog.text) == (stage == "swapping")
    shutil.rmtree(leftover)
    save_pretrained(bert, saved)
    assert os.listdir(saved.parent) == ["model"]


def _raise_look() -> None:
    raise RuntimeError("look")


# The Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    assert server.unhandled == []


@pytest.fixture(scope="module")
def online(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in a process for which ``hub`` is the Hugging Face Hub; this process stays offline."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }.items():
            environment.setenv(name, value)
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # the process starts now, with this environment
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _push_and_reload(kind: str, source: Path, repo: str) -> str:
    model = load(kind, source, PACKED)
    url = push_to_hub(model, repo, tokenizer=tiny_tokenizer() if kind == "BertModel" else None)
    np.testing.assert_array_equal(outputs(load(kind, repo)), outputs(model))
    return url


@pytest.mark.parametrize("kind", KINDS)
def test_push_and_reload(kind: str, floats: dict[str, Path], online: Callable[..., Any], hub: HubServer) -> None:
    repo = f"tester/{kind}"
    url = online(_push_and_reload, kind, floats[kind], repo)
    assert url == f"{hub.url}/{repo}/commit/{hub.repositories[repo].branches['main']}"
    files = hub.files(repo)
    assert files["model.safetensors"].is_lfs
    assert not files["config.json"].is_lfs
    assert "tokenizer.json" in files
    assert f'"{repo}"' in files["README.md"].content.decode()  # the usage example names the repository


def _push_measured(source: Path, results: Path, training: Path) -> str:
    """By the name alone, and with a token that is given."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", "hf_wrong")
        return push_to_hub(
            load("BertModel", source),
            "measured",
            tokenizer=tiny_tokenizer(),
            base_model="tester/full",
            results=results,
            training=training,
            commit_message="Measured",
            token=TOKEN,
        )


def test_what_is_told_of_a_model_reaches_the_hub(
    saved: Path, online: Callable[..., Any], hub: HubServer, tmp_path: Path
) -> None:
    results, training = write_results(tmp_path / "eval.json", saved), write_summary(tmp_path / "summary.json", saved)
    online(_push_measured, saved, results, training)
    files, repository = hub.files("tester/measured"), hub.repositories["tester/measured"]
    assert files["model.safetensors"].content == (saved / "model.safetensors").read_bytes()
    card = files["README.md"].content.decode()
    assert "base_model: tester/full\n" in card
    assert "| STSBenchmark | STS | cosine_spearman | 81.23 | 82.00 | 99.1 % |" in card
    assert "| 1 | the full-precision weights, compensated | 5,500 | 20,415,428 | 0.0004 | 420 | 0.925 |" in card
    assert 'BertModel.from_pretrained("tester/measured")' in card
    assert repository.messages[repository.branches["main"]] == "Measured"


def _push_natively_and_reload(kind: str, source: Path, repo: str) -> None:
    model = load(kind, source, PACKED)
    model.push_to_hub(repo)
    np.testing.assert_array_equal(outputs(load(kind, repo)), outputs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_libraries_own_push_works(
    kind: str, floats: dict[str, Path], online: Callable[..., Any], hub: HubServer
) -> None:
    online(_push_natively_and_reload, kind, floats[kind], f"tester/native-{kind}")
    assert hub.files(f"tester/native-{kind}")["model.safetensors"].is_lfs


def _download(repo: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, **options))


def _push_private(folder: Path, repo: str) -> tuple[dict[str, bytes], str]:
    """What comes down with the token, and the error without."""
    from huggingface_hub.errors import RepositoryNotFoundError

    push_to_hub(folder, repo, private=True)
    with pytest.raises(RepositoryNotFoundError) as error:
        _download(repo, token=False, force_download=True)
    with pytest.raises(OSError, match="gated|private|download"):
        transformers.BertModel.from_pretrained(repo, token=False, force_download=True)
    return contents(_download(repo)), str(error.value)


def test_a_private_repository_needs_the_token(saved: Path, online: Callable[..., Any], hub: HubServer) -> None:
    files, error = online(_push_private, saved, "tester/private")
    assert hub.repositories["tester/private"].is_private
    assert "401" in error
    del files[".gitattributes"]
    assert files.keys() == contents(saved).keys()
    assert all(files[name] == content for name, content in contents(saved).items() if name != "README.md")


def test_a_public_repository_does_not_become_private(saved: Path, online: Callable[..., Any], hub: HubServer) -> None:
    online(push_to_hub, saved, "tester/public")
    before = hub.files("tester/public")
    (saved / "README.md").write_text("secret")
    with pytest.raises(ValueError, match=r"tester/public exists and is public\. Fix: make it private on the Hub"):
        online(partial(push_to_hub, saved, "tester/public", private=True))
    assert hub.files("tester/public") == before


def _load_revisions(repo: str, revisions: list[str]) -> list[np.ndarray]:
    return [outputs(load("BertModel", repo, revision=revision)) for revision in revisions]


def test_revision_and_pull_request(bert: nn.Module, saved: Path, online: Callable[..., Any], hub: HubServer) -> None:
    repo = "tester/revisions"
    urls = []
    for options in ({}, {"revision": "v2"}, {"create_pr": True}):
        urls.append(online(partial(push_to_hub, saved, repo, **options)))
        (saved / "README.md").write_text(f"version {len(urls)}")
    assert urls[2] == f"{hub.url}/{repo}/discussions/1"
    readmes = {name: hub.files(repo, name)["README.md"].content for name in ("main", "v2", "refs/pr/1")}
    assert (readmes["v2"], readmes["refs/pr/1"]) == (b"version 1", b"version 2")
    assert readmes["main"].startswith(b"---")
    online(partial(push_to_hub, saved, repo, revision="refs/pr/1"))
    assert hub.files(repo, "refs/pr/1")["README.md"].content == b"version 3"
    for loaded in online(_load_revisions, repo, ["main", "v2", "refs/pr/1"]):
        np.testing.assert_array_equal(loaded, outputs(bert))


def _embed(model: str, revision: str | None = None) -> np.ndarray:
    return hf_ternary.load(model, revision, threads=1).encode(SENTENCES)


@pytest.mark.skipif(backends.choose().backend == "reference", reason="the C++ kernels are not built")
def test_load_takes_an_id_and_a_revision(
    floats: dict[str, Path], online: Callable[..., Any], hub: HubServer, tmp_path: Path
) -> None:
    kind, repo = "SentenceTransformer", "tester/served"
    folders = []
    for name, config in (("main", TernaryConfig()), ("v2", TernaryConfig(group_size=16))):
        model = load(kind, floats[kind], {"quantization_config": config})
        folders.append(save_pretrained(model, tmp_path / name))
        online(partial(push_to_hub, folders[-1], repo, revision=None if name == "main" else name))
    first, second = map(_embed, map(str, folders))
    assert not np.array_equal(first, second)
    before = len(hub.requests)
    np.testing.assert_array_equal(online(_embed, repo), first)
    np.testing.assert_array_equal(online(_embed, repo, "v2"), second)
    np.testing.assert_array_equal(online(_embed, repo, hub.repositories[repo].branches["v2"]), second)
    fetched = {path.rpartition("/")[2] for _, path in hub.requests[before:] if "/resolve/" in path}
    assert "config.json" in fetched
    assert "README.md" not in fetched  # only what it reads
    with pytest.raises(ValueError, match=r"tester/served has no revision 'v3'\. Fix: give one of its branches"):
        online(_embed, repo, "v3")


def _run(*arguments: str) -> str:
    """Standard output of the command line, which succeeds."""
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 0
    return out.getvalue()


def _push_float_sentence_transformer(source: Path, repo: str) -> None:
    load("SentenceTransformer", source).push_to_hub(repo)


def test_the_command_line_takes_ids(
    floats: dict[str, Path], online: Callable[..., Any], hub: HubServer, tmp_path: Path
) -> None:
    folder, repo = tmp_path / "model", "tester/typed"
    online(_push_float_sentence_transformer, floats["SentenceTransformer"], "tester/untyped")
    online(_run, "quantize", "tester/untyped", str(folder))
    url = online(_run, "push", str(folder), repo, "--public", "--message", "As typed")
    repository = hub.repositories[repo]
    assert url == f"{hub.url}/{repo}/commit/{repository.branches['main']}\n"
    assert repository.messages[repository.branches["main"]] == "As typed"
    assert not repository.is_private
    assert f"{(folder / 'model.safetensors').stat().st_size:,}" in online(_run, "info", repo)
    row = json.loads(online(_run, "encode", repo, SENTENCES[0]))
    np.testing.assert_array_equal(np.float32(row["embedding"]), load("SentenceTransformer", folder).encode(SENTENCES[0]))
    (folder / "README.md").write_text("changed")
    url = online(_run, "push", str(folder), repo, "--create-pr", "--message", "Please")
    assert url == f"{hub.url}/{repo}/discussions/1\n"
    assert repository.messages[repository.branches["refs/pr/1"]] == "Please"
    assert hub.files(repo)["README.md"].content != b"changed"


def _push_with_wrong_token(folder: Path) -> tuple[int | str | None, str]:
    """Exit status and standard error of the command line."""
    with pytest.MonkeyPatch.context() as environment, redirect_stderr(io.StringIO()) as error:
        environment.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(SystemExit) as exit_:
            main(["push", str(folder), "tester/refused"])
    return exit_.value.code, error.getvalue()


def test_a_wrong_token_is_one_line(saved: Path, online: Callable[..., Any], hub: HubServer) -> None:
    status, error = online(_push_with_wrong_token, saved)
    assert status == 2
    assert error.startswith("hf-ternary: error: ")
    assert "401" in error
    assert error.count("\n") == 1
    assert "tester/refused" not in hub.repositories


def test_a_push_that_does_not_reach_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise HTTPError("the proxy says no")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(OSError, match=r"the Hub cannot be reached \(HTTPError\('the proxy says no'\)\)\. Fix: check"):
        push_to_hub(saved, "tester/unreachable")


def _look_for_revision(repo: str, revision: str) -> str:
    with pytest.raises(ValueError, match="Fix") as error:
        model_folder(repo, ["*.json"], revision)
    return str(error.value)


def test_an_unknown_revision_is_named(saved: Path, online: Callable[..., Any]) -> None:
    online(push_to_hub, saved, "tester/unbranched")
    message = online(_look_for_revision, "tester/unbranched", "v9")
    assert message == "tester/unbranched has no revision 'v9'. Fix: give one of its branches, tags or commits"


def _push_float(source: Path, repo: str, max_shard_size: str) -> None:
    transformers.BertModel.from_pretrained(source).push_to_hub(repo, max_shard_size=max_shard_size)
    tiny_tokenizer().push_to_hub(repo)


def _push_from_hub(base: str, repo: str, **options: Any) -> None:
    push_to_hub(load("BertModel", base, PACKED, **options), repo)


def _push_changed(base: str, repo: str) -> None:
    model = load("BertModel", base)
    model.embeddings.LayerNorm.weight.data.add_(1)
    push_to_hub(model, repo)


def test_the_card_names_a_base_model_on_the_hub(tiny_bert: Path, online: Callable[..., Any], hub: HubServer) -> None:
    online(_push_float, tiny_bert, "tester/base", "5GB")
    online(_push_from_hub, "tester/base", "tester/derived")
    card = hub.files("tester/derived")["README.md"].content.decode()
    assert "base_model: tester/base\n" in card
    assert "base_model_relation: quantized\n" in card


def test_the_card_names_a_base_model_of_which_an_old_revision_was_loaded(
    tiny_bert: Path, online: Callable[..., Any], hub: HubServer
) -> None:
    online(_push_float, tiny_bert, "tester/moved", "5GB")
    repository = hub.repositories["tester/moved"]
    old = repository.branches["main"]
    repository.commit("main", {**repository.commits[old], "README.md": File(b"---\nlicense: mit\n---\n", False)})
    online(partial(_push_from_hub, "tester/moved", "tester/of-old", revision=old))
    assert "base_model: tester/moved\n" in hub.files("tester/of-old")["README.md"].content.decode()


def _push_by_a_token(source: Path, base: str, repo: str) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("HF_TOKEN")
        push_to_hub(load("BertModel", source, PACKED), repo, base_model=base, token=TOKEN)


def test_the_token_of_a_push_reads_the_base_models_card(tiny_bert: Path, online: Callable[..., Any], hub: HubServer) -> None:
    hub.repositories["tester/secret"] = Repository("tester/secret", is_private=True)
    hub.repositories["tester/secret"].commit("main", {"README.md": File(b"---\nlicense: mit\n---\n", False)})
    online(_push_by_a_token, tiny_bert, "tester/secret", "tester/of-secret")
    assert "license: mit\n" in hub.files("tester/of-secret")["README.md"].content.decode()


def test_the_card_of_a_ternary_model_from_the_hub_names_its_float_model(
    tiny_bert: Path, online: Callable[..., Any], hub: HubServer
) -> None:
    online(_push_float, tiny_bert, "tester/float", "5GB")
    online(_push_from_hub, "tester/float", "tester/ternary")
    online(_push_changed, "tester/ternary", "tester/changed")
    card = hub.files("tester/changed")["README.md"].content.decode()
    assert "base_model: tester/float\n" in card


def test_stale_shards_go(tiny_bert: Path, saved: Path, online: Callable[..., Any], hub: HubServer) -> None:
    online(_push_float, tiny_bert, "tester/stale", "50KB")
    assert "model.safetensors.index.json" in hub.files("tester/stale")
    others = {name: File(b"mine", False) for name in ("openvino/openvino_model.bin", "adapter_model.safetensors")}
    old = {name: File(b"old", False) for name in ("pytorch_model.bin", "2_Dense/model.safetensors")}
    hub.files("tester/stale").update({**others, **old})
    online(push_to_hub, saved, "tester/stale")
    weights = [name for name in hub.files("tester/stale") if name.endswith((".safetensors", ".bin", ".index.json"))]
    assert sorted(weights) == ["adapter_model.safetensors", "model.safetensors", "openvino/openvino_model.bin"]


def test_a_folder_without_a_ternary_model_is_not_pushed(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no ternary model. Fix: make one"):
        push_to_hub(tiny_bert, "tester/none")
    with pytest.raises(ValueError, match="holds no ternary model"):
        push_to_hub(tmp_path / "nothing", "tester/none")
