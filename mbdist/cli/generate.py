from __future__ import annotations

from typing import Annotated

import typer

from mbdist.cli.options import GgufFile, ModelPath, TrustRemoteCode, check_choice


def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat what the user says.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a text with a model, multi-Boolean or float.

    Example: `mbdist generate runs/quickstart/model --prompt "The Python language" --max-new-tokens 32`
    """
    from mbdist.config.cluster import ClusterConfig
    from mbdist.config.model import ModelConfig
    from mbdist.errors import UserError
    from mbdist.model.loading import load_model, load_tokenizer
    from mbdist.train.environment import choose_device, compute_dtype
    from mbdist.train.reload_check import generate as continue_text

    check_choice("--device", device, ("auto", "cpu", "cuda"))
    source = ModelConfig(path=model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    chosen = choose_device(ClusterConfig(device=device))
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, compute_dtype("auto", chosen)).to(chosen)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {model} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    print(continue_text(loaded, tokenizer, prompt, max_new_tokens, **sampling))
