"""The machine and the versions that figures belong to."""

from __future__ import annotations

import os
import platform
import sysconfig
from importlib import metadata

PACKAGES = ("triton-distributed", "uvloop", "msgspec", "numpy", "grpcio")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python_build() -> dict[str, object]:
    """How this Python was built. Profile-guided (`pgo`) and link-time (`lto`) optimisation save some 20 % of the CPU.

    They are the options of `configure`. Debian's Python is optimised without these options, so it shows none.
    """
    told = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "pgo": "--enable-optimizations" in told,
        "lto": "--with-lto" in told and "--with-lto=no" not in told,
        "compiler": platform.python_compiler(),
    }


def describe() -> dict[str, object]:
    """CPU, cores that this process may use, memory, system, Python with its build, and packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "python_build": python_build(),
        "packages": {package: _version(package) for package in PACKAGES},
    }
