"""Read a YAML file into a typed section; every mistake in the file becomes one clear error."""

import contextlib
import difflib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from common.config.section import Section
from common.errors import ConfigError

S = TypeVar("S", bound=Section)
_TOLD = 20  # mistakes
#: The end that pydantic gives a location for one of several types of a key; it is no key of the file.
_TYPE = re.compile(r"str|int|float|(constrained-|literal\[|list\[|dict\[).*")


def load(path: Path, section: type[S]) -> S:
    """Read ``path`` as ``section``.

    Raises:
        ConfigError: names the file and, for each mistake, key, value and allowed values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        data = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader that also refuses double keys
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {_listed(section)}")
    return parse(data, section, str(path))


def parse(data: object, section: type[S], source: str) -> S:
    """Validate plain ``data`` as ``section``; errors begin with ``source``.

    Raises:
        ConfigError: see ``load``.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        wrong = _one_per_place(error.errors(include_url=False))
        lines = [_explain(detail, section) for detail in wrong[:_TOLD]]
        more = [f"and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise ConfigError(f"{source}: " + "; ".join([*dict.fromkeys(lines), *more])) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _one_per_place(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The mistakes, those of the types of one key as one; its types are left out where a part of its value is wrong."""
    found: dict[tuple[int | str, ...], ErrorDetails] = {}
    for detail in details:
        typed = [isinstance(part, str) and _TYPE.fullmatch(part) is not None for part in detail["loc"]]
        place = tuple(part for part, is_type in zip(detail["loc"], typed, strict=True) if not is_type)
        if place in found and typed[-1]:
            also = detail["msg"].removeprefix("Input should be ")
            detail = found[place] | {"msg": f"{found[place]['msg']} or {also}"}
        found[place] = detail | {"loc": place}
    return [one for at, one in found.items() if not any(at == other[: len(at)] != other for other in found)]


def _explain(detail: ErrorDetails, section: type[Section]) -> str:
    """One sentence for one pydantic error."""
    # A discriminated union puts its tag ("fedftg") into the location; it is no key of the file.
    location = [str(part) for part in detail["loc"]]
    owner, keys = _owner(section, location)
    key = ".".join(keys)
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], owner.model_fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"allowed here: {_listed(owner)}"
        return f"unknown key `{key}`; {hint}"
    if kind == "missing":
        field = owner.model_fields.get(keys[-1])
        about = f" ({field.description})" if field is not None and field.description else ""
        return f"missing key `{key}`{about}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        by = (detail.get("ctx") or {}).get("discriminator", "'name'").strip("'")
        tags = [repr(tag) for one in _within(owner, keys[-1]) if (tag := _tag(one)) is not None]
        allowed = (detail.get("ctx") or {}).get("expected_tags", ", ".join(tags))
        tag = value.get(by) if isinstance(value, dict) else value
        if kind == "union_tag_not_found":
            return f"missing key `{key}.{by}`; allowed: {allowed}"
        near = difflib.get_close_matches(str(tag), [t.strip(" '") for t in allowed.split(",")], n=1)
        return f"`{key}.{by}` is {tag!r}; allowed: {allowed}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if kind == "value_error":
        return f"{'`' + key + '`: ' if key else ''}{detail['msg'].removeprefix('Value error, ')}"
    if kind in ("model_type", "model_attributes_type"):
        known = _within(owner, keys[-1]) if keys else [section]
        what = f"`{key}` is {value!r}: " if keys else ""
        return f"{what}must be a section" + (f" with the keys {_listed(known[0])}" if len(known) == 1 else "")
    hint = ""
    if kind.startswith(("float_", "int_")) and isinstance(value, str) and _looks_like_a_number(value):
        hint = " (YAML reads this as text; write 1.0e-2, not 1e-2, and use no quotes)"
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        hint = " (YAML reads yes, no, on, off, numbers and dates as no text; put it in quotes)"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"`{key}` is {value!r}: {message}{hint}"


def _looks_like_a_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _owner(section: type[Section], location: list[str]) -> tuple[type[BaseModel], list[str]]:
    """The section that holds the last part of a location, and the location without union tags."""
    owner: type[BaseModel] = section
    keys: list[str] = []
    candidates: list[type[BaseModel]] = [section]
    for part in location:
        tagged = [c for c in candidates if len(candidates) > 1 and _tag(c) == part]
        if tagged:
            candidates = tagged
            continue
        owner = next((c for c in candidates if part in c.model_fields), candidates[0] if candidates else owner)
        keys.append(part)
        field = owner.model_fields.get(part)
        candidates = _sections(field.annotation) if field is not None else candidates
        if field is not None and not candidates:
            candidates = [owner]
    return owner, keys


def _tag(section: type[BaseModel]) -> object:
    fields = section.model_fields
    field = fields.get("name") or fields.get("type") or fields.get("method")
    return field.default if field is not None else None


def _sections(annotation: object) -> list[type[BaseModel]]:
    """All sections inside an annotation such as ``DataConfig | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [s for part in get_args(annotation) for s in _sections(part)]
    return []


def _within(owner: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """All sections that a key of a section may have as its value."""
    field = owner.model_fields.get(key)
    return [] if field is None else _sections(field.annotation)


def _listed(section: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in section.model_fields)
