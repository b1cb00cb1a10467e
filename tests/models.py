"""Small real models with a real tokenizer, made on the spot."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.convert import Conversion, LayerReport
from mbdist.model.loading import load_model

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def small_model(architecture: str = "llama", layers: int = 2) -> transformers.PreTrainedModel:
    """A model with odd sizes: 72 and 80 columns are no multiples of 32."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=72, n_layer=layers, n_head=4, n_positions=128, **common)
    elif architecture == "opt":
        config = transformers.OPTConfig(
            hidden_size=72,
            num_hidden_layers=layers,
            num_attention_heads=4,
            ffn_dim=80,
            max_position_embeddings=128,
            word_embed_proj_dim=72,
            **common,
        )
    else:
        kind = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "mistral": transformers.MistralConfig,
        }[architecture]
        config = kind(
            hidden_size=72,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=18,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            **common,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a fresh initialisation is so small that logits hardly differ
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def save_small_model(folder: Path, architecture: str = "llama", layers: int = 2) -> Path:
    small_model(architecture, layers).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def convert(
    model: transformers.PreTrainedModel, folder: Path, config: ConvertConfig, calibration=(), dtype=torch.float32
) -> tuple[list[LayerReport], transformers.PreTrainedModel]:
    """(reports, converted model) by way of files: ``folder/float`` and ``folder/out``."""
    model.save_pretrained(folder / "float")
    shutil.rmtree(folder / "out", ignore_errors=True)
    reports = list(Conversion(ModelConfig(path=str(folder / "float")), folder / "out", config, dtype).run(calibration))
    return reports, load_model(ModelConfig(path=str(folder / "out")))


def run_settings(run_dir: Path, model: Path, **sections) -> dict:
    """Settings of a short run; keyword arguments replace or extend sections."""
    settings = {
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "convert": {"planes": 2, "init": "svid"},  # leaves the most to learn
        "data": {
            "train": {"type": "python_docs"},
            "window": 32,
            "max_eval_windows": 8,
            "cache_dir": str(run_dir.parent / "cache"),
        },
        "train": {
            "steps": 4,
            "sequences_per_step": 12,
            "micro_batch": 2,
            "precision": "fp32",
            "check_planes_every": 1,
        },
        "boolean": {
            "planes": "levels",
            "signal": "curvature",
            "step_size": 0.5,
            "max_step": 1.0,
            "max_flip_rate": 0.01,
            "warmup_fraction": 0.0,
        },
        "cluster": {"workers": 1, "zero_stage": 2, "device": "cpu"},
        "sample_prompt": None,
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    return settings
