"""DeepSpeed, and nothing else imports it: ZeRO holds the float state and, in stage 3, the planes."""

import deepspeed
import torch._dynamo

# DeepSpeed would compile a shared-memory all-reduce for CPU ranks at the first start. Training does not use it, and the
# build is guarded by a lock file that a killed process leaves behind and every later start waits for.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# ZeRO imports Muon whatever the optimizer is, and Muon's torch.compile would import Inductor: a second of every start.
with torch._dynamo.config.patch(disable=True):
    import deepspeed.runtime.zero.muon.muon_optimizer

from mbdist.engine.engine import Engine  # noqa: E402
from mbdist.engine.placement import place  # noqa: E402

__all__ = ["Engine", "place"]
