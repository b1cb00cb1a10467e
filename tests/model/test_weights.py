"""Starting from files: what is read, what is refused, and what is written at the end."""

import json

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.errors import UserError
from mbdist.model.hashing import hash_planes
from mbdist.model.layers import boolean_layers
from mbdist.model.loading import empty_model, load_model
from mbdist.model.saving import save_gathered_model, save_model
from mbdist.model.weights import WeightFiles

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def converted(request, tmp_path_factory):
    """A multi-Boolean folder, in one file."""
    folder = tmp_path_factory.mktemp(request.param)
    _, model = models.convert(models.small_model(request.param), folder, ConvertConfig(init="svid"))
    save_model(model, models.small_tokenizer(), folder / "model")
    return folder / "model"


def filled(source):
    model = empty_model(source)
    files = WeightFiles(source, model)
    state = {}
    for name, empty in model.state_dict().items():
        state[name] = torch.empty_like(empty, device="cpu")
        files.fill(name, 0, state[name].view(-1))
    return model, files, state


def test_an_empty_model_is_the_loaded_one_without_weights(converted):
    source = ModelConfig(path=str(converted))
    loaded = load_model(source)
    model, _, state = filled(source)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training and model.generation_config == loaded.generation_config
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in loaded.named_parameters()]
    for name, buffer in loaded.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    for name, tensor in loaded.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_ranges_are_read_in_chunks_and_converted(converted, monkeypatch):
    monkeypatch.setattr("mbdist.model.weights._CHUNK_BYTES", 1000)
    _, files, state = filled(ModelConfig(path=str(converted)))
    for name, whole in list(state.items())[:8]:
        flat = whole.view(-1)
        for first, count in ((0, len(flat)), (1, len(flat) - 2), (len(flat) // 2, 17), (len(flat), 0)):
            wanted = flat[first : first + count]
            out = torch.empty(len(wanted), dtype=torch.float64)
            files.fill(name, first, out)
            assert torch.equal(out, wanted.double()), (name, first, count)


def test_a_model_saved_as_it_is_gathered_is_the_model(converted, tmp_path):
    source = ModelConfig(path=str(converted))
    model, _, state = filled(source)
    layout = {name: p for name, p in sorted(model.named_parameters())}
    largest = max(tensor.nbytes for tensor in layout.values())
    content = ((name, state[name]) for name in layout)
    save_gathered_model(model, models.small_tokenizer(), tmp_path / "out", layout, content, shard_bytes=largest)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < largest + 10_000 for shard in shards)
    again, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_model(source)
    assert hash_planes(again) == hash_planes(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.generation_config == expected.generation_config
    assert filled(ModelConfig(path=str(tmp_path / "out")))[2].keys() == state.keys()


def test_experts_that_files_of_their_kind_keep_apart_are_found(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    _, model = models.convert(model, tmp_path, ConvertConfig(init="svid"))
    save_model(model, None, tmp_path / "model")
    state = filled(ModelConfig(path=str(tmp_path / "model")))[2]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture
def in_shards(tmp_path):
    _, model = models.convert(models.small_model(), tmp_path, ConvertConfig(init="svid"))
    state = {name: p.detach() for name, p in model.named_parameters()}
    save_gathered_model(model, None, tmp_path / "model", state, state.items(), shard_bytes=40_000)
    return tmp_path / "model"


def test_the_digest_tells_models_apart(in_shards):
    source = ModelConfig(path=str(in_shards))
    model = empty_model(source)
    before = WeightFiles(source, model).digest()
    assert before == WeightFiles(source, model).digest()
    index = json.loads((in_shards / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if name.endswith("0.mlp.up_proj.plane_1"))
    tensors = load_file(in_shards / index[name])
    tensors[name][0, 0] ^= 1
    save_file(tensors, in_shards / index[name])
    assert WeightFiles(source, model).digest() != before


def damaged_without_a_shard(folder, shard):
    shard.unlink()
    return shard.name


def damaged_by_a_cut(folder, shard):
    shard.write_bytes(shard.read_bytes()[:-100])
    return f"{shard.name} is damaged or was not written to its end"


def damaged_by_a_shape(folder, shard):
    tensors = load_file(shard)
    name = next(name for name in tensors if ".plane_" in name)
    save_file({**tensors, name: tensors[name][1:].clone()}, shard)
    return f"{name} has the shape"


def damaged_by_a_gap(folder, shard):
    tensors = load_file(shard)
    name = next(name for name in tensors if ".plane_" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
    return f"{name} is missing"


@pytest.mark.parametrize(
    "damage",
    [damaged_without_a_shard, damaged_by_a_cut, damaged_by_a_shape, damaged_by_a_gap],
    ids=lambda d: d.__name__,
)
def test_a_damaged_folder_is_one_clear_error_before_anything_is_read(in_shards, damage):
    source = ModelConfig(path=str(in_shards))
    shard = next(
        shard
        for shard in sorted(in_shards.glob("model-*.safetensors"))
        if any(".plane_" in name for name in load_file(shard))
    )
    said = damage(in_shards, shard)
    with pytest.raises(UserError) as raised:
        WeightFiles(source, empty_model(source))
    assert said in str(raised.value) and str(in_shards) in str(raised.value)


def test_scales_keep_fp32_and_planes_their_words(in_shards):
    model = empty_model(ModelConfig(path=str(in_shards)))
    for _, layer in boolean_layers(model):
        assert layer.scale_out.dtype == torch.float32 and layer.plane_0.dtype == torch.int32
