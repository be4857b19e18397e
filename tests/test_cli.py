"""The command line as a user meets it: arguments in; exit status, standard output and standard error out."""

import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import pairwise_cos_sim
from transformers import BertForMaskedLM
from typer.main import get_command

import hf_ternary
from hf_ternary import cli
from hf_ternary.__main__ import main
from hf_ternary.hub import save_pretrained
from hf_ternary.info import read_info
from tests.conftest import SENTENCES, VOCAB_SIZE, save_tiny_bert, save_tiny_vit
from tests.hub_server import TOKEN, HubServer

COMMANDS = ["quantize", "info", "encode", "bench", "push"]


class Result(NamedTuple):
    status: int | str | None
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Result(exit_.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def packed(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"quantization_config": hf_ternary.TernaryConfig()}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    return save_pretrained(model, tmp_path_factory.mktemp("cli") / "packed")


def assert_is_one_line_error(result: Result, *parts: object) -> None:
    assert result.status == 2
    assert result.err.startswith("hf-ternary: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert str(part) in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, run: Run) -> None:
    result = run(command, "--help")
    assert result.status == 0
    assert f"$ hf-ternary {command} " in result.out


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert all(command in result.out for command in COMMANDS)


def test_version(run: Run) -> None:
    assert run("--version") == Result(0, f"hf-ternary {hf_ternary.__version__}\n", "")


def test_the_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="hf-ternary")
    assert command.load() is main


def test_quantize_a_sentence_transformer(tiny_sentence_transformer: Path, packed: Path, run: Run, tmp_path: Path) -> None:
    result = run("quantize", tiny_sentence_transformer, tmp_path / "out")
    assert result.status == 0
    assert "12 ternary layers" in result.out
    made, expected = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "out", packed))
    assert [type(module) for module in made] == [type(module) for module in expected]  # pooling, normalisation
    np.testing.assert_array_equal(made.encode(SENTENCES), expected.encode(SENTENCES))


def test_quantize_converts_poolers_too_if_no_module_is_kept(
    tiny_sentence_transformer: Path, run: Run, tmp_path: Path
) -> None:
    result = run("quantize", tiny_sentence_transformer, tmp_path / "out", "--modules-to-not-convert", "none")
    assert result.status == 0
    assert "13 ternary layers" in result.out


def test_the_example_of_modules_fits_a_vit(run: Run, tmp_path: Path) -> None:
    """With every supported version of transformers: `make test-oldest`. Their modules have other names."""
    command: Any = get_command(cli.app)
    example = re.search(r"quantize \./vit vit-ternary (.*)\[/cyan\]", command.commands["quantize"].epilog)
    assert example
    result = run("quantize", save_tiny_vit(tmp_path / "vit"), tmp_path / "vit-ternary", *shlex.split(example[1]))
    assert result.status == 0, result.err
    names = [layer.name for layer in read_info(tmp_path / "vit-ternary").layers]
    assert len(names) == 6  # the pooler, and of the second block all but the query
    assert not any(re.search(r"\.0\.|\.q", name) for name in names)


def test_quantize_half_precision_weights(run: Run, tmp_path: Path) -> None:
    model = SentenceTransformer(str(save_tiny_bert(tmp_path / "bert")), device="cpu").half()
    model.save_pretrained(str(tmp_path / "half"))
    assert run("quantize", tmp_path / "half", tmp_path / "out").status == 0
    hf_ternary.load(tmp_path / "out").encode(SENTENCES)  # which reads float32


