"""How many processes serve a program, and how they are kept: `Replicas`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from triton_distributed.supervisor.replica import INDEX, LINK

NUMBER = "{replica}"
"""What stands for the replica's number in the value of a variable."""

SPREAD = 5
"""A replica is renewed after N to N + N/5 requests, so that replicas with equal load do not all reach it at once."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """The processes of `trd.run(processes=…)`, each of which serves the whole program.

    Attributes:
        count: the number of processes, at least 1.
        env: variables for each process; `{replica}` in a value stands for the process's number, from 0 on. For example
            `{"CUDA_VISIBLE_DEVICES": "{replica}"}` gives each one a GPU.
        pin: bind each process to its own share of the CPU cores that this process may use. If there are fewer cores
            than processes, some processes share a core.
        max_requests: replace a process that has served about so many requests, one process at a time; None for never.
        drain_first: let a process drain before its successor starts, for example if a GPU has memory for one only. By
            default the successor starts first, and the old process drains when the successor can be called.
        reload: replace the processes when a Python file in the program's folder changes. It needs the package
            `watchfiles`, which the extra `cli` installs.

    Raises:
        TypeError: a number or a variable has the wrong type.
        ValueError: a number is less than 1, or a variable has no valid name or is the supervisor's own.
    """

    count: int
    env: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    pin: bool = field(default=False, kw_only=True)
    max_requests: int | None = field(default=None, kw_only=True)
    drain_first: bool = field(default=False, kw_only=True)
    reload: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("max_requests", self.max_requests)):
            if name == "max_requests" and value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"Replicas: {name} is a number, not {value!r}")
            if value < 1:
                raise ValueError(f"Replicas: {name}={value}: it must be at least 1")
        for name, text in self.env.items():
            if {type(name), type(text)} != {str}:
                raise TypeError(f"Replicas: env has texts, not {name!r}: {text!r}")
            if not name or "=" in name or "\0" in name + text:
                raise ValueError(f"Replicas: env: {name!r}={text!r} is not a valid variable")
            if name in (INDEX, LINK):
                raise ValueError(f"Replicas: env: the supervisor itself sets {name}")

    def environment(self, index: int) -> dict[str, str]:
        """The variables of one replica."""
        return {name: text.replace(NUMBER, str(index)) for name, text in self.env.items()}

    def limit(self) -> int | None:
        """Draw the number of requests after which a replica is replaced; None for no limit."""
        if self.max_requests is None:
            return None
        return self.max_requests + random.randint(0, self.max_requests // SPREAD)
