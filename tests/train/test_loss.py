import contextlib

import models
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from mbdist.config.loss import LossConfig
from mbdist.data import Batch
from mbdist.loss import hidden_loss, token_loss
from mbdist.model import readout as readout_module
from mbdist.model.readout import Head, Readout, reader_of
from mbdist.train.teachers import LiveTeacher

CPU = torch.device("cpu")
CONFIGS = [
    LossConfig(),
    LossConfig(temperature=2.0, kl_weight=0.7),
    LossConfig(cross_entropy_weight=0.3),
    LossConfig(kl_weight=0.0, cross_entropy_weight=1.0),
    LossConfig(top_k=4, temperature=1.5),
]


class Logits:
    """A lesson of logits as they are."""

    hidden_states = None

    def __init__(self, logits):
        self.logits = logits

    @contextlib.contextmanager
    def opened(self, is_target):
        yield self.logits[:, :-1].reshape(-1, self.logits.shape[-1])[is_target]


def loss_of(student, teacher, ids, learned, config, targets=1, sequences=1):
    """(share of the loss, KL, cross-entropy) of logits."""
    head = Head(lambda rows: rows, student.shape[-1])
    lesson = Logits(teacher) if teacher is not None else None
    return token_loss(student, head, lesson, ids, learned, config, targets, sequences)


def example(vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, vocabulary, generator=generator, dtype=torch.float32) * 3
    teacher = torch.randn(2, 9, vocabulary, generator=generator) * 3
    ids = torch.randint(0, vocabulary, (2, 9), generator=generator)
    learned = torch.rand(2, 9, generator=generator) < 0.7
    return student, teacher, ids, learned


def oracle(student, teacher, ids, learned, config):
    """The same in float64 with autograd."""
    student = student.double().requires_grad_()
    mask = learned[:, 1:].reshape(-1)
    s = student[:, :-1].reshape(-1, student.shape[-1])[mask]
    t = teacher.double()[:, :-1].reshape(-1, student.shape[-1])[mask]
    targets = ids[:, 1:].reshape(-1)[mask]
    tau = config.temperature
    p, q = (s / tau).softmax(-1), (t / tau).softmax(-1)
    if config.top_k is not None:  # the rest counts as one token
        where = q.topk(config.top_k).indices
        p, q = (torch.cat([top := x.gather(-1, where), 1 - top.sum(-1, keepdim=True)], -1) for x in (p, q))
    kl = tau**2 * torch.nn.functional.kl_div(p.log(), q.log(), log_target=True, reduction="sum")
    ce = torch.nn.functional.cross_entropy(s, targets, reduction="sum")
    total = config.kl_weight * kl + config.cross_entropy_weight * ce
    total.backward()
    return total, kl, ce, student.grad


@pytest.mark.parametrize("block_bytes", [1 << 20, 600])
@pytest.mark.parametrize("config", CONFIGS)
def test_matches_float64_autograd(monkeypatch, config, block_bytes):
    monkeypatch.setitem(readout_module.BLOCK_BYTES, "cpu", block_bytes)
    student, teacher, ids, learned = example()
    student.requires_grad_()
    total, kl, ce = loss_of(student, teacher, ids, learned, config)
    total.backward()
    expected_total, expected_kl, expected_ce, grad = oracle(student.detach(), teacher, ids, learned, config)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ce, expected_ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 5, None])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_through_the_head_match_float64_autograd(config, chunk_tokens):
    """Of the states, and of a head's weight and bias that train."""
    _, teacher, ids, learned = example()
    states, head = torch.randn(2, 9, 12, requires_grad=True), torch.nn.Linear(12, 50)
    read = Head(head.forward, 50, list(head.parameters()))
    chunked = config.model_copy(update={"chunk_tokens": chunk_tokens})
    total = token_loss(states, read, Logits(teacher), ids, learned, chunked, 1, 1)[0]
    total.backward()
    logits = (states.detach().double() @ head.weight.detach().double().T + head.bias.detach().double()).detach()
    expected, *_, slope = oracle(logits, teacher, ids, learned, config)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    slope, inputs = slope.reshape(-1, 50), states.detach().double().reshape(-1, 12)
    for found, wanted in (
        (states.grad.reshape(-1, 12), slope @ head.weight.detach().double()),
        (head.weight.grad, slope.T @ inputs),
        (head.bias.grad, slope.sum(0)),
    ):
        assert (found.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_without_a_teacher_the_loss_is_cross_entropy():
    student, _, ids, learned = example()
    total, _, ce = loss_of(student, None, ids, learned, LossConfig(teacher="none"))
    torch.testing.assert_close(total, ce)


@pytest.mark.parametrize("kind", ["mse", "normalised"])
def test_hidden_term(kind):
    learned = example()[3]
    hidden = tuple(torch.randn(2, 9, 12) for _ in range(3))
    other = tuple(torch.randn(2, 9, 12) for _ in range(3))
    config = LossConfig(hidden=kind, hidden_weight=2.0)
    assert hidden_loss(hidden, hidden, learned, config, 1) == 0
    mask = learned[:, 1:]
    expected = 0.0
    for s, t in zip(hidden, other, strict=True):
        s, t = s[:, :-1][mask], t[:, :-1][mask]
        if kind == "mse":
            expected += (s - t).square().mean(-1).sum()
        else:
            expected += (s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)).square().sum()
    torch.testing.assert_close(hidden_loss(hidden, other, learned, config, 10), 0.2 * expected, rtol=1e-4, atol=1e-4)


