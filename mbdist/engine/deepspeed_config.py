"""The DeepSpeed config that follows from a run config: batch size and stage are declared once, there."""

from __future__ import annotations

from mbdist.config.schema import RunConfig


def deepspeed_config(config: RunConfig, device: str = "cpu") -> dict:
    """``device``: type of the workers' device."""
    return {
        "train_batch_size": config.train.sequences_per_step,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "steps_per_print": 1_000_000_000,  # progress is ours to print
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW
        "zero_optimization": {
            "stage": config.cluster.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            # Every plane must be partitioned: a persistent one would keep a gathered copy that a flip does not reach.
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
        },
        # Floats stay in the dtype they are given: trained ones fp32, frozen ones in the compute dtype (autocast).
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        # Counts DeepSpeed's messages. It waits for the device at every one, which only a CPU does not mind.
        "comms_logger": {"enabled": device == "cpu", "verbose": False, "prof_all": True, "debug": False},
    }