def test_quantize_with_texts_calibrates(tiny_sentence_transformer: Path, packed: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    result = run("quantize", tiny_sentence_transformer, tmp_path / "out", "--texts", tmp_path / "texts.txt")
    assert result.status == 0
    assert "set aside" not in result.out  # too few for that
    made, rounded = (SentenceTransformer(str(path), device="cpu").encode(SENTENCES) for path in (tmp_path / "out", packed))
    texts = [s for s in SENTENCES if s]
    random.Random(0).shuffle(texts)
    calibrated = hf_ternary.calibrate(str(tiny_sentence_transformer), texts, device="cpu")
    np.testing.assert_array_equal(made, calibrated.encode(SENTENCES))
    assert not np.array_equal(made, rounded)


def test_quantize_draws_from_many_texts_and_tells_how_close_it_came(
    tiny_sentence_transformer: Path, run: Run, tmp_path: Path
) -> None:
    texts = [f"{word} text {number}" for word in ("one", "two", "three") for number in range(10)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    arguments = "--texts", tmp_path / "texts.txt", "--max-texts", "4"
    result = run("quantize", tiny_sentence_transformer, tmp_path / "out", *arguments)
    assert result.status == 0
    random.Random(0).shuffle(texts)
    aside, seen = texts[:3], texts[3:7]
    made = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    calibrated = hf_ternary.calibrate(str(tiny_sentence_transformer), seen, device="cpu")
    np.testing.assert_array_equal(made.encode(SENTENCES), calibrated.encode(SENTENCES))
    original = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    cosine = pairwise_cos_sim(made.encode(aside), original.encode(aside)).mean()
    assert f"on 3 texts that were set aside: {cosine:.3f}" in result.out


def test_quantize_sets_a_hundred_texts_aside_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"text {number}" for number in range(1200)))
    seen: list[str] = []
    monkeypatch.setattr("hf_ternary.distill.calibrate.calibrate", lambda src, texts, config, device: seen.extend(texts))
    _, aside = cli._calibrate("model", str(tmp_path / "texts.txt"), 1000, hf_ternary.TernaryConfig(), None)
    assert (len(seen), len(aside)) == (1000, 100)
    assert not set(seen) & set(aside)


def test_quantize_passes_the_device_on(
    tiny_sentence_transformer: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(model: str, texts: list[str], config: hf_ternary.TernaryConfig, device: str) -> None:
        raise ValueError(f"calibrated on {device}")

    monkeypatch.setattr("hf_ternary.distill.calibrate.calibrate", calibrate)
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    arguments = "quantize", tiny_sentence_transformer, tmp_path / "out", "--texts", tmp_path / "texts.txt", "--device"
    assert_is_one_line_error(run(*arguments, "cpu:0"), "calibrated on cpu:0")
    assert_is_one_line_error(run(*arguments, "foo"), "--device foo", "Fix: use one of cpu")


def test_quantize_with_texts_needs_a_sentence_transformer(tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    result = run("quantize", tiny_bert, tmp_path / "out", "--texts", tmp_path / "texts.txt")
    assert_is_one_line_error(result, tiny_bert, "no SentenceTransformer", "leave out --texts")
    assert not (tmp_path / "out").exists()


def test_quantize_a_cross_encoder(tiny_cross_encoder: Path, run: Run, tmp_path: Path) -> None:
    assert run("quantize", tiny_cross_encoder, tmp_path / "out", "--embedding-bits", "none").status == 0
    assert {layer.kind for layer in read_info(tmp_path / "out").layers} == {"linear"}
    scores = CrossEncoder(str(tmp_path / "out"), device="cpu").predict([("a cat", "a dog")])
    assert np.isfinite(scores).all()


def test_quantize_a_transformers_model_keeps_head_and_tokenizer(run: Run, tmp_path: Path) -> None:
    source = save_tiny_bert(tmp_path / "float", "BertForMaskedLM")
    assert run("quantize", source, tmp_path / "out").status == 0
    before, after = (BertForMaskedLM.from_pretrained(path) for path in (source, tmp_path / "out"))
    assert torch.equal(before.cls.predictions.transform.dense.weight, after.cls.predictions.transform.dense.weight)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_quantize_passes_every_option_on(tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    options = "--group-size 16 --weight-scheme absmean --activation none --embedding-bits 8 --position-bits 4"
    keep = ["--modules-to-not-convert", "layer.0", "--modules-to-not-convert", "pooler"]
    more = ["--embedding-group-size", "16", "--base-model", "me/base"]
    assert run("quantize", tiny_bert, tmp_path / "out", *options.split(), *keep, *more).status == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == hf_ternary.TernaryConfig(16, "absmean", None, 8, 4, 16, ["layer.0", "pooler"]).to_dict()
    assert "base_model: me/base\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--group-size", "7"),
        ("--group-size", "-4"),
        ("--group-size", "column"),
        ("--weight-scheme", "best"),
        ("--activation", "int4"),
        ("--embedding-bits", "3"),
        ("--embedding-bits", "few"),
        ("--modules-to-not-convert", "no.such.module"),
    ],
)
def test_quantize_names_a_bad_option(option: str, value: str, tiny_bert: Path, run: Run, tmp_path: Path) -> None:
    result = run("quantize", tiny_bert, tmp_path / "out", f"{option}={value}")
    assert_is_one_line_error(result, option.strip("-").replace("-", "_"), value)
    assert os.listdir(tmp_path) == []


