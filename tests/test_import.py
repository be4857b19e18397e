"""`import hf_ternary` is light; each test is a process of its own, because this one has long imported torch."""

import subprocess
import sys
from importlib.resources import files

import pytest


def run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_neither_torch_nor_transformers():
    heavy = run("import sys, hf_ternary; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])")
    assert heavy == "[]"


def test_import_loads_nothing_but_the_standard_library():
    """What an import costs, without a clock."""
    code = (
        "import sys; before = set(sys.modules); import hf_ternary\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run(code) == "{'hf_ternary'}"


def test_config_needs_neither_torch_nor_transformers():
    code = (
        "import sys\nclass Missing:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import hf_ternary; print(hf_ternary.TernaryConfig().quant_method, hf_ternary.capabilities()['backend'])"
    )
    method, backend = run(code).split()
    assert method == "ternary"
    assert backend


def test_type_checkers_read_its_annotations():
    assert files("hf_ternary").joinpath("py.typed").is_file()


def test_public_names_exist_and_no_others():
    import hf_ternary

    for name in hf_ternary.__all__:
        assert getattr(hf_ternary, name) is not None
    assert dir(hf_ternary) == sorted(hf_ternary.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Ternary'"):
        hf_ternary.Ternary  # noqa: B018
