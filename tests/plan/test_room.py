"""Whether workers fit: what is free, and what they take."""

import psutil
import pytest

from mbdist.plan import MemoryPlan
from mbdist.plan.room import Room, host_memory


def group(root, membership, path, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    (root / path).mkdir(parents=True)
    for name, content in files.items():
        (root / path / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_control_group_of_version_2_limits(tmp_path):
    """100 bytes, 70 in use, 20 of them pages of files; the group inside has no limit of its own."""
    limits = {"memory__max": 100, "memory__current": 70, "memory__stat": "anon 50\ninactive_file 15\nactive_file 5"}
    group(tmp_path, "0::/slice/job\n", "sys/fs/cgroup/slice", **limits)
    (tmp_path / "sys/fs/cgroup/slice/job").mkdir()
    (tmp_path / "sys/fs/cgroup/slice/job/memory.max").write_text("max\n")
    assert host_memory(tmp_path) == 50


def test_a_control_group_of_version_1_limits(tmp_path):
    """As a container sees it: named by a path that is there outside alone."""
    files = {
        "memory__limit_in_bytes": 100,
        "memory__usage_in_bytes": 120,
        "memory__stat": "total_inactive_file 0\ntotal_active_file 0",
    }
    group(tmp_path, "4:memory:/container/1\n1:cpu:/\n0::/\n", "sys/fs/cgroup/memory", **files)
    assert host_memory(tmp_path) == 0, "more than the limit"


def test_without_groups_the_machine_limits(tmp_path):
    assert host_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_workers_share_the_files_that_they_map():
    plan = MemoryPlan({"planes": 10, "teacher": 40}, 5, loss={"logits": 7}, backward={"temporaries": 3}, mapped=40)
    assert plan.total == 62
    assert Room(100).taken(plan) == 62
    assert Room(100, workers=3, before=1).taken(plan) == 3 * (1 + 22) + 40
    assert Room(63).holds_barely(plan) and not Room(61).holds_barely(plan) and not Room(100).holds_barely(plan)
