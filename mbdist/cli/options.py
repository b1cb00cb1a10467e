"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from mbdist.errors import UserError

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="Config of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the file's.")
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or package:NAME.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file inside MODEL, if it is one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def check_folder(json_file: Path | None) -> None:
    """Before anything is measured. Raises UserError where ``--json`` names a file in no folder."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.absolute().parent}")


def check_choice(option: str, value: str, allowed: Collection[str]) -> None:
    """Raises UserError where ``value`` is not among what is allowed."""
    if value not in allowed:
        raise UserError(f"{option} {value}: there is {', '.join(allowed)}")
