"""What is wrong with a recipe, in words: pydantic's errors with place, value and valid words."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kit.errors import did_you_mean
from kit.recipe.document import Document, Keys

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


def findings_of(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], document: Document
) -> list[str]:
    """Write one line for each wrong value: `file:line: place: what; valid ones`."""
    found: dict[Keys, list[str]] = {}
    places: dict[Keys, str] = {}
    for details in error.errors(include_url=False):
        keys = _keys_of(details, values)
        is_missing = details["type"] in _MISSING
        places[keys] = document.place(keys[:-1] if is_missing else keys)
        found.setdefault(keys, []).append(_describe(details, keys, model))
    return [
        f"{places[keys]}: {'.'.join(map(str, keys))}: {_join(texts)}"
        for keys, texts in found.items()
    ]


def nearest_path(path: Path) -> str:
    """Say which file or folder is missing, and what has nearly its name."""
    if path.exists():
        return f"'{path}' is a {'folder' if path.is_dir() else 'file'}"
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    nearest = difflib.get_close_matches(missing.name, names, n=1)
    hint = f"; did you mean '{missing.parent / nearest[0]}'?" if nearest else ""
    where = "" if missing == path else f": there is no '{missing}'"
    return f"'{path}' does not exist{where}{hint}"


def _keys_of(details: ErrorDetails, values: Any) -> Keys:
    """Drop what pydantic puts behind a value's place, such as the member of a union."""
    keys: list[str | int] = []
    for step in details["loc"]:
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            return (*keys, step) if details["type"] in _MISSING else tuple(keys)
        keys.append(step)
    return tuple(keys)


def _describe(details: ErrorDetails, keys: Keys, model: type[BaseModel]) -> str:
    kind, value = details["type"], details["input"]
    if kind in _UNKNOWN:
        return f"unknown '{keys[-1]}'{did_you_mean(str(keys[-1]), _valid_keys(model, keys[:-1]))}"
    if kind in _MISSING:
        return "missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        return f"unknown '{value}'{did_you_mean(str(value), choices)}"
    if kind == "value_error":
        return str(details["ctx"]["error"])
    message = re.sub(r"^[A-Z][a-z]+ should", "should", details["msg"]).replace("array", "list")
    return f"{json.dumps(value, ensure_ascii=False)} {message}"


def _join(texts: list[str]) -> str:
    """Join what the members of a union say, with the value once."""
    value, _, _ = texts[0].partition(" should ")
    return " or ".join([texts[0], *(text.removeprefix(f"{value} should ") for text in texts[1:])])


def _valid_keys(model: type[BaseModel], keys: Keys) -> set[str]:
    """List the keys that a mapping inside the recipe may have."""
    described = model.model_json_schema()
    nodes = [described]
    for key in keys:
        nodes = [child for node in _expand(nodes, described) for child in _children(node, key)]
    names = {name for node in _expand(nodes, described) for name in node.get("properties", {})}
    return names if keys else {*names, "extends"}


def _expand(nodes: list[dict[str, Any]], described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Follow references and alternatives of a JSON schema to what they stand for."""
    for node in nodes:
        yield node
        if "$ref" in node:
            yield from _expand([described["$defs"][node["$ref"].split("/")[-1]]], described)
        for alternatives in ("anyOf", "oneOf", "allOf"):
            yield from _expand(node.get(alternatives, []), described)


def _children(node: dict[str, Any], key: str | int) -> list[dict[str, Any]]:
    if isinstance(key, int):
        return [node["items"]] if "items" in node else []
    return [node["properties"][key]] if key in node.get("properties", {}) else []
