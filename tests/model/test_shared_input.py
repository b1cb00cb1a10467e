"""Layers that share an input, decoded together: the same bits as one by one, in fewer launches."""

import copy
import importlib
import threading

import models
import pytest
import torch
from test_linear import random_layer
from torch import nn

from mbdist.config.convert import ConvertConfig
from mbdist.model.layers import boolean_layers
from mbdist.model.shared_input import share_inputs
from mbdist_kernels import native

pytestmark = pytest.mark.skipif(
    native.accelerator() is None, reason="a CPU without the accelerator decodes by dense weights"
)


class Attention(nn.Module):
    """Three layers on one input, of which ``value`` can be left out, and one on what comes of them."""

    def __init__(self, num_planes=(2, 2, 2)):
        super().__init__()
        for name, planes in zip(("query", "key", "value"), num_planes, strict=True):
            setattr(self, name, random_layer(40, 40, planes, bias=name == "key"))
        self.out = random_layer(40, 40, 2, bias=False)
        share_inputs(self)

    def forward(self, x, with_value=True):
        y = self.query(x) + self.key(x)
        return self.out(y + self.value(x) if with_value else y)


@pytest.fixture
def launches(monkeypatch):
    """How many weights each launch had."""
    module, found = importlib.import_module("mbdist.model.shared_input"), []
    together = module.linear_decode_together
    monkeypatch.setattr(
        module, "linear_decode_together", lambda x, weights: found.append(len(weights)) or together(x, weights)
    )
    return found


def alone(model, *arguments):
    """The same without sharing."""
    model = copy.deepcopy(model)
    for _, layer in boolean_layers(model):
        layer.shared_input = None
    return model(*arguments)


@torch.no_grad
def test_layers_seen_with_one_input_are_decoded_together_from_then_on(launches):
    model = Attention()
    for tokens, expected in ((1, [1, 1, 1, 1]), (1, [3, 1]), (3, [3, 1]), (100, [])):
        x = torch.randn(2, 1, tokens, 40)
        assert torch.equal(model(x), alone(model, x))
        assert launches == expected
        launches.clear()


@torch.no_grad
def test_a_layer_that_is_no_longer_called_is_no_longer_computed(launches):
    model = Attention()
    for with_value, expected in (
        (True, [1, 1, 1, 1]),
        (False, [3, 1]),
        (False, [2, 1]),
        (True, [2, 1, 1]),
        (True, [3, 1]),
    ):
        x = torch.randn(1, 40)
        assert torch.equal(model(x, with_value), alone(model, x, with_value))
        assert launches == expected
        launches.clear()


@torch.no_grad
def test_layers_of_unequal_planes_stay_apart(launches):
    model = Attention((2, 3, 2))
    for _ in range(2):
        x = torch.randn(1, 40)
        assert torch.equal(model(x), alone(model, x))
    assert launches == [1, 1, 1, 1, 2, 1, 1]


@torch.no_grad
def test_a_change_in_between_is_seen():
    model = Attention()
    x = torch.randn(1, 40)
    model(x)
    model(x)  # the same tensor once more
    for change in (lambda: model.key.plane_1.bitwise_not_(), lambda: model.key.scale_in.mul_(2), lambda: x.add_(1)):
        model.query(x)
        change()
        assert torch.equal(model.key(x), alone(model.key, x))
    with torch.autocast("cpu", torch.bfloat16):
        model.query(x)
    assert torch.equal(model.key(x), alone(model.key, x)) and model.key(x).dtype == torch.float32


@torch.no_grad
def test_a_layer_whose_planes_are_elsewhere_is_left_alone(launches):
    """Cut over ranks between its turns, say."""
    model = Attention()
    model(torch.randn(1, 40))
    x, whole = torch.randn(1, 40), model.value.plane_0.data
    expected = alone(model, x)
    launches.clear()
    model.value.plane_0.data = torch.empty(0, dtype=torch.int32)
    y = model.query(x) + model.key(x)
    model.value.plane_0.data = whole
    assert torch.equal(model.out(y + model.value(x)), expected)
    assert launches == [2, 1, 1]


def test_gradients_and_inference_tensors_go_one_by_one(launches):
    model = Attention()
    model(torch.randn(1, 40, requires_grad=True)).sum().backward()
    with torch.inference_mode():
        model(torch.randn(1, 40))
    assert model.query.scale_out.grad is not None and launches == []


def test_threads_do_not_get_each_others_results():
    model, wrong = Attention(), []

    def decode():
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(1, 40)
                if not torch.equal(model(x), plain(x)):
                    wrong.append(x)

    plain = copy.deepcopy(model)
    for _, layer in boolean_layers(plain):
        layer.shared_input = None
    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_loaded_model_generates_the_same_tokens_in_fewer_launches(architecture, tmp_path, launches):
    _, model = models.convert(models.small_model(architecture), tmp_path, ConvertConfig(planes=2, init="joint"))
    prompt, settings = torch.arange(1, 4)[None], {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(prompt, **settings)
    most = {"llama": {1, 2, 3}, "opt": {1, 3}, "gpt2": {1}}  # GPT-2 has one matrix for queries, keys and values
    assert set(launches) == most[architecture]
    for _, layer in boolean_layers(model):
        layer.shared_input = None
    assert torch.equal(model.generate(prompt, **settings), together)
