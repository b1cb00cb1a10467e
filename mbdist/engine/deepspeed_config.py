"""The DeepSpeed config that follows from a run config: batch size and stage are declared once, there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from mbdist.config.schema import RunConfig

SMALL_FLOATS = 100_000  # elements; stage 3 gathers trained floats up to this size once a step (DeepSpeed's own default)
_LARGEST_REDUCE_BUCKET = 50_000_000  # elements


def reduce_bucket(trained_floats: int) -> int:
    """Elements of the buffer that DeepSpeed keeps for gradients on their way: all of them where they are few, as scales
    are. Its own default is 2 GB of fp32, whatever trains."""
    return max(1, min(trained_floats, _LARGEST_REDUCE_BUCKET))


def elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, partitioned or not, as DeepSpeed counts them: int32 words of planes, and floats."""
    return getattr(parameter, "ds_numel", parameter.numel())


def largest_block(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Elements of the parameters of the largest numbered block of a model."""
    sizes: Counter[str] = Counter()
    for name, parameter in named_parameters:
        block = re.match(r".*?\.\d+\.", name)
        if block:
            sizes[block.group()] += elements(parameter)
    return max(sizes.values(), default=0)


def gathered_in_passes(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Of what stage 3 partitions: all but the small trained floats, which are gathered after the step."""
    return (p for p in parameters if not (p.requires_grad and elements(p) <= SMALL_FLOATS))


def one_block_ahead(block_elements: int) -> dict[str, int]:
    """What stage 3 gathers: one block ahead, and no more than three alive. DeepSpeed counts elements, and a word of 32
    weights is one: its defaults, which suit 16 bits a weight, would gather dozens of packed blocks ahead."""
    return {
        "stage3_prefetch_bucket_size": block_elements,
        "stage3_max_live_parameters": 3 * block_elements,
        "stage3_max_reuse_distance": block_elements,
    }


def until_backward(whole_elements: int) -> dict[str, int]:
    """Besides: all of the model may be alive, from a parameter's first use in a step to its last one."""
    return {"stage3_max_live_parameters": 2 * whole_elements, "stage3_max_reuse_distance": 2**62}


def deepspeed_config(
    config: RunConfig,
    named_parameters: Sequence[tuple[str, nn.Parameter]] = (),  # that ZeRO sees; none: some of DeepSpeed's own settings
) -> dict:
    parameters = [parameter for _, parameter in named_parameters]
    zero = {
        "stage": config.cluster.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        # Every plane must be partitioned: a persistent one would keep a gathered copy that a flip does not reach.
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
    }
    if parameters:
        zero["reduce_bucket_size"] = reduce_bucket(sum(elements(p) for p in parameters if p.requires_grad))
    if parameters and config.cluster.zero_stage == 3:
        zero |= one_block_ahead(largest_block(named_parameters))
        if config.comm.keeps_gathered(sum(elements(p) * p.element_size() for p in gathered_in_passes(parameters))):
            zero |= until_backward(sum(map(elements, parameters)))
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
