"""The speed recipe: what it writes is complete."""

import json
from pathlib import Path

from typer.testing import CliRunner

import benchmark


def test_kernels(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    options = ["kernels", "--quick", "--repeats", "2", "--threads", "1", "--rows", "3", "--output", str(output)]
    done = CliRunner().invoke(benchmark.app, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "384 x 384" in done.output
    written = json.loads(output.read_text())
    assert {"commit", "hardware", "versions", "seed", "capabilities"} <= written.keys()
    (cell,) = written["cells"]
    assert (cell["threads"], cell["in_features"], cell["out_features"], cell["rows"]) == (1, 384, 384, 3)
    assert {"ternary", "float32"} <= cell["microseconds"].keys()
    assert cell["speedup"].keys() == cell["microseconds"].keys() - {"ternary"}
