"""``mbdist bench codecs``: what it costs to write the signal in few bits, as loss at equal tokens.

A small LLaMA, trained here on the run's text, loses all but its signs (K = 1) and learns from its float self again. Two
micro-batches of one rank are two contributions, as one of each of two ranks are: the same bits come out (a test holds
that), so one process measures what two ranks would learn. Every variant starts from the same model and sees the same
batches; the row without flips says how much there is to lose.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console

from mbdist.bench.process import in_own_process, one_process_trainer
from mbdist.bench.quality import changed_config
from mbdist.bench.table import table_of
from mbdist.comm.flip_exchange import PlaneStore
from mbdist.config import RunConfig
from mbdist_kernels import popcount

_VARIANTS: tuple[tuple[str, dict], ...] = (
    ("fp32", {}),
    ("no flips", {"boolean.step_size": 0.0}),
    ("bf16", {"comm.codec": "bf16"}),
    *(
        (f"{codec}, {magnitudes}", {"comm.codec": codec, "comm.magnitudes": magnitudes})
        for codec in ("int8", "int4", "sign", "sign_unbiased")
        for magnitudes in ("rank1", "row")
    ),
)


def bench_codecs(config: RunConfig, json_file: Path | None) -> list[dict]:
    """A row a variant: bits a weight on the wire, mean loss of the last quarter of the steps, held-out perplexity, the
    share of the weights that flip in a step, and how many flips fall into a word of 32 that has any: from three on, an
    index and a mask (6 bytes) would tell them in fewer bytes than a position each (2)."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = config.model.model_copy(update={"path": f"{scratch}/float", "gguf_file": None})
        base = config.model_copy(update={"run_dir": scratch, "model": model})
        in_own_process(train_small_model, base)
        for name, changes in _VARIANTS:
            found = in_own_process(_measure, changed_config(base, {"comm.codec": "fp32", **changes}))
            rows.append({"codec": name, **found})
            rows[-1]["loss_over_fp32"] = round(rows[-1]["loss"] / rows[0]["loss"], 4)
            Console().print(rows[-1])
            if json_file is not None:
                json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console().print(table_of(rows))
    return rows


def train_small_model(config: RunConfig) -> dict:
    """A LLaMA of 0.66 M linear weights with a tokenizer of its own, left in ``config.model.path``."""
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    from mbdist.bench.quality_rows import train_dense
    from mbdist.data.sources import load_documents
    from mbdist.train.environment import set_up_worker

    set_up_worker(config)
    byte_pairs = ByteLevelBPETokenizer()
    byte_pairs.train_from_iterator(
        (document for document in load_documents(config.data.train) if isinstance(document, str)),
        1024,
        show_progress=False,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_pairs._tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<eos>"})
    tokenizer.save_pretrained(config.model.path)
    special = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(config.seed)
    llama = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **special)
    model = transformers.LlamaForCausalLM(llama)
    train_dense(config, model.train(), 2 * config.train.steps, 2e-3)
    model.eval().save_pretrained(config.model.path)
    return {}


class _CountingStore:
    """A plane store that counts the flips and the words that have any."""

    def __init__(self, store: PlaneStore):
        self._store = store
        self.flips = self.words = 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def apply(self, masks: dict) -> None:
        for mask in masks.values():
            self.flips += popcount(mask)
            self.words += int(mask.count_nonzero())
        self._store.apply(masks)


def _measure(config: RunConfig) -> dict:
    trainer = one_process_trainer(config)
    trainer.engine.module.train()
    store = trainer.boolean.store = _CountingStore(trainer.boolean.store)
    losses = []
    for step in range(config.train.steps):
        losses.append(trainer.step(step)[1][0].item())
    perplexity = trainer.evaluate("finetuned")
    last = losses[-max(1, len(losses) // 4) :]
    accumulated = trainer.boolean.accumulated
    words = sum(trainer.boolean.reduction.codec.message_words(entry.segments) for entry in accumulated)
    weights = sum(entry.layer.num_weights for entry in accumulated)
    return {
        "bits_per_weight": round(32 * words / weights, 3) if config.boolean.step_size else 0.0,
        "loss": round(sum(last) / len(last), 4),
        "perplexity": round(perplexity, 3),
        "flip_rate": round(store.flips / weights / config.train.steps, 7),
        "flips_a_touched_word": round(store.flips / max(1, store.words), 3),
    }
