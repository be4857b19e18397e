"""The published tables are what the results say."""

import json
import subprocess
import sys
from pathlib import Path

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
