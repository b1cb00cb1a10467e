"""Whether workers fit where they are: into the memory of a machine that they share, or each into its own GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mbdist.plan.memory import MemoryPlan

INTERPRETER_BYTES = 512 << 20  # that a process with torch, transformers and DeepSpeed keeps to itself
_NEAR = 0.8  # of the room: as far as plans of CPU workers have been off


@dataclass(frozen=True)
class Room:
    """Memory for ``workers`` that share it."""

    free_bytes: int
    workers: int = 1
    before: int = 0  # bytes of each before it begins, where it has not begun

    def taken(self, plan: MemoryPlan) -> int:
        """Bytes of all of them. Files that each maps are there once."""
        return self.workers * (self.before + plan.total) - (self.workers - 1) * plan.mapped

    def holds(self, plan: MemoryPlan) -> bool:
        return self.taken(plan) <= self.free_bytes

    def holds_barely(self, plan: MemoryPlan) -> bool:
        """Or not, if the plan is as wrong as plans may be."""
        return _NEAR * self.free_bytes < self.taken(plan) <= self.free_bytes


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes may still take here: of the machine, and of the control groups that this one is in."""
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Of every group around this process that has a limit (Linux, both versions). The files' pages count in a group,
    and go when there is need."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, used, cached = _FILES[controllers]
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield max(0, int(most) - int((folder / used).read_text()) + sum(int(stat[key]) for key in cached))
            if folder == top:
                break


_FILES = {  # (limit, used, keys of files' pages in memory.stat) by controllers, which version 2 leaves empty
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}
