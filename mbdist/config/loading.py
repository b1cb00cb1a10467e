"""Reads a run's YAML, applies ``key.sub=value`` overrides, and reports every mistake at once."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mbdist.config.schema import RunConfig
from mbdist.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: plain YAML silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a YAML file and overrides (``train.steps=10``). Raises ConfigError listing every problem."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file") from None
    try:
        settings = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(settings).__name__}")
    return parse_config(_apply_overrides(settings, overrides), origin=str(path))


def parse_config(settings: dict, origin: str = "config") -> RunConfig:
    """Validate a nested dict of settings."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem)]
        raise ConfigError(f"{origin}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


def with_changes(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """The config with ``{"section.key": value}`` applied. Raises ConfigError where that makes no run."""
    values = config.model_dump(exclude_unset=True)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return parse_config(values, origin=" ".join(f"{key}={value}" for key, value in changes.items()))


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config, every default spelled out."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _apply_overrides(settings: dict, overrides: Sequence[str]) -> dict:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} must read key.sub=value, for example train.steps=10")
        *sections, last = key.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        try:
            target[last] = yaml.load(value, _UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    return settings


def _explain(problem: Mapping[str, Any]) -> list[str]:
    """A pydantic error as lines a user can act on: key path, what is allowed, the value given."""
    ends_in_key = problem["type"] in ("extra_forbidden", "missing")
    key = ".".join(str(part) for part in _without_tags(problem["loc"], ends_in_key))
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(allowed)}"
        return [f"{key}: unknown setting; {hint}"]
    if problem["type"] == "missing":
        return [f"{key}: missing, and it has no default"]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).splitlines()
    return [f"{key}: {problem['msg'].lower()}, got {problem['input']!r}"]


def _without_tags(location: Sequence[str | int], ends_in_key: bool) -> list[str | int]:
    """A pydantic location as the path a user wrote: the tag of a discriminated union is not part of it.
    ``ends_in_key``: what it ends in is a key, known or not."""
    return [
        part
        for i, part in enumerate(location)
        if isinstance(part, int) or part in _keys_at(location[:i]) or (ends_in_key and i + 1 == len(location))
    ]


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """Names of the settings of the section at ``location``."""
    section: type[BaseModel] = RunConfig
    members: list[type[BaseModel]] = [section]
    for part in location:
        fields = {name: field for member in members for name, field in member.model_fields.items()}
        if part in fields:
            members = _sections_in(fields[part].annotation)
        else:  # pydantic puts the tag of a discriminated union into the path
            members = [m for m in members if part == m.__name__ or part in _types_of(m)]
    return sorted({name for member in members for name in member.model_fields})


def _types_of(section: type[BaseModel]) -> tuple:
    return typing.get_args(section.model_fields["type"].annotation) if "type" in section.model_fields else ()


def _sections_in(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections_in(part)]
