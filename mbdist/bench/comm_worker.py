"""One rank of ``mbdist bench comm``: ``python -m mbdist.bench.comm_worker SPEC``, with torchrun's variables set.

SPEC is JSON: {"kind": "boolean" | "dense", "config": a run config, "phases": [{"name", "codec", "steps"}], "folder"}.
Before a phase, ranks leave ``ready.<phase>.<rank>`` in the folder and wait for ``go.<phase>``, while the links are set.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from mbdist.bench.links import sent_bytes
from mbdist.bench.process import seconds_of
from mbdist.config import parse_config

_WARM_UP_STEPS = 2  # the first measures curvature only, the second sends a signal for the first time


def main(spec_file: str) -> None:
    """Run the phases and write ``result.<rank>.json``."""
    spec = json.loads(Path(spec_file).read_text())
    folder = Path(spec["folder"])
    config = parse_config(spec["config"])
    from mbdist.train.environment import leave_group, pin_accelerator, set_up_worker

    pin_accelerator(config)
    device = set_up_worker(config)
    import torch.distributed as dist

    measured = _Boolean(config, device) if spec["kind"] == "boolean" else _Dense(config, device)
    for number in range(_WARM_UP_STEPS):
        measured.step(number)
    results = []
    number = _WARM_UP_STEPS
    for phase in spec["phases"]:
        dist.barrier()
        (folder / f"ready.{phase['name']}.{dist.get_rank()}").touch()
        while not (folder / f"go.{phase['name']}").exists():
            time.sleep(0.05)
        measured.use_codec(phase["codec"])
        dist.barrier()
        before = sent_bytes()
        measured.counted_bytes()
        seconds = seconds_of(measured.step, range(number, number + phase["steps"]))
        number += phase["steps"]
        dist.barrier()
        counted = measured.counted_bytes()
        results.append(
            {
                "name": phase["name"],
                "step_s": statistics.median(seconds),
                "bytes": (sent_bytes() - before) / phase["steps"],
                "counted": {name: size / phase["steps"] for name, size in counted.items()},
                "coding_s": measured.coding.take() / phase["steps"],
            }
        )
    written = folder / f"written.{dist.get_rank()}.json"
    written.write_text(json.dumps(results))
    written.rename(folder / f"result.{dist.get_rank()}.json")  # whole from the moment that it is there
    leave_group()


class _Clock:
    """Adds up what calls of some functions take."""

    def __init__(self):
        self._seconds = 0.0

    def timing(self, function):
        def timed(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            self._seconds += time.perf_counter() - started
            return result

        return timed

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _Boolean:
    def __init__(self, config, device):
        from mbdist.comm import flip_exchange
        from mbdist.comm.communicator import Communicator
        from mbdist.train.metrics import MetricsWriter
        from mbdist.train.trainer import Trainer

        metrics = MetricsWriter(Path(config.run_dir) / "bench.jsonl", active=False)
        self.trainer = Trainer(config, device, Communicator(config.comm.timeout_s), metrics)
        self.trainer.engine.module.train()
        self.coding = _Clock()  # of signals, but for the sign words that the backward pass writes, and of flips
        for name in ("flip_counts", "flip_encode_sparse", "flip_apply_sparse", "xor_apply"):
            setattr(flip_exchange, name, self.coding.timing(getattr(flip_exchange, name)))

    def use_codec(self, name: str) -> None:
        """Encode with this codec from now on, and time what it takes."""
        from mbdist.comm.codecs import CODECS

        self.trainer.boolean.reduction.codec = _Timed(CODECS[name], self.coding)

    def step(self, number: int) -> None:
        self.trainer.step(number)

    def counted_bytes(self) -> dict[str, int]:
        return self.trainer.take_bytes()[0]


class _Timed:
    """A codec whose time is added up."""

    def __init__(self, codec, clock: _Clock):
        self._codec, self._clock = codec, clock

    def __getattr__(self, name):
        found = getattr(self._codec, name)
        return self._clock.timing(found) if name in ("encode", "encode_segment", "decode") else found


class _Dense:
    def __init__(self, config, device):
        from mbdist.bench.train import DenseTrainer

        self.coding = _Clock()  # of nothing
        self.trainer = DenseTrainer(config, device)

    def use_codec(self, name: str) -> None:
        """It has none."""

    def step(self, number: int) -> None:
        self.trainer.step(number)

    def counted_bytes(self) -> dict[str, int]:
        return {}


if __name__ == "__main__":
    main(sys.argv[1])
