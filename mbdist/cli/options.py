"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="Config of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the file's.")
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or package:NAME.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file inside MODEL, if it is one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
