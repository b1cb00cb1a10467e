"""A conversion spread over Ray workers."""

import os
import subprocess

import pytest
import torch

from mbdist.config.model import ModelConfig
from mbdist.convert.initialize import INITIALIZATIONS, Matrix, in_turn
from mbdist.convert.moments import LayerMoments
from mbdist.convert.weighted_matrix import row_chunks
from mbdist.model.hashing import hash_planes
from mbdist.model.layers import boolean_layers
from mbdist.model.loading import load_model
from mbdist_launch.spread import spread_over


@pytest.fixture(scope="module")
def two_workers():
    with spread_over(2) as spread:
        yield spread


@pytest.mark.slow
def test_workers_do_not_give_way_to_all_else_on_the_machine(two_workers):
    assert list(two_workers(os.nice, [(0,)])) == [os.nice(0)]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["svid", "joint", "calibrated"])
def test_matrices_and_rows_on_ray_workers_give_the_same_bits(init, two_workers):
    torch.manual_seed(0)
    n = 1500  # two chunks of rows in the first matrix
    inputs = torch.randn(2000, n) * torch.rand(n).exp()
    weights, output_squares = ((torch.randn(900, n), 2), (torch.randn(96, n), 3)), (torch.rand(900), torch.rand(96))
    assert len(row_chunks((900, n))) == 2

    def matrices():
        gram = inputs.T @ inputs  # shared by two layers; given up to each initialisation
        return [
            Matrix(lambda weight=weight: weight, planes, LayerMoments(gram.diagonal().clone(), squares + 0.1, gram))
            for (weight, planes), squares in zip(weights, output_squares, strict=True)
        ]

    alone = list(INITIALIZATIONS[init](matrices(), in_turn))
    shared = list(INITIALIZATIONS[init](matrices(), two_workers))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.planes, other.planes, strict=True))
        assert torch.equal(one.scale_out, other.scale_out) and torch.equal(one.scale_in, other.scale_in)


@pytest.mark.slow
def test_convert_with_workers_writes_the_same_model(tmp_path, llama_folder):
    hashes = set()
    for name, extra in (("one", []), ("two", ["--workers", "2"])):
        command = ["mbdist", "convert", llama_folder, tmp_path / name, "--python-docs", "--bits", "4.5"]
        command += ["--reconstruction-steps", "4"]
        subprocess.run([*command, "--window", "32", "--calibration-tokens", "512", *extra], check=True, timeout=300)
        model = load_model(ModelConfig(path=str(tmp_path / name)))
        assert len({layer.num_planes for _, layer in boolean_layers(model)}) > 1, "not the same for all"
        hashes.add(hash_planes(model))
    assert len(hashes) == 1
