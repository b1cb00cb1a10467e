"""Documents from where a config points: each a string, or a chat as a list of {role, content}."""

from __future__ import annotations

import glob
from pathlib import Path

import datasets

from mbdist.config.data import DataSource, HubSource, PythonDocsSource, RecordsSource, TextSource
from mbdist.errors import UserError

Document = str | list[dict]


def load_documents(source: DataSource) -> list[Document]:
    """All documents in order. Raises UserError for missing files, unknown fields and empty data."""
    documents = _read(source)
    if not any(documents):
        raise UserError(f"the data source {_describe(source)} holds no text")
    return documents


def files_of(source: DataSource) -> list[Path]:
    """The local files of a source, patterns expanded, in order; none for a hub data set."""
    files: list[Path] = []
    for pattern in getattr(source, "paths", []):
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"no file matches data path {pattern} (searched from {Path.cwd()})")
        files += [Path(path) for path in found]
    return files


def _read(source: DataSource) -> list[Document]:
    match source:
        case PythonDocsSource():
            import pydoc_data.topics

            return list(pydoc_data.topics.topics.values())
        case TextSource():
            try:
                return [path.read_text(encoding="utf-8") for path in files_of(source)]
            except (UnicodeDecodeError, OSError) as error:
                raise UserError(f"cannot read {_describe(source)} as UTF-8 text: {error}") from None
        case RecordsSource():
            paths = [str(path) for path in files_of(source)]
            return _field(source, lambda: datasets.load_dataset(source.type, data_files=paths, split="train"))
        case HubSource():
            return _field(source, lambda: datasets.load_dataset(source.name, source.subset, split=source.split))


def _field(source: RecordsSource | HubSource, load) -> list[Document]:
    try:
        records = load()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot read {_describe(source)}: {error.__cause__ or error}") from error
    field = source.messages_field or source.text_field
    if field not in records.column_names:
        raise UserError(f"{_describe(source)} has no field {field!r}; its fields: {', '.join(records.column_names)}")
    return list(records[field])


def _describe(source: DataSource) -> str:
    where = getattr(source, "paths", None) or getattr(source, "name", "")
    return f"{source.type} {where}".strip()
