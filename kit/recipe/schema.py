"""What a recipe may hold: sections, fields, and the pydantic models made from signatures."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from kit import registry
from kit.recipe.findings import nearest_path

_STRICT = ConfigDict(
    strict=True,
    extra="forbid",
    allow_inf_nan=False,
    protected_namespaces=(),
)


@dataclass(frozen=True)
class Section:
    """One section of a recipe: a choice from a table.

    Attributes:
        entries: name to `module:Name`; or what gives them, where plugins add some.
        required: False where a recipe may leave the section out.
        default: the `type` of a section that does not name one; a required section with a
            default may be left out if all its keys have defaults.
    """

    entries: Mapping[str, str] | Callable[[], Mapping[str, str]]
    required: bool = True
    default: str | None = None

    @property
    def table(self) -> Mapping[str, str]:
        """Name to `module:Name`."""
        return self.entries() if callable(self.entries) else self.entries


@dataclass(frozen=True)
class Stack:
    """A section of several entries, each used at most once, in the order they are written in.

    Attributes:
        names: lists all that there are.
        load: imports one, when a recipe names it.
    """

    names: Callable[[], Collection[str]]
    load: Callable[[str], registry.Factory]


@dataclass(frozen=True)
class Schema:
    """What the recipe of one command may hold.

    Attributes:
        title: name of the command.
        fields: plain fields, name to (annotation, default); `...` is required.
        sections: the sections by name.
        stacks: sections of several entries, by name; a recipe may leave them out.
    """

    title: str
    fields: Mapping[str, tuple[Any, Any]]
    sections: Mapping[str, Section]
    stacks: Mapping[str, Stack] = field(default_factory=dict)


def json_schema(schema: Schema) -> dict[str, Any]:
    """Describe all that a recipe may hold as a JSON schema, for editors."""
    types = {name: tuple(section.table) for name, section in schema.sections.items()}
    types |= {name: tuple(stack.names()) for name, stack in schema.stacks.items()}
    model = recipe_model(schema, types)
    described = model.model_json_schema()
    described["properties"]["extends"] = {"type": "string", "description": "the recipe below"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def recipe_model(schema: Schema, types: Mapping[str, Sequence[str]]) -> type[BaseModel]:
    """Make the model of a recipe that uses some of the types of each section and stack."""
    members: dict[str, Any] = dict(schema.fields)
    for name, section in schema.sections.items():
        models = [
            _section_model(section.table[entry], entry, has_default=entry == section.default)
            for entry in types[name]
        ]
        annotation: Any = Any
        if len(models) == 1:
            annotation = models[0]
        elif models:
            annotation = Annotated[Union[tuple(models)], Field(discriminator="type")]  # noqa: UP007
        is_optional = not models or not section.required or section.default is not None
        members[name] = (annotation | None, None) if is_optional else (annotation, ...)
    for name, stack in schema.stacks.items():
        model = _stack_model(name, {entry: stack.load(entry) for entry in types[name]})
        members[name] = (model, Field(default_factory=dict))
    return create_model(schema.title, __config__=_STRICT, **members)


def _stack_model(name: str, entries: Mapping[str, registry.Factory]) -> type[BaseModel]:
    """Make the model of a stack: for each entry, its options."""
    members: dict[str, Any] = {}
    for entry, factory in entries.items():
        document, options = factory.__doc__, _options(factory)
        model = create_model(entry, __config__=_STRICT, __doc__=document, **options)
        members[entry] = (model | None, None)
    return create_model(name, __config__=_STRICT, **members)


@cache
def _section_model(reference: str, entry: str, *, has_default: bool) -> type[BaseModel]:
    factory = registry.load(reference)
    kind: Any = (Literal[entry], entry if has_default else ...)
    members = {"type": kind, **_options(factory)}
    return create_model(entry, __config__=_STRICT, __doc__=factory.__doc__, **members)


def _options(factory: registry.Factory) -> dict[str, Any]:
    """Give the members that a factory's keyword-only parameters make of a model."""
    return {
        name: (
            parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for name, parameter in registry.options(factory).items()
    }


def _existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(nearest_path(Path(text)))
    return text


def _existing_folder(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError(nearest_path(Path(text)))
    return text


ExistingFile = Annotated[str, AfterValidator(_existing_file)]
"""A file that must be there when the recipe is read."""

ExistingFolder = Annotated[str, AfterValidator(_existing_folder)]
"""A folder that must be there when the recipe is read."""