def test_sums_are_divided_by_targets_or_sequences():
    student, teacher, ids, learned = example()
    whole = loss_of(student, teacher, ids, learned, LossConfig())[0]
    torch.testing.assert_close(loss_of(student, teacher, ids, learned, LossConfig(), 10, 4)[0], whole / 10)
    batchmean = LossConfig(kl_reduction="batchmean")
    torch.testing.assert_close(loss_of(student, teacher, ids, learned, batchmean, 10, 4)[0], whole / 4)
    cross_entropy = {"kl_weight": 0.0, "cross_entropy_weight": 1.0}
    found = [
        loss_of(student, teacher, ids, learned, LossConfig(kl_reduction=reduction, **cross_entropy), 10, 4)[0]
        for reduction in ("per_token", "batchmean")
    ]
    torch.testing.assert_close(*found)


KINDS = {
    "llama": lambda: models.small_model("llama"),
    "gpt2": lambda: models.small_model("gpt2"),
    "opt": lambda: models.small_model("opt"),
    "dynamic rope": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE, rope_parameters=_DYNAMIC)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_SHAPE, final_logit_softcapping=3.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**_SHAPE, logit_scale=0.5)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**_SHAPE, logits_scaling=4.0)),
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
_SHAPE = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def share_of_loss(model, teacher, batch, config):
    """Of a model that learns from another, both cut before their heads; its gradients are left in it."""
    lesson = teacher.teach(batch)
    total = reader_of(model, CPU, torch.float32)(
        batch.input_ids,
        lambda states, head: token_loss(states, head, lesson, batch.input_ids, batch.learned, config, 1, 1),
    )[0]
    total.backward()
    return total.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_more_than_apply_its_head_gives_whole_logits(kind):
    """Whatever the model does behind its head, the loss is that of its own logits, and so are the gradients."""
    model, taught = KINDS[kind]().eval(), KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in taught.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models.VOCABULARY, (2, 16), generator=generator)
    batch = Batch(ids, torch.rand(2, 16, generator=generator) < 0.8, [0, 1])
    config = LossConfig(cross_entropy_weight=0.5, chunk_tokens=7)
    found = share_of_loss(model, LiveTeacher(taught, CPU, torch.float32), batch, config)
    parameter = next(p for name, p in model.named_parameters() if "embed_tokens" in name or "wte" in name)  # tied
    gradient, parameter.grad = parameter.grad, None
    logits = model(input_ids=ids).logits
    slope = oracle(logits.detach(), taught(input_ids=ids).logits.detach(), ids, batch.learned, config)
    torch.testing.assert_close(found, slope[0], rtol=1e-4, atol=1e-4)
    logits.backward(slope[3].float())
    assert (gradient - parameter.grad).norm() < 1e-4 * parameter.grad.norm()
    said = {"llama": "in chunks", "gpt2": "in chunks", "opt": "in chunks", "dynamic rope": "cannot be followed"}
    assert said.get(kind, "does more than apply its head") in Readout(model).describe()


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_exist_for_a_chunk_of_tokens_only():
    model, taught = models.small_model("llama").requires_grad_(False), models.small_model("llama", layers=1)
    model.model.layers.requires_grad_(True)
    ids = torch.randint(0, models.VOCABULARY, (16, 64))
    batch = Batch(ids, torch.ones(16, 64, dtype=torch.bool), [0] * 16)
    teacher = LiveTeacher(taught, CPU, torch.float32)
    with LargestTensor() as seen:
        share_of_loss(model, teacher, batch, LossConfig(chunk_tokens=32))
    assert seen.elements < 16 * 64 * models.VOCABULARY // 4, "attention and states are smaller than that"
