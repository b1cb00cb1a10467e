"""The model that a run starts from."""

from __future__ import annotations

from mbdist.config.section import Section


class ModelConfig(Section):
    path: str
    """A local folder, a hub id, or ``package:NAME`` for the folder of an installed Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, where the weights are in that format."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
