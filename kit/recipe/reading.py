"""Read a recipe file, check it against a schema, and build what it names."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from kit import registry, shipped
from kit.errors import InputError, did_you_mean
from kit.recipe.document import Document, Keys, load_document, merge, parse_overrides
from kit.recipe.findings import findings_of, nearest_path
from kit.recipe.schema import Schema, Section, recipe_model


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: the file it came from.
        values: everything, with defaults, as plain values that say the same on every machine:
            a shipped file keeps its `shipped:` name. Sections left out are absent.
        schema: what it was checked against.
        checked: the same values as pydantic made them.
    """

    path: Path
    values: Mapping[str, Any]
    schema: Schema
    checked: BaseModel = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """YAML of the values; reading it again gives the same values."""
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        stream = io.StringIO()
        yaml.dump(dict(self.values), stream)
        return stream.getvalue()

    @property
    def sha256(self) -> str:
        """Hash of the values, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __contains__(self, name: str) -> bool:
        """Whether a field or section has a value."""
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        """Get a plain field, with `shipped:` names turned into paths."""
        return getattr(self.checked, name)

    def factory(self, section: str) -> registry.Factory:
        """Load the table entry that a section names."""
        reference = self.schema.sections[section].table[self.values[section]["type"]]
        factory: registry.Factory = registry.load(reference)
        return factory

    def build_stack(self, name: str, *composed: object) -> dict[str, Any]:
        """Build the entries of a stack in the recipe's order, by their names; {} if left out."""
        load, checked = self.schema.stacks[name].load, getattr(self.checked, name)
        built = {}
        for entry in self.values.get(name, {}):
            factory, options = load(entry), getattr(checked, entry)
            values = {key: getattr(options, key) for key in registry.options(factory)}
            built[entry] = registry.build(factory, values, *composed)
        return built

    def build(self, section: str, *composed: object) -> Any:
        """Build what a section names, from its keys and what the caller hands in."""
        factory, checked = self.factory(section), getattr(self.checked, section)
        values = {name: getattr(checked, name) for name in registry.options(factory)}
        return registry.build(factory, values, *composed)


def read(path: str | Path, overrides: Sequence[str], schema: Schema) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the file; one that does not exist here is looked for among the shipped recipes.
        overrides: `section.key=value` words that win over the file.
        schema: what the recipe may hold.

    Raises:
        InputError: with every finding on a line of its own.
    """
    found = find_recipe(path)
    document = _load_with_parent(found, _default_types(schema))
    return _checked(found, document, overrides, schema)


def change(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Give a recipe with some of its values replaced.

    Args:
        recipe: stays as it is.
        overrides: `section.key=value` words.

    Raises:
        InputError: with every finding on a line of its own.
    """
    document = Document(values=dict(recipe.values), places={(): str(recipe.path)})
    return _checked(recipe.path, document, overrides, recipe.schema)


def _checked(path: Path, below: Document, overrides: Sequence[str], schema: Schema) -> Recipe:
    document = merge(below, parse_overrides(overrides), _default_types(schema))
    problems = list(document.problems)
    values = _resolve(document.values, (), document, problems)
    types = _choose_types(values, schema, document, problems)
    types |= _choose_entries(values, schema, document, problems)
    checked = _check(recipe_model(schema, types), values, document, problems)
    if problems or checked is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    dumped = {
        name: _portable(value)
        for name, value in checked.model_dump(mode="json").items()
        if value is not None or name not in schema.sections
    }
    # The model has its own order; what is applied first is told by the recipe's.
    for name in schema.stacks:
        entries = dumped.pop(name)
        if entries:
            dumped[name] = {entry: entries[entry] for entry in types[name]}
    return Recipe(path, dumped, schema, checked)


def _default_types(schema: Schema) -> dict[str, str | None]:
    return {name: section.default for name, section in schema.sections.items()}


def find_recipe(path: str | Path) -> Path:
    """Find a recipe here or among the shipped ones.

    Raises:
        InputError: there is none; names the shipped recipes.
    """
    found = look_up(path)
    if found is not None:
        return found
    folder = shipped.shipped("recipes")
    names = [str(file.relative_to(folder.parent)) for file in folder.rglob("*.yaml")]
    raise InputError(f"{path}: no such recipe{did_you_mean(str(path), names)}")


