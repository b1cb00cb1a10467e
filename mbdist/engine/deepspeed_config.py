"""The DeepSpeed config that follows from a run config: batch size and stage are declared once, there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from mbdist.config.schema import RunConfig

SMALL_FLOATS = 100_000  # elements; stage 3 gathers trained floats up to this size once a step (DeepSpeed's own default)
_LARGEST_REDUCE_BUCKET = 50_000_000  # elements


def reduce_bucket(trained_floats: int) -> int:
    """Elements of the buffer that DeepSpeed keeps for gradients on their way: all of them where they are few, as scales
    are. Its own default is 2 GB of fp32, whatever trains."""
    return max(1, min(trained_floats, _LARGEST_REDUCE_BUCKET))


def largest_block(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Elements of the parameters of the largest numbered block of a model: int32 words of planes, and floats."""
    sizes: Counter[str] = Counter()
    for name, parameter in named_parameters:
        block = re.match(r".*?\.\d+\.", name)
        if block:
            sizes[block.group()] += getattr(parameter, "ds_numel", parameter.numel())
    return max(sizes.values(), default=0)


def one_block_ahead(block_elements: int) -> dict[str, int]:
    """What stage 3 gathers: one block ahead, and no more than three alive. DeepSpeed counts elements, and a word of 32
    weights is one: its defaults, which suit 16 bits a weight, would gather dozens of packed blocks ahead."""
    return {
        "stage3_prefetch_bucket_size": block_elements,
        "stage3_max_live_parameters": 3 * block_elements,
        "stage3_max_reuse_distance": block_elements,
    }


def deepspeed_config(
    config: RunConfig,
    block_elements: int = 0,  # of the largest block, as DeepSpeed counts them; 0: DeepSpeed's own settings
    trained_floats: int = 0,  # elements; 0: DeepSpeed's own settings
) -> dict:
    zero = {
        "stage": config.cluster.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        # Every plane must be partitioned: a persistent one would keep a gathered copy that a flip does not reach.
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
    }
    if trained_floats:
        zero["reduce_bucket_size"] = reduce_bucket(trained_floats)
    if block_elements and config.cluster.zero_stage == 3:
        zero |= one_block_ahead(block_elements)
    return {
        "train_batch_size": config.train.sequences_per_step,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "steps_per_print": 1_000_000_000,  # progress is ours to print
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW
        "zero_optimization": zero,
        "communication_data_type": config.comm.float_gradients,
        # Floats stay in the dtype they are given: trained ones fp32, frozen ones in the compute dtype (autocast).
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "comms_logger": {"enabled": False},  # waits for the device at every message; ``traffic`` counts
    }
