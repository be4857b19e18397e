"""How many threads a process should use: what it was told, may run on and has a quota for. Does not import torch."""

import math
import os
from pathlib import Path

# Of a container, by cgroup 2 and 1: microseconds of processor time in a period, and the period.
QUOTAS = [
    [Path("/sys/fs/cgroup/cpu.max")],
    [Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")],
]
THREADS = ("HF_TERNARY_NUM_THREADS", "OMP_NUM_THREADS")


def cores() -> int:
    """CPU cores that this process should use: as many as ``HF_TERNARY_NUM_THREADS`` says, else ``OMP_NUM_THREADS``, else all
    that it may run on, within its container's quota (cgroup 1 or 2), which bound the others too.

    Raises:
        ValueError: ``HF_TERNARY_NUM_THREADS`` is no positive number.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _quota() or allowed, _wanted_threads() or allowed)


def _quota() -> int | None:
    """CPUs by the container's quota, rounded up; None without one."""
    for files in QUOTAS:
        try:
            quota, period = (int(word) for file in files for word in file.read_text(encoding="ascii").split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0:  # cgroup 1 writes -1 for none
            return math.ceil(quota / period)
    return None


def _wanted_threads() -> int | None:
    """What the first variable of :data:`THREADS` that is set says; None without one."""
    for name in THREADS:
        value = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP's may be a list, by levels of nesting
        if value.isdecimal() and int(value):
            return int(value)
        if value and name == THREADS[0]:
            raise ValueError(f"{name}={value!r} is no number of threads: use a whole number from 1 on")
    return None
