"""Ranks that differ stop at the start; ranks that are gone or stuck are an error, not a hang."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import warm
from ranks import run_on_ranks

from mbdist.comm.agreement import agree, share_launch_settings
from mbdist.comm.communicator import Communicator
from mbdist.comm.signal_exchange import SignalExchange
from mbdist.errors import UserError
from mbdist.train.watchdog import Watchdog
from mbdist_kernels import launch


def _disagreeing():
    communicator = Communicator(60)
    agree(communicator, {"seed": "1", "comm.codec": "'sign'"})  # passes
    digest = {"digest": "ab"} if communicator.rank else {}
    with pytest.raises(UserError) as raised:
        agree(communicator, {"seed": str(communicator.rank // 2), "comm.codec": "'sign'"} | digest)
    return str(raised.value)


def test_workers_that_differ_are_told_in_what(tmp_path):
    for message in run_on_ranks(3, tmp_path, _disagreeing):
        assert "seed is 0 on worker 0, but 1 on worker 2" in message
        assert "digest is (absent) on worker 0, but ab on worker 1" in message
        assert "codec" not in message


def _with_tables_of_their_own(folder):
    communicator = Communicator(60)
    launch.TUNED = Path(folder) / str(communicator.rank)  # what every node has on its own disk
    launch.measured.cache_clear()
    before = launch.settings("vote"), launch.settings("dequantize", 2)
    try:
        share_launch_settings(communicator)
        return before, (launch.settings("vote"), launch.settings("dequantize", 2))
    finally:
        launch.use_table(None)
        launch.TUNED = Path(launch.__file__).with_name("tuned")
        launch.measured.cache_clear()


def test_all_workers_launch_kernels_by_the_table_of_the_first(tmp_path):
    ours, theirs = {"BLOCK": 512, "num_warps": 2}, {"BLOCK": 8192, "num_warps": 8}
    blocks = {"BLOCK_ROWS": 2, "BLOCK_WORDS": 2, "num_warps": 1}
    tables = {"vote": {"": ours}}, {"vote": {"": theirs}, "dequantize": {"K=2": blocks}}
    for rank, table in enumerate(tables):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / f"{launch.device_name()}.json").write_text(json.dumps(table))
    (first, shared), (second, also_shared) = run_on_ranks(2, tmp_path, _with_tables_of_their_own, tmp_path)
    rule = launch.rule("dequantize", 2)
    assert first == (ours, rule) and second == (theirs, blocks), "the tables differ"
    assert shared == also_shared == (ours, rule)


def _with_a_lost_peer(rank, world_size, folder, how):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    communicator = Communicator(5)
    communicator.all_reduce_sum(torch.ones(1), "statistics")  # connected
    if rank == 1:
        os.kill(os.getpid(), how)
        return
    started = time.monotonic()
    try:
        words = torch.zeros(world_size, 1 << 20, dtype=torch.int32)
        communicator.all_to_all(words, torch.empty_like(words), "signal").wait()
    except RuntimeError:
        torch.save(time.monotonic() - started, f"{folder}/rank_0.pt")
    os._exit(0)  # no farewell to a peer that is gone


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_lost_raises_within_the_timeout(tmp_path, how):
    ranks = [warm.Process(target=_with_a_lost_peer, args=(rank, 2, str(tmp_path), how)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(60)
    ranks[1].kill()
    ranks[1].join()
    assert torch.load(tmp_path / "rank_0.pt") < 15


def _hanging(rank, world_size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    communicator = Communicator(60)
    if rank == 1:
        time.sleep(60)
    sys.stderr = Path(f"{folder}/log").open("w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    communicator.activity.enter("flips")
    Watchdog(2, rank, communicator.activity)
    exchange = SignalExchange(communicator, 1, 2, lambda item, words: None)
    for item in range(3):
        exchange.send(item, torch.zeros(world_size, 4, dtype=torch.int32))
    exchange.finish()


def test_a_worker_that_waits_for_a_peer_says_in_what_and_ends(tmp_path):
    ranks = [warm.Process(target=_hanging, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(40)
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == 1
    log = (tmp_path / "log").read_text()
    said = r"worker 0 hangs: for \d+ s in flips, waiting for the other workers in signal, bucket 0"
    assert re.search(said, log), log
    assert "signal_exchange.py" in log, "the stack shows where"
