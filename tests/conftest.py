from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the commands beside this Python
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be fetched in a test

import pytest

import mbdist  # noqa: F401  (registers the format with transformers)

sys.path.insert(0, str(Path(__file__).parent))

import models


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A small float Llama model with its tokenizer."""
    return models.save_small_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tokenizer():
    return models.small_tokenizer()


@pytest.fixture(params=["torch", "native"])
def implementation(request, monkeypatch):
    """Runs a test on the torch versions and on the CPU accelerator."""
    from mbdist_kernels import native

    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    elif native.accelerator() is None:
        pytest.skip("no compiler for the CPU accelerator")
    return request.param
