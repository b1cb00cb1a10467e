"""`mbdist launch local` whose workers are killed, or stopped for good, once each in given phases:
python struck_workers.py RUN.yaml FOLDER. What happened leaves a file in the folder.

Ray sends the functions of ``__main__`` to its workers by value; mbdist knows nothing of all this.
"""

import os
import signal
import sys
from pathlib import Path

from mbdist.config import load_config
from mbdist_launch import workers

RUN, FOLDER = sys.argv[1:]


def strike(owner, method, phase, rank, step, now, when=lambda *_: True, how=signal.SIGKILL):
    """Have the ``rank``-th worker end when it calls the method, from this step on, for the first time in the run."""
    original, mark = getattr(owner, method), Path(FOLDER) / phase

    def struck(*arguments, **named):
        if os.environ["RANK"] == str(rank) and now["step"] >= step and when(*arguments) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), how)
        return original(*arguments, **named)

    setattr(owner, method, struck)


def struck_worker(settings):
    from mbdist.checkpoint import CheckpointWriter
    from mbdist.comm.communicator import Communicator
    from mbdist.engine import Engine
    from mbdist.train import trainer

    now = {"step": -1}
    do_step = trainer.Trainer.step

    def step(self, number):
        now["step"] = number
        return do_step(self, number)

    trainer.Trainer.step = step
    strike(trainer, "token_loss", "forward", 1, 2, now)  # the loss is the end of the forward pass
    strike(Communicator, "all_to_all", "all-to-all", 0, 4, now)
    strike(Communicator, "all_gather", "flip exchange", 1, 6, now, when=lambda *call: call[-1] == "flips")
    # All shards are written, and the folder is not complete.
    strike(CheckpointWriter, "_publish", "saving", 0, 0, now, when=lambda *call: call[-1]["step"] == 8)
    strike(Engine, "backward", "backward", 1, 10, now, how=signal.SIGSTOP)
    workers._worker(settings)  # in a worker's process it is mbdist's own


if __name__ == "__main__":
    workers._worker = struck_worker
    workers.launch_local(load_config(RUN, []))
