"""Measurements in processes of their own."""

import os
import time
from pathlib import Path

import psutil
import pytest
from processes import Forked

from mbdist.bench.process import in_own_process
from mbdist.config import load_config


def _measure(_config, file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def _bench(file):
    in_own_process(_measure, load_config("configs/quickstart.yaml", []), file)


@pytest.mark.slow
def test_a_bench_that_is_killed_leaves_no_measurement_behind(tmp_path):
    bench = Forked(_bench, str(file := tmp_path / "pid"))
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text()):
        assert bench.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    measurement = psutil.Process(int(file.read_text()))
    bench.send_signal(9)
    measurement.wait(timeout=30)
