"""YAML as plain values with the place of each: what a recipe is before anyone checks its keys.

YAML 1.2 scalars hold: `1e-4` is a number, `no` and `12:30` are text. Only scalars, lists and
mappings are read; anchors, tags and repeated keys are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kit.errors import InputError

Keys = tuple[str | int, ...]
"""Where a value stands: the keys and list positions that lead to it."""

OVERRIDE_PLACE = "command line"

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")}


@dataclass(frozen=True)
class Document:
    """Values with their places.

    Attributes:
        values: the top mapping, of plain values.
        places: where a value was written, such as `lora.yaml:4`; () is the document itself.
        problems: what could not be read, one line each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, keys: Keys) -> str:
        """Say where a value, or else the nearest one around it, was written."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, OVERRIDE_PLACE)


def load_document(path: Path) -> Document:
    """Read a YAML file whose top is a mapping; an empty file is an empty mapping.

    Raises:
        InputError: the file is not YAML, not UTF-8 or not a mapping.
    """
    try:
        node = _compose(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8") from None
    except YAMLError as error:
        raise InputError(f"{path}{_line_of(error)}: {_reason(error)}") from None
    document = Document(places={(): str(path)})
    if isinstance(node, MappingNode):
        document.values.update(_plain(node, (), str(path), document))
    elif node is not None:
        raise InputError(f"{path}: must hold keys with values, such as `name: talk`")
    return document


def parse_overrides(overrides: Sequence[str]) -> Document:
    """Read `section.key=value` words by the rules of the file."""
    document = Document()
    for override in overrides:
        name, sign, text = override.partition("=")
        keys = tuple(name.split("."))
        if not sign or not all(keys):
            document.problems.append(f"{OVERRIDE_PLACE}: '{override}': write it as key=value")
            continue
        _put(keys, _override_value(text, keys, document), document)
    return document


def _override_value(text: str, keys: Keys, document: Document) -> Any:
    """Read lists, mappings, quoted text, numbers and words like true; all else is text as it is."""
    try:
        node = _compose(text)
    except YAMLError:
        return text
    if node is None:
        return None if text.strip() in ("", "~") else text
    is_written_as_yaml = text.strip()[:1] in ("[", "{", '"', "'")
    is_number_or_word = isinstance(node, ScalarNode) and not isinstance(_scalar(node), str)
    if is_written_as_yaml or (is_number_or_word and node.value == text.strip()):
        return _plain(node, keys, None, document)
    return text


def merge(below: Document, above: Document, default_types: Mapping[str, str | None]) -> Document:
    """Lay one document over another, key by key.

    Args:
        below: what holds where `above` is silent.
        above: what wins.
        default_types: the `type` of each section that does not name one. Where the type
            changes, the keys of the old type go.
    """
    return Document(
        values=_merge_sections(below.values, above.values, default_types),
        places={**below.places, **above.places},
        problems=[*below.problems, *above.problems],
    )


def _compose(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    node: Node | None = yaml.compose(text)
    return node


def _plain(node: Node, keys: Keys, file: str | None, document: Document) -> Any:
    """Turn a node into plain values, noting the place of each and what is wrong on the way."""
    place = f"{file}:{node.start_mark.line + 1}" if file else OVERRIDE_PLACE
    if keys:
        document.places.setdefault(keys, place)
    if node.anchor is not None:
        document.problems.append(f"{place}: {_name(keys)}: anchors have no place in a recipe")
    elif isinstance(node, MappingNode) and str(node.tag) == _TAG + "map":
        return _plain_mapping(node, keys, file, document)
    elif isinstance(node, SequenceNode) and str(node.tag) == _TAG + "seq":
        return [_plain(item, (*keys, i), file, document) for i, item in enumerate(node.value)]
    elif isinstance(node, ScalarNode) and str(node.tag) in _SCALARS:
        try:
            return _scalar(node)
        except (KeyError, ValueError):
            document.problems.append(f"{place}: {_name(keys)}: '{node.value}' is not {node.tag}")
    else:
        document.problems.append(f"{place}: {_name(keys)}: tag {node.tag} has no place in a recipe")
    return None


def _plain_mapping(
    node: MappingNode, keys: Keys, file: str | None, document: Document
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        place = f"{file}:{key_node.start_mark.line + 1}" if file else OVERRIDE_PLACE
        if key in values:
            document.problems.append(f"{place}: {_name((*keys, key))}: is written twice")
            continue
        document.places[(*keys, key)] = place
        values[key] = _plain(value_node, (*keys, key), file, document)
    return values


def _scalar(node: ScalarNode) -> Any:
    # YAML 1.2 knows no dates; ruamel.yaml reads them all the same.
    if str(node.tag) == _TAG + "timestamp":
        return node.value
    return YAML(typ="safe", pure=True).constructor.construct_object(node)


def _put(keys: tuple[str, ...], value: Any, document: Document) -> None:
    """Set one value in the tree of overrides, unless another one stands in its way."""
    inner = document.values
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            break
    if not isinstance(inner, dict) or keys[-1] in inner:
        document.problems.append(f"{OVERRIDE_PLACE}: {_name(keys)}: is written twice")
        return
    inner[keys[-1]] = value
    document.places[keys] = OVERRIDE_PLACE


def _merge_sections(
    below: dict[str, Any], above: dict[str, Any], default_types: Mapping[str, str | None]
) -> dict[str, Any]:
    merged = dict(below)
    for key, new in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            old_type = old.get("type", default_types.get(key))
            same = new.get("type", old_type) == old_type
            merged[key] = _merge_sections(old, new, {}) if same else new
        else:
            merged[key] = new
    return merged


def _line_of(error: YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    return f":{mark.line + 1}" if mark is not None else ""


def _reason(error: YAMLError) -> str:
    text = error.problem if isinstance(error, MarkedYAMLError) else str(error)
    return f"is not YAML: {text}"


def _name(keys: Keys) -> str:
    return ".".join(map(str, keys))
