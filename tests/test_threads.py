import os
from pathlib import Path

import pytest

from hf_ternary import threads


@pytest.fixture
def eight_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on 8 cores, and neither a quota nor a variable says anything else."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "QUOTAS", [[tmp_path / file.name for file in files] for files in threads.QUOTAS])
    for name in threads.THREADS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1200000 100000"}, 8),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cores_are_those_of_the_container(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    assert threads.cores() == expected


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("ours", "openmp", "expected"),
    [("3", "5", 3), ("", "5", 5), (None, "2,1", 2), (None, "many", 8), (None, "0", 8), ("99", "2", 8)],
)
def test_cores_are_as_many_as_asked_for(
    ours: str | None, openmp: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    if ours is not None:
        monkeypatch.setenv("HF_TERNARY_NUM_THREADS", ours)
    assert threads.cores() == expected


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("value", ["0", "-2", "few"])
def test_an_impossible_number_of_threads_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TERNARY_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"HF_TERNARY_NUM_THREADS='{value}' is no number of threads: use"):
        threads.cores()
