"""Conversion from file to file: what it reads, what it refuses, and how it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mbdist.cli.convert import convert
from mbdist.config.convert import ConvertConfig, ReconstructionConfig
from mbdist.config.model import ModelConfig
from mbdist.convert import Conversion
from mbdist.convert.aside import Aside
from mbdist.convert.blocks import ModelBlocks
from mbdist.convert.calibrated import OutputMetric
from mbdist.convert.moments import squared_moments
from mbdist.convert.partial_folder import partial_folder_of
from mbdist.errors import UserError
from mbdist.loss import next_token_loss
from mbdist.model.float_weights import FloatWeights
from mbdist.model.hashing import hash_tensors
from mbdist.model.layers import convertible_layers
from mbdist.model.loading import empty_model, load_model, safetensors_of
from mbdist.model.readout import Readout

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2"]


def tensors_of(folder):
    return hash_tensors(load_model(ModelConfig(path=str(folder))).state_dict())


def sharded(folder, **model):
    """A float model whose checkpoint has several files."""
    models.small_model(**model).save_pretrained(folder, max_shard_size="100KB")
    models.small_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_model_filled_from_files_is_the_model(architecture, tmp_path):
    source = ModelConfig(path=str(sharded(tmp_path / "float", architecture=architecture)))
    model, whole = empty_model(source), load_model(source)
    weights = FloatWeights(source, safetensors_of(source), model)
    state = whole.state_dict()
    for name, tensor in weights.read(*state).items():
        assert torch.equal(tensor, state.pop(name))
    assert set(state) == set(model.all_tied_weights_keys)
    ids = torch.randint(0, models.VOCABULARY, (1, 8))
    with weights.filled(model, [name for name, _ in model.named_children()]):
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert list(convertible_layers(model)) == list(convertible_layers(whole))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_taken_block_by_block_are_those_of_one_pass_bit_for_bit(architecture, dtype, tmp_path):
    source = ModelConfig(path=str(sharded(tmp_path / "float", architecture=architecture, layers=3)))
    whole, batches = load_model(source), torch.randint(0, models.VOCABULARY, (4, 16)).split(2)
    whole.requires_grad_(False)
    torch.testing.assert_close(
        next_token_loss(readout := Readout(whole), whole, batches[0]).float(),
        whole(batches[0], labels=batches[0]).loss,
    )
    expected = {}

    def add(name, values):
        expected[name] = expected.get(name, 0) + values.detach().flatten(0, -2).float().square().sum(0)

    for name, layer in convertible_layers(whole).items():
        layer.register_forward_pre_hook(lambda _layer, inputs, name=name: add((name, "in"), inputs[0]))
        layer.register_full_backward_hook(lambda _layer, _in, outputs, name=name: add((name, "out"), outputs[0]))
    for ids in batches:
        embedded = whole.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = next_token_loss(readout, lambda input_ids, at=embedded, **how: whole(inputs_embeds=at, **how), ids)
        loss.backward()

    model = empty_model(source)
    weights = FloatWeights(source, safetensors_of(source), model)

    def hold(parts):
        return weights.filled(model, parts, linear_dtype=dtype)

    blocks = ModelBlocks(model, convertible_layers(model), batches, dtype, Aside(tmp_path / "aside"), hold)
    found = squared_moments(blocks, len(batches))
    assert 2 * len(found) == len(expected)
    for name, moments in found.items():
        assert torch.equal(moments.input_squares, expected[name, "in"])
        assert torch.equal(moments.output_squares, expected[name, "out"])


def test_layers_outside_of_the_blocks_are_calibrated_too(tmp_path):
    """OPT with embeddings narrower than its states has one before and one after the blocks."""
    sizes = {"hidden_size": 72, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(vocab_size=512, word_embed_proj_dim=40, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    ids = torch.randint(0, models.VOCABULARY, (4, 16))
    model = transformers.OPTForCausalLM(config).eval()
    seen = {}

    def remember(name):
        return lambda _layer, inputs, output: seen.update({name: (inputs[0], output)})

    names = ["model.decoder.project_in", "model.decoder.project_out"]
    hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in names]
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, [seen[name][1] for name in names])
    for hook in hooks:
        hook.remove()
    blocks = ModelBlocks(model, convertible_layers(model), [ids], torch.float32, Aside(tmp_path / "aside"))
    found = squared_moments(blocks, 1)
    for name, gradient in zip(names, gradients, strict=True):
        x = seen[name][0].detach().flatten(0, -2)
        torch.testing.assert_close(found[name].input_squares, x.square().sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].output_squares, gradient.flatten(0, -2).square().sum(0))
    settings = ConvertConfig(init="calibrated", reconstruction=ReconstructionConfig(steps=1))
    reports, _ = models.convert(model, tmp_path, settings, ids.split(2))
    assert {report.name for report in reports} >= set(names)


def test_the_metric_in_one_buffer_is_the_textbooks():
    x = torch.randn(300, 70)
    gram = x.T @ x
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(70)
    found = OutputMetric.of(gram.clone())
    torch.testing.assert_close(found.hessian, hessian)
    inverse = torch.linalg.inv(hessian[found.order][:, found.order].double())
    torch.testing.assert_close(found.upper.T @ found.upper, inverse.float())
    assert torch.equal(found.upper, found.upper.triu())


_SETTINGS = {
    "joint": ConvertConfig(init="joint"),
    "one stream": ConvertConfig(init="calibrated", reconstruction=ReconstructionConfig(steps=0)),
    "sequential": ConvertConfig(init="calibrated", sequential=True, reconstruction=ReconstructionConfig(steps=0)),
    "reconstructed": ConvertConfig(init="calibrated", bits=4.0, reconstruction=ReconstructionConfig(steps=2)),
}


@pytest.mark.parametrize("name", _SETTINGS)
def test_a_conversion_that_ends_early_goes_on_to_the_same_bits(name, tmp_path):
    """Ended after every number of layers in turn, each time in another process's shoes."""
    source = ModelConfig(path=str(sharded(tmp_path / "float", layers=3)))
    batches = torch.randint(0, models.VOCABULARY, (4, 16)).split(2)
    undisturbed = list(Conversion(source, tmp_path / "whole", _SETTINGS[name]).run(batches))
    output, shards = tmp_path / "out", []
    for layers in (1, 8, 15):
        run = Conversion(source, output, _SETTINGS[name]).run(batches)
        assert [next(run) for _ in range(layers)] == undisturbed[:layers]
        run.close()
        shards.append({file.name: file.stat().st_mtime_ns for file in partial_folder_of(output).glob("*.safetensors")})
        assert not output.exists()
    assert list(Conversion(source, output, _SETTINGS[name]).run(batches)) == undisturbed
    assert [len(found) for found in shards] == [2, 3, 4], "one shard a block, and one around them"
    last = {file.name: file.stat().st_mtime_ns for file in output.glob("*.safetensors")}
    assert all(last.items() >= found.items() for found in shards), "nothing is done twice"
    assert tensors_of(output) == tensors_of(tmp_path / "whole")
    assert not partial_folder_of(output).exists()
    left = {file.name for file in output.iterdir()} ^ {file.name for file in (tmp_path / "whole").iterdir()}
    assert not left, "no scratch is left"


