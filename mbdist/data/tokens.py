"""Documents to tokens, each with a mark that says whether it is to be learned."""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

from mbdist.data.sources import Document
from mbdist.errors import UserError


def tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """(token ids, learned) of one document. Of a chat, only what the assistant says is learned."""
    if not isinstance(document, str) and not (
        isinstance(document, list)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in document)
    ):
        raise UserError(f"a record holds neither text nor a chat of {{role, content}}: {str(document)[:80]}")
    if isinstance(document, str):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    try:
        return _tokenize_chat(document, tokenizer)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses a record: {error}; it begins {str(document)[:80]}") from error


def _tokenize_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise UserError("the data holds chats, but the tokenizer has no chat template; use plain text instead")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []  # characters of the rendered chat that the assistant wrote
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not after.startswith(before) or not text.startswith(after):
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns, so the assistant's words cannot be told apart; "
                "render the chats to plain text instead"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(first <= start < last for first, last in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learned
