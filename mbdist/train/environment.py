"""Where a worker finds itself: device, threads, compute type, process group. Nothing here knows who started it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from mbdist.config import RunConfig, with_changes
from mbdist.config.cluster import ClusterConfig
from mbdist.errors import ConfigError, UserError


def choose_device(config: ClusterConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("cluster.device is cuda, but torch sees no GPU here; use cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 where the processor multiplies it in hardware."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def as_launched(config: RunConfig) -> RunConfig:
    """The config with ``comm.node_size: auto`` as the launcher has it."""
    if config.comm.node_size != "auto":
        return config
    return with_changes(config, {"comm.node_size": int(os.environ.get("LOCAL_WORLD_SIZE", 1))})


def pin_accelerator(config: RunConfig) -> None:
    """Tell DeepSpeed which device this worker uses. It looks for one when it is imported, so this comes before that;
    on a CPU worker of a GPU machine it must not find the GPU."""
    os.environ["DS_ACCELERATOR"] = choose_device(config.cluster).type


def set_up_worker(config: RunConfig) -> torch.device:
    """Choose the device, set the threads, join the process group (already there under Ray Train)."""
    device = choose_device(config.cluster)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        if config.offloads:
            raise UserError(f"{config.offloads[0]} is for GPU workers; this one has none: set it to false")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.cluster.cpus_per_worker or max(1, cores // local_ranks))
    if not dist.is_initialized():
        _join_group(config, device)
    started, cluster = dist.get_world_size(), config.cluster
    if not cluster.fewest_workers <= started <= cluster.most_workers:
        raise ConfigError(
            f"cluster.workers = {cluster.workers}, but {started} processes were started; "
            f"start {cluster.most_workers}, or set cluster.workers={started}"
        )
    return device


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """While one worker works and the others of its machine wait for it, it may use their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _join_group(config: RunConfig, device: torch.device) -> None:
    """From torchrun's variables, or a group of one where there are none."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.comm.timeout_s))


def leave_group() -> None:
    """Close the process group while the interpreter still runs: gloo's threads, left to its end, may abort it."""
    dist.destroy_process_group()
