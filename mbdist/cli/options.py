"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbdist.errors import UserError

if TYPE_CHECKING:
    from mbdist.config.data import DataSource

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="Config of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the file's.")
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or package:NAME.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file inside MODEL, if it is one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
TextFiles = Annotated[
    list[str] | None,
    typer.Option(help="Text, JSON lines (.gz too) or parquet, whose field is text; file or pattern; repeatable."),
]
PythonDocs = Annotated[bool, typer.Option("--python-docs", help="Use the prose of Python's documentation.")]

_RECORDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def text_source(files: list[str] | None) -> DataSource:
    """What ``--text`` names, told by the files' endings; Python's documentation where it names none. Raises UserError
    where the files are of several kinds."""
    from mbdist.config.data import PythonDocsSource, RecordsSource, TextSource

    if not files:
        return PythonDocsSource(type="python_docs")
    kinds = {next((_RECORDS[end] for end in Path(file).suffixes[-2:] if end in _RECORDS), "text") for file in files}
    if len(kinds) > 1:
        raise UserError(f"--text names files of several kinds ({', '.join(sorted(kinds))}): name those of one")
    (kind,) = kinds
    return TextSource(type=kind, paths=files) if kind == "text" else RecordsSource(type=kind, paths=files)


def check_folder(json_file: Path | None) -> None:
    """Before anything is measured. Raises UserError where ``--json`` names a file in no folder."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.absolute().parent}")


def check_choice(option: str, value: str, allowed: Collection[str]) -> None:
    """Raises UserError where ``value`` is not among what is allowed."""
    if value not in allowed:
        raise UserError(f"{option} {value}: there is {', '.join(allowed)}")