@pytest.mark.slow
def test_a_killed_conversion_goes_on_to_the_same_bits(tmp_path):
    """A real SIGKILL, wherever it falls: in the passes over the text, then between two blocks."""
    folder, output = sharded(tmp_path / "float", layers=4), tmp_path / "out"
    options = {"init": "calibrated", "python_docs": True, "window": 32, "calibration_tokens": 4096}
    options["reconstruction_steps"] = 2
    call = f"from pathlib import Path; from mbdist.cli.convert import convert; convert(**{options},"
    command = [sys.executable, "-c", f"{call} model={str(folder)!r}, output=Path({str(output)!r}))"]
    scratch, seen = partial_folder_of(output) / "scratch", []
    for awaited in ("squares-2.safetensors", "reports-1.json"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while not (scratch / awaited).exists():
                assert process.poll() is None, process.communicate()[1][-2000:]
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and not output.exists()
        seen.append({file.name: file.stat().st_mtime_ns for file in scratch.glob("squares-?.safetensors")})
    assert seen[0].items() <= seen[1].items(), "the pass over the text went on where it was"
    for place in (output, tmp_path / "whole"):
        convert(str(folder), place, **options)
    assert tensors_of(output) == tensors_of(tmp_path / "whole")


def test_another_conversion_to_the_same_folder_is_refused_or_replaces_it(tmp_path, llama_folder):
    source, output = ModelConfig(path=str(llama_folder)), tmp_path / "out"
    run = Conversion(source, output, ConvertConfig(init="joint")).run()
    next(run)
    with pytest.raises(UserError, match="another process is converting"):
        next(Conversion(source, output, ConvertConfig(init="joint")).run())
    run.close()
    with pytest.raises(UserError, match=r"unfinished conversion with other settings \(planes\)"):
        next(Conversion(source, output, ConvertConfig(init="joint", planes=3)).run())
    list(Conversion(source, output, ConvertConfig(init="joint", planes=3), replace=True).run())
    with pytest.raises(UserError, match="out exists and is not an empty folder"):
        Conversion(source, output, ConvertConfig(init="joint", planes=3))
    assert json.loads((output / "config.json").read_text())["quantization_config"]["planes"].popitem()[1] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pickled_checkpoint_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    models.small_model().save_pretrained(tmp_path / "float")
    (tmp_path / "float/model.safetensors").unlink()
    torch.save({"weight": Trap()}, tmp_path / "float/pytorch_model.bin")
    source = ModelConfig(path=str(tmp_path / "float"))
    for read in (load_model, lambda source: Conversion(source, tmp_path / "out", ConvertConfig(init="joint"))):
        with pytest.raises(UserError, match=r"has no safetensors files, and pickled ones \(.bin\) are not read"):
            read(source)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_that_the_checkpoint_fuses_are_read_as_the_model_has_them(tmp_path):
    """Mixtral: the experts of a block are one parameter of the model, many tensors of the checkpoint."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 512}
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts)).save_pretrained(tmp_path / "float")
    assert any(".experts.3." in name for name in load_file(tmp_path / "float/model.safetensors"))
    source = ModelConfig(path=str(tmp_path / "float"))
    batches = torch.randint(0, 512, (4, 16)).split(2)
    reports = list(Conversion(source, tmp_path / "out", _SETTINGS["one stream"]).run(batches))
    assert {report.name.rpartition(".")[2] for report in reports} >= {"q_proj", "o_proj"}
    before, after = load_model(source).state_dict(), load_model(ModelConfig(path=str(tmp_path / "out"))).state_dict()
    kept = [name for name in before if name in after]
    assert any(".experts." in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)


def damaged(folder, how):
    shard = sorted(folder.glob("*.safetensors"))[1]
    if how == "missing shard":
        shard.unlink()
    elif how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "other shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    elif how == "missing weight":
        tensors = load_file(shard)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, shard, metadata={"format": "pt"})
    elif how == "no language model":
        (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    elif how == "quantised":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", r"lacks 1 of its \d+ files, first model-00002-of-"),
        ("cut short", r"model-00002-of-\d+\.safetensors is damaged or was cut short"),
        (
            "other shape",
            r"proj\.weight in the shape \(.*80.*\), its config says \(.*96.*is of another model",
        ),
        ("missing weight", r"lacks 1 weight\(s\), first model\."),
        ("no language model", "holds a vit model, which is not a causal language model"),
        ("quantised", "is quantised already; convert the float model"),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_refused_before_the_work(how, message, tmp_path):
    folder = sharded(tmp_path / "float")
    damaged(folder, how)
    with pytest.raises(UserError, match=message):
        Conversion(ModelConfig(path=str(folder)), tmp_path / "out", ConvertConfig(init="joint"))
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("init", ["joint", "calibrated"])
def test_damaged_weights_are_refused_when_they_are_read(init, tmp_path):
    model = models.small_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of .* holds NaN"):
        models.convert(model, tmp_path, ConvertConfig(init=init), torch.randint(0, 512, (2, 16)).split(1))
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_found_before_the_work(tmp_path, llama_folder):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with pytest.raises(UserError, match=r"writes about 0\.0 GiB .* name an OUTPUT on a larger disk"):
            Conversion(ModelConfig(path=str(llama_folder)), tmp_path / "a/out", ConvertConfig(init="joint"))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_disk_that_fills_up_costs_nothing_that_is_done(tmp_path, llama_folder):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        source, output = ModelConfig(path=str(llama_folder)), tmp_path / "out"
        run = Conversion(source, output, ConvertConfig(init="joint")).run()
        reports = [next(run) for _ in range(7)]
        with pytest.raises(OSError), (tmp_path / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(UserError, match=r"cannot save to .*out: .*No space left"):
            next(run)
        assert not output.exists()
        (tmp_path / "ballast").unlink()
        done = list(Conversion(source, output, ConvertConfig(init="joint")).run())
        assert done[:7] == reports and len(done) == 14 and load_model(ModelConfig(path=str(output)))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Blocks of 50 MB in fp32. What is held counts, not what malloc keeps of it on its heap, which differs by a hundred
    MB from run to run: with pages of its own for every large tensor a peak is the same to a few MB."""
    own_pages = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    peaks = {}
    for layers in (3, 9):
        folder = tmp_path / f"float-{layers}"
        sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "vocab_size": 512}
        config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="60MB")
        script = (
            "from pathlib import Path; from mbdist.convert import Conversion;"
            "from mbdist.config.convert import ConvertConfig; from mbdist.config.model import ModelConfig;"
            f"run = Conversion(ModelConfig(path={str(folder)!r}), Path({str(folder)!r} + '-out'),"
            "ConvertConfig(init='svid', planes=1)); list(run.run());"  # getrusage would count this process's own peak
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=own_pages)
        peaks[layers] = int(done.stdout) / 1024
    assert peaks[9] < peaks[3] + 25, peaks  # half a block
