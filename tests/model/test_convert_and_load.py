"""Float model -> planes -> folder -> from_pretrained, for every architecture named in the README."""

import itertools
import json
import shutil
import subprocess
import sys

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mbdist.config.convert import ConvertConfig, ReconstructionConfig
from mbdist.config.model import ModelConfig
from mbdist.convert import bits_per_weight as bits_per_weight_of
from mbdist.convert.allocation import allocate, plane_bits, sampled, second_order_errors
from mbdist.convert.aside import Aside
from mbdist.convert.blocks import ModelBlocks, block_names
from mbdist.convert.calibrated import OutputMetric
from mbdist.convert.calibration import BlockWalk
from mbdist.convert.convert import layer_from
from mbdist.convert.initialize import INITIALIZATIONS, Matrix, in_turn
from mbdist.convert.joint import joint, sweep
from mbdist.convert.moments import LayerMoments, squared_moments
from mbdist.convert.svid import successive_residuals, svid
from mbdist.errors import UserError
from mbdist.model.hashing import hash_planes
from mbdist.model.layers import bits_per_weight, boolean_layers, convertible_layers
from mbdist.model.loading import is_multi_boolean, load_model
from mbdist.model.saving import save_model
from mbdist.whole_files import replaced_folder
from mbdist_kernels import dequantize, popcount

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2"]


def calibrated(weight, num_planes, moments):
    return next(INITIALIZATIONS["calibrated"]([Matrix(lambda: weight, num_planes, moments)], in_turn))


def test_svid_of_a_positive_matrix_is_the_best_rank_one():
    magnitude = torch.rand(40, 30)
    found = svid(magnitude, 1)
    u, v = found.scale_out[0], found.scale_in[0]
    best = torch.linalg.svdvals(magnitude)
    error = (magnitude - torch.outer(u, v)).square().sum()
    torch.testing.assert_close(error, best[1:].square().sum(), rtol=1e-3, atol=1e-4)
    assert (u >= 0).all() and (v >= 0).all()


def test_svid_error_falls_with_every_plane_and_is_exact_for_a_matrix_of_the_form():
    weight = torch.randn(64, 96)
    errors = [svid(weight, k).relative_error(weight) for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    # Gaussian weights: published and re-measured values of successive extraction
    for found, expected in zip(errors, (0.363, 0.131, 0.0585, 0.0331), strict=True):
        assert abs(found - expected) < 0.12 * expected + 0.01
    rank_one = torch.outer(torch.rand(20) + 0.1, torch.rand(50) + 0.1) * torch.where(torch.rand(20, 50) < 0.5, -1, 1)
    assert svid(rank_one, 1).relative_error(rank_one) < 1e-10


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
def test_no_part_of_a_joint_sweep_raises_the_error(monkeypatch, num_planes):
    weight = torch.randn(40, 70) * torch.rand(70).exp()
    found = svid(weight, num_planes)
    errors = [found.relative_error(weight)]
    for chunk in (1 << 20, 700, 700, 1 << 20):  # whole, and in chunks of ten rows
        monkeypatch.setattr("mbdist.convert.weighted_matrix._CHUNK_ELEMENTS", chunk)
        sweep(weight, found)
        errors.append(found.relative_error(weight))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors)), errors
    assert num_planes == 1 or errors[-1] < errors[0]  # one plane is at its best from the start


def test_joint_extraction_of_gaussian_weights():
    """Relative error^2 as measured when the method was chosen; three joint planes are as good as four successive."""
    weight = torch.randn(256, 512)
    for num_planes, expected in ((2, 0.118), (3, 0.0372), (4, 0.0116)):
        found = joint(weight, num_planes)
        assert found.relative_error(weight) == pytest.approx(expected, rel=0.06)
        size = found.scale_out.abs().mean(1) * found.scale_in.abs().mean(1)
        assert (size[:-1] >= size[1:]).all(), "largest scale first"


_PEAK_OF_JOINT = """
import resource, torch
from mbdist.convert.joint import joint
joint(torch.randn(64, 64), 2)
weight = torch.randn(4096, 8192)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
joint(weight, 2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / weight.nbytes)
"""


