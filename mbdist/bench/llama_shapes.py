"""LLaMA's sizes, for benchmarks whose weights may be random."""

from __future__ import annotations

from transformers import LlamaConfig

SHAPES = {  # of ``LlamaConfig``
    name: dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True)
    )
    for name, sizes in {
        "10m": (256, 768, 4, 4),
        "300m": (1536, 4096, 12, 12),
        "700m": (1536, 4096, 24, 12),
        "1b": (2048, 5504, 24, 16),
        "3b": (3200, 8640, 26, 32),
        "7b": (4096, 11008, 32, 32),
        "13b": (5120, 13824, 40, 40),
    }.items()
}


def llama_config(shape: str, vocabulary: int, layers: int | None = None) -> LlamaConfig:
    """One of ``SHAPES``, with so many layers instead of its own where they are given."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