def test_quantize_looks_at_the_destination_first(
    tiny_sentence_transformer: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_ternary.distill.calibrate.calibrate", None)  # minutes of work: not to be reached
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    result = run("quantize", tiny_sentence_transformer, tmp_path, "--texts", tmp_path / "texts.txt")
    assert_is_one_line_error(result, tmp_path, "holds no model", "Fix")


def test_no_work_is_done_for_an_output_that_cannot_be_written(
    packed: Path, tiny_bert: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(cli, "_load", None)  # not to be reached
    result = run("encode", packed, "a", "--output", tmp_path / "file" / "more" / "out.npy")
    assert_is_one_line_error(result, "no folder can be made in", "file", "Fix")
    assert_is_one_line_error(run("quantize", tiny_bert, tmp_path / "file" / "out"), "no folder can be made in", "Fix")


def test_encode_makes_the_folder_of_its_output(packed: Path, run: Run, tmp_path: Path) -> None:
    assert run("encode", packed, "a", "--output", tmp_path / "new" / "out.npy").status == 0
    assert np.load(tmp_path / "new" / "out.npy").shape == (1, 32)


def test_quantize_refuses_what_cannot_be_right(tiny_bert: Path, packed: Path, run: Run, tmp_path: Path) -> None:
    assert_is_one_line_error(run("quantize", packed, tmp_path / "out"), packed, "ternary already", "Fix")
    assert_is_one_line_error(run("quantize", tiny_bert, tiny_bert), tiny_bert, "Fix")
    assert_is_one_line_error(run("quantize", tmp_path / "nothing", tmp_path / "out"), "nothing is no folder", "Fix")
    assert_is_one_line_error(run("quantize", "nobody/nothing", tmp_path / "out"), "nobody/nothing", "Fix")
    assert os.listdir(tmp_path) == []


def test_info_lists_every_layer(packed: Path, run: Run) -> None:
    result = run("info", packed)
    assert result.status == 0
    (row,) = [line.split() for line in result.out.splitlines() if "encoder.layer.0.intermediate.dense" in line]
    assert row[1:4] == ["linear", "2", "64x32"]
    assert row[-1] == hf_ternary.capabilities()["backend"]
    (row,) = [line.split() for line in result.out.splitlines() if "word_embeddings" in line]
    assert row[1:4] == ["embedding", "4", "200x32"]
    assert f"{(packed / 'model.safetensors').stat().st_size:,}" in result.out
    assert hf_ternary.capabilities()["reason"] in result.out
    native = hf_ternary.capabilities()["backend"] != "reference"
    assert ("native" if native else "module by module: the backend is 'reference'") in result.out.splitlines()[-1]


def test_info_of_a_float_model(tiny_bert: Path, run: Run) -> None:
    assert_is_one_line_error(run("info", tiny_bert), tiny_bert, "hf-ternary quantize")


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_encode_to_a_file(suffix: str, packed: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    assert run("encode", packed, *SENTENCES, "--output", output, "--batch-size", 2, "--device", "cpu").status == 0
    expected = SentenceTransformer(str(packed), device="cpu").encode(SENTENCES)
    if suffix == ".npy":
        found = np.load(output)
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["text"] for row in rows] == SENTENCES
        found = np.float32([row["embedding"] for row in rows])
    np.testing.assert_array_equal(found, expected)
    assert os.listdir(tmp_path) == [output.name]


def test_encode_puts_a_prompt_before_the_texts(packed: Path, run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "model")
    settings = folder / "config_sentence_transformers.json"
    prompts = {"query": "find the ", "document": "in the "}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "prompts": prompts}))
    result = run("encode", folder, "red dog", "--prompt-name", "query")
    assert result.status == 0, result.err
    row = json.loads(result.out)
    assert row["text"] == "red dog"
    expected = SentenceTransformer(str(packed), device="cpu").encode(["find the red dog"])
    np.testing.assert_array_equal(np.float32([row["embedding"]]), expected)
    assert_is_one_line_error(run("encode", folder, "red dog", "--prompt-name", "passage"), "passage", "query")


