"""Loading models and tokenizers from wherever a config points, with errors a user can act on."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from mbdist.config.model import ModelConfig
from mbdist.errors import UserError
from mbdist.model.quantizer import QUANT_METHOD, MultiBooleanConfig, MultiBooleanQuantizer


def resolve_path(path: str) -> str:
    """Turn ``package:NAME`` into the folder of an installed package; leave hub ids and folders as they are."""
    if not path.startswith("package:"):
        return path
    package = path.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path = {path}: no Python package {package} is installed (pip install {package})")
    return str(spec.submodule_search_locations[0])


def is_multi_boolean(source: ModelConfig) -> bool:
    """Whether the folder or hub id holds a multi-Boolean model already."""
    path = Path(resolve_path(source.path))
    if source.gguf_file or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    quantization = getattr(load_model_config(source), "quantization_config", None) or {}
    return quantization.get("quant_method") == QUANT_METHOD


def safetensors_of(source: ModelConfig) -> list[Path]:
    """The safetensors files of a model, fetched if they are on the hub; none where it is in a GGUF file.

    Raises UserError where one that the index names is missing, and for a model in pickled files: to read these is to
    run what is in them.
    """
    if source.gguf_file:
        return []
    where, at = resolve_path(source.path), {"revision": source.revision or "main"}
    with clear_errors(source):
        if single := cached_file(where, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **at):
            return [Path(single)]
        index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **at)
        files = [Path(file) for file in get_checkpoint_shard_files(where, index, **at)[0]] if index else []
    if not files:
        load_model_config(source)  # says so where there is no model at all
        raise UserError(
            f"{source.path} has no safetensors files, and pickled ones (.bin) are not read, since they may run any "
            "code: name a revision that has safetensors (model.revision), or, where you trust the files, load them "
            "with transformers and save_pretrained the model"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"the checkpoint {source.path} lacks {len(missing)} of its {len(files)} files, first {missing[0]}; "
            "fetch it again"
        )
    return files


def load_model(source: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM, float or multi-Boolean, in eval mode. Scales of a multi-Boolean model stay fp32."""
    safetensors_of(source)
    with clear_errors(source):
        kind = {"use_safetensors": True}
        if source.gguf_file:
            kind = {"quantization_config": GgufConfig(dequantize=True)}
        model, info = AutoModelForCausalLM.from_pretrained(
            **_arguments(source), **kind, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):  # transformers would carry on with random numbers there
        raise UserError(
            f"the checkpoint {source.path} lacks {len(missing)} weight(s), first {missing[0]}; it is damaged or "
            "of another model"
        )
    if source.gguf_file and getattr(model, "hf_quantizer", None) is not None:
        # The weights are plain floats now; left in place, this mark would forbid saving them.
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def empty_model(source: ModelConfig) -> PreTrainedModel:
    """A causal LM without its weights, in eval mode: parameters (fp32, planes int32) on the meta device, where they
    take no memory, buffers as they are.

    Raises UserError where the architecture is no causal LM of transformers'.
    """
    config = load_causal_config(source)
    with clear_errors(source):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
        model.tie_weights()
        quantization = getattr(config, "quantization_config", None) or {}
        if quantization.get("quant_method") == QUANT_METHOD:
            quantizer = MultiBooleanQuantizer(MultiBooleanConfig(**quantization), pre_quantized=True)
            quantizer.preprocess_model(model)
            quantizer.postprocess_model(model)
            model.hf_quantizer = quantizer
        if model.can_generate() and not source.gguf_file:
            with contextlib.suppress(OSError):  # many models come without one: it follows from config.json
                model.generation_config = GenerationConfig.from_pretrained(
                    resolve_path(source.path), revision=source.revision or "main"
                )
    return model.eval()


def load_tokenizer(source: ModelConfig) -> PreTrainedTokenizerBase:
    with clear_errors(source):
        return AutoTokenizer.from_pretrained(**_arguments(source))


def load_model_config(source: ModelConfig) -> PreTrainedConfig:
    """The model's own config, without its weights."""
    with clear_errors(source):
        return AutoConfig.from_pretrained(**_arguments(source))


def load_causal_config(source: ModelConfig) -> PreTrainedConfig:
    """The same of a causal LM. Raises UserError where the architecture is none of transformers'."""
    config = load_model_config(source)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{source.path} holds a {config.model_type} model, which is not a causal language model")
    return config


def check_window(window: int, config: PreTrainedConfig, setting: str) -> None:
    """Raise UserError where a window is longer than the sequences that the model was made for."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise UserError(f"{setting} = {window} is longer than the model's context of {longest} tokens")


def _arguments(source: ModelConfig) -> dict:
    arguments = {
        "pretrained_model_name_or_path": resolve_path(source.path),
        "gguf_file": source.gguf_file,
        "revision": source.revision or "main",
        "trust_remote_code": source.trust_remote_code,
    }
    return arguments if source.gguf_file else {key: arguments[key] for key in arguments if key != "gguf_file"}


class clear_errors:
    """Turns the loaders' many exceptions into one message that names the model."""

    def __init__(self, source: ModelConfig):
        self.source = source

    def __enter__(self):
        path = Path(resolve_path(self.source.path))
        if self.source.gguf_file and path.is_dir() and not (path / self.source.gguf_file).is_file():
            files = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
            raise UserError(f"{path} has no file {self.source.gguf_file} (GGUF files there: {files})")
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError) or not isinstance(error, (OSError, ValueError, KeyError, RuntimeError)):
            return False
        where = self.source.path + (f" ({self.source.gguf_file})" if self.source.gguf_file else "")
        raise UserError(
            f"cannot load the model {where}: {str(error).strip()}\n"
            "model.path must be a folder with config.json and safetensors, a hub id, or package:NAME"
        ) from error
