"""The NEON kernel on any Linux machine: cross-compiled and run under an emulator (`make neon-tools` installs both)."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "hf_ternary" / "csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64: make neon-tools")
def test_neon_equals_plain_loops(tmp_path: Path) -> None:
    sources = [Path(__file__).with_name("kernel_check.cpp"), *(p for p in SOURCES.glob("*.cpp") if p.name != "native.cpp")]
    options = ["-O2", "-std=c++17", "-ffp-contract=off", "-march=armv8.2-a+dotprod", "-static", "-pthread", "-w"]
    program = tmp_path / "kernel_check"
    subprocess.run(
        [str(COMPILER), *options, f"-I{SOURCES}", *map(str, sources), "-o", str(program)], check=True, timeout=200
    )
    done = subprocess.run([str(EMULATOR), str(program)], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.split()) == (0, ["neon", "scalar"]), done.stdout
