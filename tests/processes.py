"""Processes forked from one that has imported everything: each is as fresh as one that a user starts, without the
seconds of its imports."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mbdist.train.metrics import read_metrics

warm = multiprocessing.get_context("forkserver")
warm.set_forkserver_preload(
    [
        "pytest",
        "mbdist.cli.main",
        "mbdist.train.worker",
        "mbdist.train.finish",
        "transformers.models.llama.modeling_llama",
    ]
)


class Forked:
    """``main(*arguments)`` in a process of its own; for its callers a ``subprocess.Popen``."""

    def __init__(self, main, *arguments, environment=None, cwd=None):
        self._output = tempfile.TemporaryDirectory()
        self._streams = [Path(self._output.name) / name for name in ("stdout", "stderr")]
        place = (dict(environment or os.environ), str(cwd or Path.cwd()), self._streams)
        self._process = warm.Process(target=_run, args=(place, main, arguments))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=300):
        """When it has ended: ``returncode``, ``stdout``, ``stderr``."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return subprocess.CompletedProcess(
            self._process.name, self._process.exitcode, *(stream.read_text() for stream in self._streams)
        )

    def communicate(self):
        done = self.wait()
        return done.stdout, done.stderr


def _run(place, main, arguments):
    environment, cwd, streams = place
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    main(*arguments)


def mbdist(*arguments, **place):
    """The command as a user types it, running."""
    return Forked(_command, [str(argument) for argument in arguments], **place)


def _command(arguments):
    from mbdist.cli.main import main

    sys.argv = ["mbdist", *arguments]
    main()


def wait_for(run_dir, holds, *running, seconds=400):
    """Until ``holds`` of what a run has logged; ``running`` must not end before."""
    log, deadline = Path(run_dir) / "metrics.jsonl", time.monotonic() + seconds
    while not (log.exists() and holds(list(read_metrics(log)))):
        for process in running:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, log.exists() and log.read_text()[-2000:]
        time.sleep(0.02)


def logged(event):
    return lambda records: any(record["event"] == event for record in records)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_training(settings):
    """What ``mbdist train`` does on every rank under torchrun, without its end: the model is not loaded again in one
    more process."""
    return start(train_rank, settings)


def start(main, settings, *arguments):
    """``main(settings, *arguments)`` on every rank, as torchrun starts them."""
    workers = settings["cluster"]["workers"]
    group = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]
    return [Forked(main, settings, *arguments, environment=place) for place in places]


def train(settings):
    join(start_training(settings))


def join(ranks, timeout=300):
    """Until all ranks are done; where one fails, the others are killed, as torchrun does."""
    deadline = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        assert time.monotonic() < deadline, "the ranks did not end"
        time.sleep(0.01)
    failed = [rank for rank in ranks if rank.poll()]
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)
    assert not failed, failed[0].communicate()


def train_rank(settings, a_node_is_leaving=None):
    from mbdist.config import parse_config
    from mbdist.train.ending import end_process
    from mbdist.train.environment import leave_group
    from mbdist.train.run_folder import open_run_folder
    from mbdist.train.worker import run_worker

    config = parse_config(settings)
    run_worker(open_run_folder(config) if os.environ["RANK"] == "0" else config, a_node_is_leaving)
    leave_group()
    end_process()
