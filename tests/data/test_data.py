import json

import datasets
import numpy as np
import pytest
import torch

from mbdist.config.data import DataConfig
from mbdist.data import Batches, load_corpus, windows
from mbdist.data.tokens import tokenize
from mbdist.errors import UserError

CHAT = [
    {"role": "user", "content": "What is a value?"},
    {"role": "assistant", "content": "A thing."},
    {"role": "user", "content": "And a name?"},
    {"role": "assistant", "content": "Bound to one."},
]


def data_config(tmp_path, train, **more):
    return DataConfig(train=train, window=16, cache_dir=str(tmp_path / "cache"), **more)


def text_source(tmp_path, text="The value of a name. " * 400):
    (tmp_path / "a.txt").write_text(text)
    return {"type": "text", "paths": [str(tmp_path / "*.txt")]}


def test_windows_are_the_text_cut_in_order(tmp_path, tokenizer):
    corpus = load_corpus(data_config(tmp_path, text_source(tmp_path)), tokenizer)
    ids = [token for split in (corpus.train, corpus.eval) for row in split["input_ids"] for token in row.tolist()]
    expected = [*tokenizer((tmp_path / "a.txt").read_text())["input_ids"], tokenizer.eos_token_id]
    assert ids == expected[: len(ids)] and len(expected) - len(ids) < 16
    assert len(corpus.eval) == round(0.1 * (len(corpus.train) + len(corpus.eval)))
    assert corpus.train[0]["learned"].all()


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_records(tmp_path, tokenizer, kind):
    rows = [{"body": f"The value of a name number {i}. " * 20} for i in range(20)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    source = {"type": kind, "paths": [str(path)], "text_field": "body"}
    assert len(load_corpus(data_config(tmp_path, source), tokenizer).train) > 10
    with pytest.raises(UserError, match="has no field 'text'; its fields: body"):
        load_corpus(data_config(tmp_path, {"type": kind, "paths": [str(path)]}), tokenizer)


def test_of_a_chat_only_the_assistant_is_learned(tokenizer):
    ids, learned = tokenize(CHAT, tokenizer)
    said = tokenizer.decode([token for token, mark in zip(ids, learned, strict=True) if mark])
    assert said == "A thing.<|end|>Bound to one.<|end|>"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_chats_become_windows_with_their_marks(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(40)))
    source = {"type": "json", "paths": [str(path)], "messages_field": "messages"}
    corpus = load_corpus(data_config(tmp_path, source), tokenizer)
    marks = torch.stack(list(corpus.train["learned"]))
    assert 0.1 < marks.float().mean() < 0.9
    path.write_text("\n".join(json.dumps({"messages": CHAT[:1]}) for _ in range(400)))
    with pytest.raises(UserError, match="no assistant turns"):
        load_corpus(data_config(tmp_path, source), tokenizer)


def test_a_tokenizer_without_chat_template_refuses_chats(tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="no chat template"):
            tokenize(CHAT, tokenizer)
    finally:
        tokenizer.chat_template = template


def test_text_is_tokenised_once_and_again_when_anything_changes(tmp_path, tokenizer, monkeypatch):
    calls = []
    cut = windows._cut_windows
    monkeypatch.setattr(windows, "_cut_windows", lambda *args: calls.append(args) or cut(*args))
    config = data_config(tmp_path, text_source(tmp_path))
    first = load_corpus(config, tokenizer)
    again = load_corpus(config, tokenizer)
    assert len(calls) == 1 and first.train[3]["input_ids"].equal(again.train[3]["input_ids"])
    text_source(tmp_path, "Another text altogether. " * 300)
    load_corpus(config, tokenizer)
    assert len(calls) == 2
    tokenizer.add_tokens(["altogether"])  # the key includes the tokenizer
    load_corpus(config, tokenizer)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no text"), ("short", "less than one window"), ("The value of a name. " * 4, "hold")],
)
def test_too_little_text(tmp_path, tokenizer, text, message):
    with pytest.raises(UserError, match=message):
        load_corpus(data_config(tmp_path, text_source(tmp_path, text)), tokenizer)


def test_missing_and_broken_files(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no file matches"):
        load_corpus(data_config(tmp_path, {"type": "text", "paths": ["nowhere/*.txt"]}), tokenizer)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(UserError, match="UTF-8"):
        load_corpus(data_config(tmp_path, {"type": "text", "paths": [str(tmp_path / "a.txt")]}), tokenizer)
    (tmp_path / "a.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot read"):
        load_corpus(data_config(tmp_path, {"type": "json", "paths": [str(tmp_path / "a.json")]}), tokenizer)


def numbered_windows(count):
    rows = {"input_ids": np.arange(count, dtype=np.int32)[:, None], "learned": np.ones((count, 1), bool)}
    return datasets.Dataset.from_dict(rows).with_format("torch")


def order_of(world_size, micro_batch, steps=6, seed=1):
    """Window numbers in the order of (step, contribution), gathered over ranks."""
    rows = numbered_windows(30)
    ranks = [Batches(rows, seed, 12, micro_batch, rank, world_size) for rank in range(world_size)]
    return [
        number
        for step in range(steps)
        for a in range(12 // (world_size * micro_batch))
        for batches in ranks
        for number in batches.micro_batch_at(step, a).input_ids.flatten().tolist()
    ]


def test_the_order_does_not_depend_on_the_workers():
    expected = order_of(1, 12)
    assert sorted(expected[:30]) == list(range(30)), "every window once an epoch"
    assert expected[:30] != expected[30:60], "epochs differ"
    for world_size, micro_batch in ((1, 1), (2, 3), (3, 2), (4, 3), (12, 1)):
        assert order_of(world_size, micro_batch) == expected
    assert order_of(1, 12, seed=2) != expected
