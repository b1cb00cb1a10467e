"""What following and stopping a job on a cluster comes to, without a cluster."""

import subprocess
import sys
from types import SimpleNamespace

import ray
from ray import JobID, PlacementGroupID
from ray.job_submission import JobStatus

from mbdist_launch import JobServer, job, workers


class _Client:
    """A job that ends when the server has been asked thrice; the first connection to its log is lost."""

    asked = connections = 0

    def get_job_status(self, job_id):
        self.asked += 1
        if self.asked == 2:
            raise ConnectionError("away")
        return JobStatus.RUNNING if self.asked < 4 else JobStatus.FAILED

    async def tail_job_logs(self, job_id):
        self.connections += 1
        yield "one\n"
        if self.connections == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield "two\n"

    def get_job_info(self, job_id):
        return SimpleNamespace(driver_exit_code=3)


def test_a_log_whose_connection_is_lost_is_followed_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(job, "_POLL_S", 0)
    server = JobServer.__new__(JobServer)
    server._client = _Client()
    assert server.follow("some_job") == 3
    assert capsys.readouterr().out == "one\ntwo\n"


def test_only_the_workers_of_this_run_count(monkeypatch):
    mine, other = JobID.from_int(7), JobID.from_int(8)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=mine.hex))
    for job_id, state, expected in ((mine, "CREATED", True), (mine, "PENDING", False), (other, "CREATED", False)):
        group = {"placement_group_id": PlacementGroupID.of(job_id).hex(), "state": state}
        monkeypatch.setattr("ray.util.placement_group_table", lambda group=group: {"it": group})
        assert workers._has_workers() == expected


def test_launchers_import_no_model_code():
    """A submission from a login node waits for none of it."""
    heavy = "('transformers', 'deepspeed', 'datasets')"
    code = f"import sys, mbdist_launch; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
