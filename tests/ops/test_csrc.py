"""The C++ kernels and encoder without Python, against plain loops: those of this machine, and NEON under an emulator.

The second needs a cross compiler and qemu-user; `make neon-tools` installs both. `make sanitize` runs the first with the
compiler's checks of memory, undefined behaviour and data races.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "hf_ternary" / "csrc"
OPTIONS = ["-O1", "-std=c++17", "-ffp-contract=off", "-pthread", "-w", f"-I{SOURCES}"]

COMPILER = shutil.which("g++") or shutil.which("c++")
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
NEON_MAY_SKIP = "HF_TERNARY_REQUIRE_NEON" not in os.environ  # which .ci/run sets


def check_kernels(compiler: str, folder: Path, options: list[str], emulator: list[str]) -> list[str]:
    """Names of the kernels that were checked."""
    program = folder / "kernel_check"
    checks = [Path(__file__).with_name(name) for name in ("kernel_check.cpp", "encoder_check.cpp", "activation_check.cpp")]
    sources = [*checks, *(p for p in SOURCES.glob("*.cpp") if p.name != "native.cpp")]
    subprocess.run([compiler, *OPTIONS, *options, *map(str, sources), "-o", str(program)], check=True, timeout=250)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()


@pytest.mark.skipif(platform.machine() != "x86_64" or not COMPILER, reason="needs an x86-64 machine with g++")
def test_kernels_of_this_machine(tmp_path: Path) -> None:
    assert "scalar" in check_kernels(str(COMPILER), tmp_path, ["-march=native"], [])


@pytest.mark.skipif("HF_TERNARY_SANITIZE" not in os.environ, reason="minutes; make sanitize")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(sanitizer: str, tmp_path: Path) -> None:
    options = ["-march=native", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    assert "scalar" in check_kernels(str(COMPILER), tmp_path, options, [])


@pytest.mark.skipif(
    NEON_MAY_SKIP and not (CROSS_COMPILER and EMULATOR), reason="needs a cross compiler and qemu: make neon-tools"
)
def test_neon(tmp_path: Path) -> None:
    assert CROSS_COMPILER, "make neon-tools"
    assert EMULATOR, "make neon-tools"
    options = ["-march=armv8.2-a+dotprod", "-static"]
    assert check_kernels(CROSS_COMPILER, tmp_path, options, [EMULATOR]) == ["neon", "scalar"]


# Enough of nanobind for CMakeLists.txt to be configured.
NANOBIND = {
    "__init__.py": "",
    "__main__.py": "import pathlib; print(pathlib.Path(__file__).parent)",
    "nanobind-config.cmake": "macro(nanobind_add_module name)\n  add_library(${name} STATIC kernel_scalar.cpp)\nendmacro()",
}
# An assembler of binutils before 2.36.
OLD_ASSEMBLER = '#!/bin/sh\nfor file; do :; done\n! grep -q \'{vex}\' "$file" && exec as "$@"'


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not COMPILER or not shutil.which("cmake"), reason="needs an x86-64 machine with CMake"
)
@pytest.mark.parametrize("old", [False, True])
def test_a_kernel_that_cannot_be_assembled_is_left_out(old: bool, tmp_path: Path) -> None:
    for name, content in {**{f"nanobind/{name}": text for name, text in NANOBIND.items()}, "bin/as": OLD_ASSEMBLER}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "bin" / "as").chmod(0o755)
    command = ["cmake", "-S", SOURCES, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    flags = [f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DCMAKE_CXX_FLAGS={f'-B{tmp_path}/bin/' if old else ''}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warnings = " ".join(done.stderr.split())
    assert ("kernel_avxvnni.cpp: the compiler or its assembler does not know" in warnings) == old
    assert warnings.count("this kernel is left out") == old
