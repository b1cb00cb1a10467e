"""What one worker process of a run does, from joining the group to the saved model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mbdist.checkpoint import Checkpoint, check_inputs
from mbdist.comm.agreement import agree
from mbdist.comm.communicator import Communicator
from mbdist.config.schema import RunConfig
from mbdist.errors import Interrupted
from mbdist.model.loading import safetensors_of
from mbdist.train.environment import all_cores, set_up_worker
from mbdist.train.leaving_nodes import LeavingNodes
from mbdist.train.memory_check import check_memory
from mbdist.train.metrics import MetricsWriter
from mbdist.train.prepare import preparation_key, prepare, wait_until_prepared
from mbdist.train.run_folder import go_on_from, starting_checkpoint
from mbdist.train.stop_signals import StopRequest, stop_file
from mbdist.train.trackers import check_installed, open_trackers
from mbdist.train.trainer import Trainer
from mbdist.train.watchdog import Watchdog


def run_worker(
    config: RunConfig,
    a_node_is_leaving: Callable[[], bool] | None = None,  # all workers ask together; None: nobody knows
) -> None:
    """Everything that one of ``cluster.workers`` processes does."""
    device = set_up_worker(config)
    communicator = Communicator(config.comm.timeout_s)
    activity = communicator.activity
    watchdog = Watchdog(config.train.hang_timeout_s, communicator.rank, activity)
    config = config.at_size(communicator.world_size)
    metrics = MetricsWriter(Path(config.run_dir) / "metrics.jsonl", active=communicator.rank == 0)
    stopping = StopRequest(stop_file(config.run_dir))

    def between() -> None:
        activity.enter("preparing" if communicator.rank == 0 else "waiting until worker 0 has prepared")
        if stopping.seen:
            stopping.pass_on()
            raise Interrupted(0)

    activity.enter("opening the checkpoint")
    found = communicator.all_gather_objects(starting_checkpoint(config), "agreement")[0]  # as rank 0 sees the folder
    saved = Checkpoint(found, communicator.rank, communicator.world_size) if found is not None else None
    key = preparation_key(config)
    agree(communicator, {"the digest of the model's files and of the settings that it is prepared with": key})
    if saved is not None:  # before another model is converted in the place of the one that it needs
        check_inputs(saved.folder, saved.state, {"model": key})
    if any(communicator.all_gather_objects(stopping.seen, "agreement")):  # all of them leave, or none
        raise Interrupted(saved.step if saved is not None else 0)
    if config.train.steps and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        # A run that goes on has fitted before: what is short now may be there in a moment.
        check_memory(config, device, metrics.write, enforce=config.cluster.check_memory and saved is None)
    if communicator.rank == 0:
        check_installed(config)
        with activity.unwatched("fetching the model"):
            safetensors_of(config.model)
        activity.enter("preparing")
        with all_cores():
            prepare(config, metrics, between=between)
    else:
        wait_until_prepared(config, between)
    activity.enter("loading the models")
    leaving = LeavingNodes(a_node_is_leaving)
    trainer = Trainer(config, device, communicator, metrics, saved=saved, stopping=stopping, leaving=leaving)
    if communicator.rank == 0:
        go_on_from(config, found)
        metrics.copy_to(open_trackers(config, trainer.first_step))
    if saved is None:
        trainer.evaluate("float")
        trainer.evaluate("converted")
    if config.train.steps:
        trainer.train()
        trainer.evaluate("finetuned")
    trainer.save()
    watchdog.stop()
    trainer.close()
