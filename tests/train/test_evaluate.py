import math

import datasets
import pytest
import torch

from mbdist.comm.communicator import Communicator
from mbdist.train.evaluate import evaluate


def test_perplexity_kl_and_agreement_against_the_definitions():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (5, 8), generator=generator)
    learned = torch.rand(5, 8, generator=generator) < 0.7
    table, taught = torch.randn(11, 11, generator=generator), torch.randn(11, 11, generator=generator)
    taught = taught + table  # so that they agree sometimes
    windows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "learned": learned.tolist()}).with_format("torch")
    found = evaluate(lambda x: table[x], windows, 2, Communicator(), torch.device("cpu"), lambda x: taught[x])
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
    alone = evaluate(lambda x: table[x], windows, 3, Communicator(), torch.device("cpu"))
    assert alone.perplexity == pytest.approx(found.perplexity) and alone.kl is None