def test_encode_by_a_sparse_encoder(tiny_sparse_encoder: Path, run: Run, tmp_path: Path) -> None:
    assert run("quantize", tiny_sparse_encoder, tmp_path / "out").status == 0
    result = run("encode", tmp_path / "out", "a cat", "a dog")
    assert result.status == 0, result.err
    found = np.float32([json.loads(line)["embedding"] for line in result.out.splitlines()])
    assert found.shape == (2, VOCAB_SIZE)
    expected = SparseEncoder(str(tmp_path / "out"), device="cpu").encode(["a cat", "a dog"]).to_dense()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_a_failed_write_leaves_what_was_there(
    packed: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Any, array: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    (tmp_path / "out.npy").write_bytes(b"before")
    monkeypatch.setattr(np, "save", fail)
    assert_is_one_line_error(run("encode", packed, "a cat", "--output", tmp_path / "out.npy"), "No space left")
    assert (tmp_path / "out.npy").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.npy"]


def test_encode_reads_lines(packed: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").write_text("a cat\na dog\n")
    from_file = run("encode", packed, "--input", tmp_path / "texts")
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\na dog\n"))
    from_stdin = run("encode", packed)
    assert [json.loads(line)["text"] for line in from_file.out.splitlines()] == ["a cat", "a dog"]
    assert from_stdin.out == from_file.out


def test_encode_reads_and_writes_utf8_wherever_it_runs(packed: Path) -> None:
    command = [sys.executable, "-m", "hf_ternary", "encode", str(packed)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, input="\ufeffa \u732b".encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["text"] == "a \u732b"


def test_encode_takes_a_line_as_a_text(packed: Path, run: Run, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\u2028and the same\x0cline\r\n\ntwo\n", encoding="utf-8")
    run("encode", packed, "-i", texts, "-o", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["text"] for row in rows] == ["one\u2028and the same\x0cline", "", "two"]


def test_encode_names_bad_input(packed: Path, tiny_cross_encoder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    assert_is_one_line_error(run("encode", packed, "--input", tmp_path / "empty"), "there is no text", "Fix")
    assert_is_one_line_error(run("encode", packed, "--input", tmp_path / "none"), "none")
    assert_is_one_line_error(run("encode", packed, "a", "--output", tmp_path / "out.csv"), "out.csv", "Fix")
    assert_is_one_line_error(run("encode", tiny_cross_encoder, "a"), "CrossEncoder", "Fix")
    assert_is_one_line_error(run("encode", packed, "a", "--input", tmp_path / "empty"), "both texts and --input", "Fix")
    for device in ("foo", "cuda:77"):
        assert_is_one_line_error(run("encode", packed, "a", "--device", device), device, "Fix: use one of cpu")


def test_encode_never_writes_a_nan(packed: Path, run: Run, tmp_path: Path) -> None:
    model = SentenceTransformer(str(packed), device="cpu")
    model.transformers_model.embeddings.word_embeddings.weight_scale[:] = torch.inf
    model.save_pretrained(str(tmp_path / "broken"))
    result = run("encode", tmp_path / "broken", "a cat", "--output", tmp_path / "out.npy")
    assert_is_one_line_error(result, "Fix")
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_bench_compares_with_float32(kind: str, packed: Path, tiny_cross_encoder: Path, run: Run, tmp_path: Path) -> None:
    if kind == "CrossEncoder":
        assert run("quantize", tiny_cross_encoder, tmp_path / "cross").status == 0
        packed = tmp_path / "cross"
    (tmp_path / "texts").write_text("a cat\na dog sat on the red cat\n")
    result = run("bench", packed, "--input", tmp_path / "texts")
    assert result.status == 0, result.err
    rows = [line for line in result.out.splitlines() if line.lstrip("│ ").startswith(("ternary", "float32"))]
    assert len(rows) == 2
    assert "1.00x" in rows[1]
    assert "2 texts" in result.out


def test_bench_of_the_ternary_model_alone(packed: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a cat\na dog sat on the red cat\n")
    before = torch.get_num_threads()
    options = ["--no-baseline", "--threads", 1, "--batch-size", 7, "--rounds", 6]
    try:
        result = run("bench", packed, "--input", tmp_path / "texts", *options)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert result.status == 0, result.err
    assert "ternary" in result.out
    assert "float32" not in result.out
    assert "1.00x" not in result.out
    assert "2 texts, 13 tokens, batches of 7, 1 threads, median of 6 rounds" in result.out


def test_bench_of_a_model_of_images(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", minversion="6")
    pytest.importorskip("PIL", reason="images need Pillow")
    assert run("quantize", save_tiny_vit(tmp_path / "vit"), tmp_path / "ternary").status == 0
    assert_is_one_line_error(run("bench", tmp_path / "ternary"), "embeds no texts", "Fix")


def test_bench_of_a_float_model(tiny_sentence_transformer: Path, run: Run) -> None:
    assert_is_one_line_error(run("bench", tiny_sentence_transformer), "holds no ternary model", "hf-ternary quantize")


def test_bench_needs_five_rounds(packed: Path, run: Run) -> None:
    result = run("bench", packed, "--rounds", 4)
    assert result.status == 2
    assert "--rounds" in result.err


def test_an_error_of_the_network_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise HTTPError("the proxy\nsays no")

    monkeypatch.setattr("hf_ternary.cli.model_folder", fail)
    assert_is_one_line_error(run("encode", "tester/model", "a"), "the Hub cannot be reached", "says no", "Fix")


@pytest.mark.parametrize("position", [0, 1, 4])
def test_debug_shows_the_traceback_wherever_it_stands(position: int, packed: Path) -> None:
    arguments = ["encode", str(packed), "--input", os.devnull]
    arguments.insert(position, "--debug")
    with pytest.raises(ValueError, match="there is no text"):
        main(arguments)


@pytest.mark.parametrize("package", ["typer", "torch", "sentence_transformers"])
def test_a_missing_package_names_the_fix(
    package: str, packed: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "typer":
        monkeypatch.delitem(sys.modules, "hf_ternary.cli")
    result = run("bench" if package == "torch" else "encode", packed, *([] if package == "torch" else ["a"]))
    assert_is_one_line_error(result, f"{package} is not installed. Fix: pip install 'hf_ternary[hf]'")


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "from hf_ternary.__main__ import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_push_passes_every_option_on(packed: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("hf_ternary.hub.push_to_hub", lambda *given, **options: asked.append((given, options)) or "the URL")
    options = ["--public", "--revision", "v2", "--create-pr", "--message", "Why"]
    assert run("push", packed, "me/model", *options) == Result(0, "the URL\n", "")
    assert run("push", packed, "me/model").status == 0
    named = {"private": False, "revision": "v2", "create_pr": True, "commit_message": "Why"}
    nothing = {"private": None, "revision": None, "create_pr": False, "commit_message": None}
    assert asked == [((packed, "me/model"), named), ((packed, "me/model"), nothing)]


def test_push_in_a_real_process(packed: Path) -> None:
    with HubServer() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        command = [sys.executable, "-m", "hf_ternary", "push", str(packed), "tester/cli", "--private"]
        pushed = subprocess.run(command, env={**os.environ, **online}, capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{hub.url}/tester/cli/commit/")
    assert hub.files("tester/cli")["model.safetensors"].content == (packed / "model.safetensors").read_bytes()
    assert hub.repositories["tester/cli"].is_private
    assert hub.unhandled == []
