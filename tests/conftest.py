from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the commands beside this Python
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be fetched in a test
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU; read when they are defined

import pytest

import mbdist  # noqa: F401  (registers the format with transformers)

sys.path.insert(0, str(Path(__file__).parent))

import models
import processes

from mbdist.bench import process

if not Path("/dev/nvidiactl").exists():  # there a measurement chooses its accelerator before DeepSpeed is imported
    process.START = processes.warm


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A small float Llama model with its tokenizer."""
    return models.save_small_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tokenizer():
    return models.small_tokenizer()


@pytest.fixture(params=["torch", "native", "triton"])
def implementation(request, monkeypatch):
    """Runs a test on the torch versions, on the CPU accelerator and on the kernels in Triton's interpreter."""
    from mbdist_kernels import native, registration

    if request.param == "native":
        if native.accelerator() is None:
            pytest.skip("no compiler for the CPU accelerator")
        yield request.param
        return
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: test_against_cpu.py runs them on the GPU")
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    with registration.kernels_on_cpu() if request.param == "triton" else nullcontext():
        yield request.param