def look_up(name: str | Path, folder: Path = Path()) -> Path | None:
    """Look for a recipe in a folder, then among the shipped ones; None if it is nowhere."""
    places = (folder, shipped.root(), shipped.shipped("recipes"))
    return next((place / name for place in places if (place / name).is_file()), None)


def _load_with_parent(path: Path, defaults: Mapping[str, str | None]) -> Document:
    document = load_document(path)
    if "extends" not in document.values:
        return document
    name, place = document.values.pop("extends"), document.place(("extends",))
    if not isinstance(name, str):
        raise InputError(f"{place}: extends: {name!r} is not the name of a recipe")
    parent_path = look_up(name, path.parent)
    if parent_path is None:
        raise InputError(f"{place}: extends: {nearest_path(path.parent / name)}")
    parent = load_document(parent_path)
    if "extends" in parent.values:
        where = parent.place(("extends",))
        raise InputError(f"{place}: extends: {name} extends a recipe itself ({where}); one level")
    return merge(parent, document, defaults)


def _resolve(value: Any, keys: Keys, document: Document, problems: list[str]) -> Any:
    """Turn `shipped:` names into paths, at any depth."""
    if isinstance(value, dict):
        return {k: _resolve(v, (*keys, k), document, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, (*keys, i), document, problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        return shipped.resolve(value)
    except ValueError as error:
        problems.append(f"{document.place(keys)}: {'.'.join(map(str, keys))}: {error}")
        return value


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return shipped.portable(value) if isinstance(value, str) else value


def _choose_types(
    values: dict[str, Any], schema: Schema, document: Document, problems: list[str]
) -> dict[str, tuple[str, ...]]:
    """Name the type of each section, filling in default types; () where there is none to check."""
    types: dict[str, tuple[str, ...]] = {}
    for name, section in schema.sections.items():
        types[name] = ()
        value = values.get(name)
        if value is None and section.required and section.default:
            value = values[name] = {}
        if value is None:
            values.pop(name, None)
            if section.required:
                choices = ", ".join(sorted(section.table))
                problems.append(f"{document.place(())}: {name}: missing; its types: {choices}")
        elif not isinstance(value, dict):
            where = document.place((name,))
            problems.append(f"{where}: {name}: {json.dumps(value)}; should be keys with values")
        else:
            chosen = value.setdefault("type", section.default)
            if isinstance(chosen, str) and chosen in section.table:
                types[name] = (chosen,)
            else:
                problems.append(_wrong_type(name, chosen, section, document))
    return types


def _choose_entries(
    values: dict[str, Any], schema: Schema, document: Document, problems: list[str]
) -> dict[str, tuple[str, ...]]:
    """Name the entries of each stack; one that is null is left out, which undoes `extends`."""
    entries: dict[str, tuple[str, ...]] = {}
    for name, stack in schema.stacks.items():
        given = values.get(name) or {}
        if not isinstance(given, dict):
            where = document.place((name,))
            problems.append(f"{where}: {name}: {json.dumps(given)}; should be names with options")
            given = {}
        valid, kept = stack.names() if given else (), {}
        for entry, options in given.items():
            if options is not None and entry not in valid:
                place = document.place((name, entry))
                problems.append(f"{place}: {name}: unknown '{entry}'{did_you_mean(entry, valid)}")
            elif options is not None:
                kept[entry] = options
        values[name], entries[name] = kept, tuple(kept)
    return entries


def _wrong_type(name: str, chosen: object, section: Section, document: Document) -> str:
    place = document.place((name, "type"))
    if chosen is None:
        return f"{place}: {name}.type: missing{did_you_mean('', section.table)}"
    return f"{place}: {name}.type: unknown '{chosen}'{did_you_mean(str(chosen), section.table)}"


def _check(
    model: type[BaseModel], values: dict[str, Any], document: Document, problems: list[str]
) -> BaseModel | None:
    """Check the values, then once more with the defaults, which may name files too."""
    try:
        # As JSON, because there lists may fill tuples while text still is no number.
        values = model.model_validate_json(json.dumps(values)).model_dump(mode="json")
        values = _resolve(values, (), document, problems)
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems.extend(findings_of(error, model, values, document))
        return None
