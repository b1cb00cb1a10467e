"""The windows of published tables, against GPTQ's own preparation written out."""

import random

import pytest

from mbdist.data.published import published_windows
from mbdist.errors import UserError

RAW = " \n = Title = \n \n The value of a name is an object . \n \n = = Part = = \n \n An object has a type . \n"


def test_wikitext2_joins_the_rows_as_the_data_set_has_them(tokenizer):
    rows = ["", " = Title = \n", "", " The value of a name is an object . \n", "", " = = Part = = \n", "",
            " An object has a type . \n"]  # fmt: skip
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    for documents in ([RAW], rows):
        windows = published_windows("wikitext2", documents, tokenizer, 16)
        assert windows[:]["input_ids"].flatten().tolist() == ids[: len(ids) // 16 * 16]
        assert windows[:]["learned"].all()


def test_c4_draws_windows_as_gptq_does(tokenizer):
    documents = [f"{word} is a word of document number {n}. " * 12 for n, word in enumerate(("one", "two", "three"))]
    documents.insert(1, "short")
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > 24:
                break
        first = random.randint(0, len(ids) - 24 - 1)
        expected.append(ids[first : first + 24])
    assert published_windows("c4", documents, tokenizer, 24)[:]["input_ids"].tolist() == expected


@pytest.mark.parametrize("preparation", ["wikitext2", "c4"])
def test_too_little_text(tokenizer, preparation):
    with pytest.raises(UserError, match="smaller --window"):
        published_windows(preparation, ["A few words."], tokenizer, 512)
