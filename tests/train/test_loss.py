import pytest
import torch

from mbdist.config.schema import LossConfig
from mbdist.train import loss as loss_module
from mbdist.train.loss import distillation_loss


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


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 600])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(temperature=2.0, kl_weight=0.7),
        LossConfig(cross_entropy_weight=0.3),
        LossConfig(kl_weight=0.0, cross_entropy_weight=1.0),
        LossConfig(top_k=4, temperature=1.5),
    ],
)
def test_matches_float64_autograd(monkeypatch, config, chunk_bytes):
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", chunk_bytes)
    student, teacher, ids, learned = example()
    student.requires_grad_()
    terms = distillation_loss(student, teacher, ids, learned, config, 1, 1)
    terms.total.backward()
    total, kl, ce, grad = oracle(student.detach(), teacher, ids, learned, config)
    torch.testing.assert_close(terms.total.double(), total, rtol=1e-5, atol=1e-5)
    assert terms.kl == pytest.approx(kl.item(), rel=1e-5) and terms.cross_entropy == pytest.approx(ce.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), grad, rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_loss_is_cross_entropy():
    student, _, ids, learned = example()
    terms = distillation_loss(student, None, ids, learned, LossConfig(teacher="none"), 1, 1)
    assert terms.total.item() == pytest.approx(terms.cross_entropy, rel=1e-6)


@pytest.mark.parametrize("kind", ["mse", "normalised"])
def test_hidden_term(kind):
    student, teacher, ids, learned = example()
    hidden = tuple(torch.randn(2, 9, 12) for _ in range(3))
    other = tuple(torch.randn(2, 9, 12) for _ in range(3))
    config = LossConfig(hidden=kind, hidden_weight=2.0)
    plain = distillation_loss(student, teacher, ids, learned, LossConfig(), 1, 1).total
    same = distillation_loss(student, teacher, ids, learned, config, 1, 1, hidden, hidden).total
    apart = distillation_loss(student, teacher, ids, learned, config, 1, 1, hidden, other).total
    mask = learned[:, 1:]
    expected = 0.0
    for s, t in zip(hidden, other, strict=True):
        s, t = s[:, :-1][mask], t[:, :-1][mask]
        if kind == "mse":
            expected += (s - t).square().mean(-1).sum()
        else:
            expected += (s / s.norm(dim=-1, keepdim=True) - t / t.norm(dim=-1, keepdim=True)).square().sum()
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(apart - plain, 2.0 * expected.double(), rtol=1e-4, atol=1e-4)


def test_sums_are_divided_by_targets_or_sequences():
    student, teacher, ids, learned = example()
    hidden, other = (torch.randn(2, 9, 12),), (torch.randn(2, 9, 12),)

    def loss(targets, sequences, **settings):
        config = LossConfig(**settings)
        states = (hidden, other) if config.hidden != "none" else ()
        return distillation_loss(student, teacher, ids, learned, config, targets, sequences, *states).total

    whole = loss(1, 1)
    torch.testing.assert_close(loss(10, 4), whole / 10)
    torch.testing.assert_close(loss(10, 4, kl_reduction="batchmean"), whole / 4)
    term = (
        loss(1, 1, hidden="mse") - whole
    )  # batchmean is about the KL: the hidden term is a mean over tokens either way
    torch.testing.assert_close(loss(10, 4, hidden="mse", kl_reduction="batchmean"), whole / 4 + term / 10)
