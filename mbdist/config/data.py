"""Text to train, to evaluate and to calibrate on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mbdist.config.section import Section


class TextSource(Section):
    type: Literal["text"]
    """Plain text files."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or shell patterns, read in order."""


class RecordsSource(Section):
    type: Literal["json", "parquet"]
    """Records in local files: JSON, JSON lines or parquet."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or shell patterns, read in order."""
    text_field: str = "text"
    """Field that holds the text of a record."""
    messages_field: str | None = None
    """Field that holds a chat, a list of {role, content}; used instead of `text_field` where given."""


class HubSource(Section):
    type: Literal["hub"]
    """A data set of the Hugging Face hub."""
    name: str
    """Hub id."""
    subset: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split, in the hub's slicing syntax (`train[:5%]`)."""
    text_field: str = "text"
    """Field that holds the text of a record."""
    messages_field: str | None = None
    """Field that holds a chat, a list of {role, content}; used instead of `text_field` where given."""


class PythonDocsSource(Section):
    type: Literal["python_docs"]
    """The Python language reference from the standard library: 465 KB of English prose that needs no download."""


DataSource = Annotated[TextSource | RecordsSource | HubSource | PythonDocsSource, Field(discriminator="type")]


class DataConfig(Section):
    train: DataSource
    """What to finetune on."""
    eval: DataSource | None = None
    """What perplexity is measured on. Left out, the last `eval_fraction` of the training windows is held out."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training windows that is held out where `eval` is not given."""
    window: Annotated[int, Field(ge=8)] = 512
    """Tokens a sequence. Documents are joined by the end-of-text token and cut into windows."""
    max_eval_windows: PositiveInt | None = None
    """Measure perplexity on the first so many windows only."""
    cache_dir: str | None = None
    """Where tokenised data is kept; default: the `datasets` library's cache folder."""