@pytest.mark.slow
def test_joint_holds_no_copy_of_a_large_matrix():
    done = subprocess.run([sys.executable, "-c", _PEAK_OF_JOINT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.75, "of the matrix; one copy alone would be 1"


def test_joint_of_a_zero_matrix_is_finite():
    found = joint(torch.zeros(8, 40), 2)
    assert torch.isfinite(found.scale_out).all() and torch.isfinite(found.scale_in).all()


def test_calibrated_keeps_outputs_better_than_joint():
    """Correlated, unequal inputs: relative output error^2 on fresh data of the same kind, K = 2."""
    torch.manual_seed(0)
    mix = torch.randn(96, 96) * torch.rand(96).mul(3).exp()[:, None] / 10
    x, fresh = torch.randn(2000, 96) @ mix.T, torch.randn(500, 96) @ mix.T
    weight = torch.randn(64, 96)
    moments = LayerMoments(x.square().sum(0), torch.rand(64) + 0.1, x.T @ x)
    reference = fresh @ weight.T

    def output_error(found):
        dense = dequantize(found.planes, found.scale_out, found.scale_in)
        return ((fresh @ dense.T - reference).square().sum() / reference.square().sum()).item()

    errors = [output_error(found) for found in (svid(weight, 2), joint(weight, 2), calibrated(weight, 2, moments))]
    assert errors[2] < 0.5 * errors[1] < errors[0], errors


def test_calibrated_works_on_a_few_rows_at_a_time(monkeypatch):
    x = torch.randn(500, 96) * torch.rand(96).mul(3).exp()
    weight = torch.randn(64, 96)
    output_squares = torch.rand(64) + 0.1

    def moments():
        return LayerMoments(x.square().sum(0), output_squares, x.T @ x)

    whole = calibrated(weight, 2, moments())
    monkeypatch.setattr("mbdist.convert.weighted_matrix._CHUNK_ELEMENTS", 7 * 96)
    parts = calibrated(weight, 2, moments())
    differing = sum(popcount(a ^ b) for a, b in zip(whole.planes, parts.planes, strict=True))
    assert differing < 0.001 * 2 * weight.numel(), "sums of other shapes may round otherwise, no more"
    torch.testing.assert_close(parts.scale_out, whole.scale_out, rtol=1e-2, atol=1e-2)


def test_calibrated_survives_inputs_that_are_never_active():
    gram = torch.zeros(40, 40)
    gram[0, 0] = 5.0
    for squares in (gram, torch.zeros(40, 40)):
        found = calibrated(torch.randn(8, 40), 2, LayerMoments(squares.diagonal().clone(), torch.zeros(8), squares))
        assert torch.isfinite(found.scale_out).all() and torch.isfinite(found.scale_in).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_calibration_collects_the_moments_of_inputs_and_output_gradients(architecture, tmp_path):
    model = models.small_model(architecture)
    layers = convertible_layers(model)
    seen = {}

    def remember(name):
        return lambda _layer, inputs, output: seen.update({name: (inputs[0], output)})

    handles = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    ids = torch.randint(0, models.VOCABULARY, (2, 16))
    loss = model(ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    for handle in handles:
        handle.remove()
    blocks = ModelBlocks(model, layers, [ids, ids], torch.float32, Aside(tmp_path))
    found = squared_moments(blocks, 2)
    assert all(parameter.requires_grad for parameter in model.parameters()), "left as it was"
    grams = {name: gram for block in BlockWalk(blocks) for name, gram in block.grams.items()}
    assert list(grams) == list(layers)
    for (name, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
        x = x.detach().flatten(0, -2)
        torch.testing.assert_close(grams[name], 2 * x.T @ x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name].input_squares, grams[name].diagonal(), rtol=1e-3, atol=1e-4)
        expected = 2 * gradient.flatten(0, -2).square().sum(0)
        torch.testing.assert_close(found[name].output_squares, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_sequential_calibration_sees_what_the_converted_blocks_put_out(architecture, tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (4, 16))
    model = models.small_model(architecture)
    layers = convertible_layers(model)
    last = list(layers)[-1]
    final_gram = None
    blocks = ModelBlocks(model, layers, list(ids.split(2)), torch.float32, Aside(tmp_path))
    for block in BlockWalk(blocks, sequential=True):
        for name, gram in block.grams.items():
            model.get_submodule(name).weight.data.mul_(0.5)  # stands for the conversion
            final_gram = gram if name == last else final_gram
    block = next(name for name in block_names(model, layers) if last.startswith(f"{name}."))
    for name in layers:
        if name.startswith(f"{block}."):  # calibration saw the layers of the last block as they were
            model.get_submodule(name).weight.data.mul_(2.0)
    seen = []
    model.get_submodule(last).register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].flatten(0, -2)))
    model(ids)
    torch.testing.assert_close(final_gram, seen[0].T @ seen[0], rtol=1e-3, atol=1e-4)


def test_calibrated_conversion_of_a_model_is_deterministic(tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (4, 32))
    hashes = set()
    for _ in range(2):
        model = models.convert(models.small_model(), tmp_path, ConvertConfig(init="calibrated"), ids.split(2))[1]
        hashes.add(hash_planes(model))
    assert len(hashes) == 1


@pytest.mark.parametrize("include", ["*.0.*", "*.2.*"])
def test_blocks_without_layers_to_convert_stay_float(include, tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (4, 16))
    config = ConvertConfig(init="calibrated", include=[include], reconstruction=ReconstructionConfig(steps=2))
    reports, model = models.convert(models.small_model(layers=3), tmp_path, config, ids.split(2))
    converted = [name for name, _ in boolean_layers(model)]
    assert [report.name for report in reports] == converted
    assert converted == list(convertible_layers(models.small_model(layers=3), [include]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("sequential", [False, True])
def test_block_walk_gives_the_states_of_both_streams(architecture, sequential, tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (4, 16))
    model = models.small_model(architecture)
    layers = convertible_layers(model)
    float_outputs, converted_outputs = [], []

    def remember(_block, _inputs, output):
        float_outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [model.get_submodule(name).register_forward_hook(remember) for name in block_names(model, layers)]
    model(ids)
    for hook in hooks:
        hook.remove()
    blocks = ModelBlocks(model, layers, [ids], torch.float32, Aside(tmp_path))
    for number, block in enumerate(BlockWalk(blocks, sequential, follow_both=True)):
        torch.testing.assert_close(block.targets[0], float_outputs[number])
        if number:
            torch.testing.assert_close(block.inputs[0], converted_outputs[-1])
        for name in block.layers:
            model.get_submodule(name).weight.data.mul_(0.5)  # stands for the conversion
        converted_outputs.append(block.forward(0, block.inputs[0]))
    assert len(converted_outputs) == len(float_outputs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_reconstruction_brings_the_blocks_outputs_closer_and_flips_do_more_than_scales(architecture, tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (64, 32))
    left, moves = {}, {}
    for name, changes in {"none": {"lr": 0.0, "step_size": 0.0}, "scales": {"step_size": 0.0}, "flips": {}}.items():
        settings = ReconstructionConfig(steps=32, **changes)
        config = ConvertConfig(planes=1, calibration_tokens=2048, reconstruction=settings)
        reports, _ = models.convert(models.small_model(architecture), tmp_path, config, ids.split(4))
        left[name] = reports[-1].output_error
        moves[name] = sum(report.moves_per_weight for report in reports)
    assert left["flips"] < left["scales"] < left["none"]
    assert moves["flips"] > 0 == moves["scales"]


def test_svid_of_a_zero_matrix_is_finite():
    found = svid(torch.zeros(8, 40), 2)
    assert torch.isfinite(found.scale_out).all() and torch.isfinite(found.scale_in).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_convert_save_load(architecture, tmp_path, tokenizer):
    original = models.small_model(architecture)
    ids = torch.randint(0, models.VOCABULARY, (2, 16))
    reports, model = models.convert(original, tmp_path, ConvertConfig(planes=4, init="joint"))
    assert len(reports) == len(convertible_layers(original)) == len(list(boolean_layers(model)))
    assert all(0 < report.relative_error < 0.1 for report in reports)
    assert 4 < bits_per_weight(model) < 10
    assert bits_per_weight_of(reports) == bits_per_weight(model)
    logits, float_logits = model(ids).logits, original(ids).logits
    assert (logits - float_logits).norm() < 0.8 * float_logits.norm()  # near, as 4 bits are: not another model
    state, floats = model.state_dict(), original.state_dict()
    assert all(torch.equal(state[name], floats[name]) for name in floats if name in state), "the rest is what it was"
    save_model(model, tokenizer, tmp_path / "again")
    for folder in ("out", "again"):  # in files by block, and in the single one that a trainer saves
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert hash_planes(loaded) == hash_planes(model)
        assert torch.equal(loaded(ids).logits, logits)
    assert is_multi_boolean(ModelConfig(path=str(tmp_path / "out")))


def test_scales_stay_fp32_whatever_the_model_is_loaded_in(tmp_path):
    _, model = models.convert(models.small_model(), tmp_path, ConvertConfig(init="joint"))
    loaded = load_model(ModelConfig(path=str(tmp_path / "out")), torch.bfloat16)
    for (_, old), (_, new) in zip(boolean_layers(model), boolean_layers(loaded), strict=True):
        assert torch.equal(old.scale_out, new.scale_out) and torch.equal(old.scale_in, new.scale_in)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16


def test_head_embeddings_and_ties_are_kept(tmp_path):
    model = models.small_model("llama")
    names = set(convertible_layers(model))
    assert "lm_head" not in names and len(names) == 14
    _, model = models.convert(model, tmp_path, ConvertConfig(init="joint"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_layers_are_chosen_by_pattern(tmp_path):
    config = ConvertConfig(init="joint", include=["*.mlp.*"], exclude=["*.1.*"])
    reports, _ = models.convert(models.small_model("llama"), tmp_path, config)
    assert [report.name for report in reports] == [
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    with pytest.raises(UserError, match=r"no linear layer is left by include=\['nothing'\]"):
        models.convert(models.small_model(), tmp_path, ConvertConfig(init="joint", include=["nothing"]))


def test_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="no linear layers"):
        convertible_layers(torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4)))


def test_generation_works(tmp_path, tokenizer):
    models.convert(models.small_model(), tmp_path, ConvertConfig(planes=3, init="joint"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    output = loaded.generate(**tokenizer("The value", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert output.shape[1] == len(tokenizer("The value")["input_ids"]) + 5


def test_a_failed_save_leaves_the_previous_one_whole(tmp_path):
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(UserError, match="previous save is unharmed"), replaced_folder(target) as folder:
        (folder / "a").write_text("second")
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_lacks_a_plane_does_not_pass_for_whole(tmp_path):
    models.convert(models.small_model(), tmp_path, ConvertConfig(init="joint"))
    shard = tmp_path / "out/model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.plane_1"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="plane_1"):
        load_model(ModelConfig(path=str(tmp_path / "out")))


@pytest.mark.parametrize("content", ["not json", json.dumps({"model_type": "llama"})])
def test_a_broken_folder_is_one_clear_message(tmp_path, llama_folder, content):
    folder = tmp_path / "broken"
    shutil.copytree(llama_folder, folder)
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="broken"):
        source = ModelConfig(path=str(folder))
        is_multi_boolean(source) or load_model(source)


def test_allocation_spends_the_budget_where_it_does_most():
    shapes = {"a": (64, 64), "b": (64, 64), "c": (64, 64)}
    errors = {"a": [1.0, 0.9, 0.8], "b": [10.0, 1.0, 0.5], "c": [10.0, 8.0, 0.1]}
    one_each = 3 * plane_bits((64, 64))
    budget = (one_each + 3 * plane_bits((64, 64))) / (3 * 64 * 64)
    assert allocate(errors, shapes, budget, per_bit=True) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(UserError, match="too few"):
        allocate(errors, shapes, 1.0, per_bit=True)
    with pytest.raises(UserError, match="raise max_planes"):
        allocate(errors, shapes, 7.0, per_bit=True)


def test_second_order_errors_are_those_of_the_calibrated_planes():
    """Some rows stand for all: of rows alike to within a head of 96, but for their gradients."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(576, 96), torch.randn(400, 96) @ torch.randn(96, 96)
    moments = LayerMoments(inputs.square().sum(0), (torch.rand(96) ** 3 + 0.1).repeat(6))
    metric = OutputMetric.of(inputs.T @ inputs)
    rows, of_rows = sampled(weight, moments)
    assert rows.shape == (256, 96)
    errors = second_order_errors(rows, of_rows, metric, 3)
    for planes, error in enumerate(errors, start=1):
        moments.gram = inputs.T @ inputs
        (found,) = INITIALIZATIONS["calibrated"]([Matrix(lambda: weight, planes, moments)], in_turn)
        difference = weight - layer_from(found, None).dense_weight()
        expected = (difference @ metric.hessian * difference).sum(1) @ moments.output_squares
        assert error == pytest.approx(expected.square().item(), rel=0.1)
        assert second_order_errors(weight, moments, metric, planes)[-1] == pytest.approx(
            expected.square().item(), rel=1e-3
        )
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize(
    ("rule", "architecture"), [("second_order", "llama"), ("second_order", "gpt2"), ("residual", "llama")]
)
def test_conversion_to_a_budget_of_bits(rule, architecture, tmp_path):
    ids = torch.randint(0, models.VOCABULARY, (4, 32))
    config = ConvertConfig(bits=3.6, allocation=rule, init="joint", max_planes=3)
    reports, model = models.convert(models.small_model(architecture), tmp_path, config, ids.split(2))
    assert {report.planes for report in reports} == {1, 2, 3}
    assert 3.2 < bits_per_weight(model) <= 3.6


def test_residuals_of_successive_planes():
    weight = torch.randn(64, 96)
    norms = successive_residuals(weight, 3)
    for planes, norm in enumerate(norms, start=1):
        expected = svid(weight, planes).relative_error(weight) ** 0.5 * weight.norm().item()
        assert norm == pytest.approx(expected, rel=1e-3)
