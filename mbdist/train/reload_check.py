"""Loads a finished model in a new process and says what it holds: ``python -m mbdist.train.reload_check FOLDER``.

Prints one JSON object: planes_sha256, and the continuation of a prompt where one is given.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mbdist  # noqa: F401  (registers the format)
from mbdist.model.hashing import hash_planes


def generate(model, tokenizer, prompt: str, max_new_tokens: int, **sampling) -> str:
    """Continue a prompt; greedy unless sampling arguments are given."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = sampling or {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--prompt")
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code
    )
    found = {"planes_sha256": hash_planes(model)}
    if arguments.prompt:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder, trust_remote_code=arguments.trust_remote_code)
        found["generated"] = generate(model, tokenizer, arguments.prompt, max_new_tokens=16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
