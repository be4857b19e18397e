"""The choice of a kernel, and what it says about itself. Each forced choice needs a process of its own."""

import os
import subprocess
import sys

import pytest

from hf_ternary.ops import backends

USE = """
import torch
from hf_ternary import packing
from hf_ternary.ops import backends, linear
native, used = backends.native(), []
if native:
    pack = native.PackedWeight
    native.PackedWeight = lambda backend, *rest: used.append(backend) or pack(backend, *rest)
x, codes = torch.arange(40.).reshape(2, 20), torch.ones(3, 20, dtype=torch.int8)
y = linear(x, packing.pack(codes), torch.ones(3, 1), None)
torch.testing.assert_close(y, x @ codes.T.float(), rtol=0.01, atol=0.1)
assert used == [name for name in [backends.choose().backend] if name != "reference"]  # what really computed
print(backends.capabilities()["backend"])
"""
CHOOSE = "from hf_ternary.ops import backends; backends.choose()"
HIDE_KERNELS = "import sys; sys.modules['hf_ternary._native'] = None\n"
BREAK_KERNELS = """
import sys
class Broken:
    def find_spec(name, path=None, target=None):
        if name == "hf_ternary._native":
            raise ImportError("libstdc++.so.6: GLIBCXX_3.4.32 not found")
sys.meta_path.insert(0, Broken)
"""


def run(script: str, backend: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != backends.VARIABLE}
    if backend is not None:
        environment[backends.VARIABLE] = backend
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


def test_capabilities() -> None:
    found = backends.capabilities()
    assert found["backend"] in found["usable"]
    assert set(found["usable"]) <= {*found["compiled"], "reference"}
    assert set(found["compiled"]) <= set(backends.KERNELS)
    assert found["threads"] >= 1
    if not found["forced"]:
        assert found["backend"] == found["usable"][0]


def test_capabilities_do_not_import_torch() -> None:
    script = "import sys, hf_ternary; print(hf_ternary.capabilities()); assert 'torch' not in sys.modules"
    assert run(script).returncode == 0


@pytest.mark.parametrize("backend", backends.usable())
def test_forced(backend: str) -> None:
    done = run(USE, backend)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, backend, "")


@pytest.mark.parametrize("value", ["auto", ""])
def test_automatic(value: str) -> None:
    script = "from hf_ternary.ops import backends; print(*backends.choose()[:2])"
    assert run(script, value).stdout.split() == [backends.usable()[0], "False"]


def test_unknown_name() -> None:
    done = run(USE, "avx9")
    assert "ValueError: HF_TERNARY_BACKEND='avx9' is unknown: use auto, reference, avx512vnni" in done.stderr


@pytest.mark.parametrize("backend", sorted(set(backends.KERNELS) - set(backends.usable())))
def test_forced_but_not_usable(backend: str) -> None:
    lacking = backends.compiled().get(backend)
    done = run(CHOOSE, backend)  # as USE would, which imports torch first
    assert done.returncode != 0
    expected = f"ValueError: HF_TERNARY_BACKEND={backend}: this CPU lacks {lacking}" if lacking else "ImportError: "
    assert expected in done.stderr
    assert f"Available here: auto, {', '.join(backends.usable())}" in done.stderr


def test_kernels_not_built() -> None:
    done = run(HIDE_KERNELS + USE)
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "the C++ kernels are not built, so the slower torch reference runs. Fix: install a C++ compiler" in done.stderr


def test_kernels_built_for_another_system() -> None:
    why = "the C++ kernels cannot be loaded (libstdc++.so.6: GLIBCXX_3.4.32 not found)"
    done = run(BREAK_KERNELS + USE)
    assert done.stdout.strip() == "reference"
    assert f"{why}, so the slower torch reference runs" in done.stderr
    assert f"ImportError: HF_TERNARY_BACKEND=scalar: {why}" in run(BREAK_KERNELS + USE, "scalar").stderr


def test_kernels_not_built_but_forced() -> None:
    done = run(HIDE_KERNELS + USE, "scalar")
    assert "ImportError: HF_TERNARY_BACKEND=scalar: the C++ kernels are not built" in done.stderr
    assert run(HIDE_KERNELS + USE, "reference").stderr == ""
