import math
import types

import datasets
import pytest
import torch
import transformers

from mbdist.comm.communicator import Communicator
from mbdist.train.evaluate import evaluate
from mbdist.train.teachers import LiveTeacher


class Table(transformers.PreTrainedModel):
    """A causal LM without a head: the logits after a token are its row."""

    def __init__(self, table):
        super().__init__(transformers.PreTrainedConfig(vocab_size=len(table)))
        self.table = table

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_kl_and_agreement_against_the_definitions():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (5, 8), generator=generator)
    learned = torch.rand(5, 8, generator=generator) < 0.7
    table, taught = torch.randn(11, 11, generator=generator), torch.randn(11, 11, generator=generator)
    taught = taught + table  # so that they agree sometimes
    windows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "learned": learned.tolist()}).with_format("torch")
    student, teacher = (LiveTeacher(Table(each), torch.device("cpu"), torch.float32) for each in (table, taught))
    found = evaluate(student.read, windows, 2, Communicator(), torch.device("cpu"), teacher.teach)
    nll = kl = agreed = count = 0.0
    for row in range(5):
        for t in range(1, 8):
            if not learned[row, t]:
                continue
            p, q = table[ids[row, t - 1]].double().softmax(0), taught[ids[row, t - 1]].double().softmax(0)
            nll -= p[ids[row, t]].log()
            kl += (q * (q / p).log()).sum()
            agreed += float(p.argmax() == q.argmax())
            count += 1
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found.kl == pytest.approx(float(kl / count), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreed / count) and 0 < agreed < count
    alone = evaluate(student.read, windows, 3, Communicator(), torch.device("cpu"))
    assert alone.perplexity == pytest.approx(found.perplexity) and alone.kl is None
