from __future__ import annotations


def env() -> None:
    """Print versions, devices and backends, for a bug report.

    Example: `mbdist env`
    """
    import importlib.metadata
    import json
    import os
    import platform

    import torch

    from mbdist.config.cluster import ClusterConfig
    from mbdist.train.environment import choose_device, compute_dtype
    from mbdist_kernels import native

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = (
        "mbdist",
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "ray",
        "triton",
        "accelerate",
        "numpy",
    )
    device = choose_device(ClusterConfig())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "system": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "device": device.type,
        "compute_type": str(compute_dtype("auto", device)).removeprefix("torch."),
        "cpu_accelerator": native.accelerator() is not None,
        "backend": "nccl" if device.type == "cuda" else "gloo",
    }
    print(json.dumps(found, indent=2))
