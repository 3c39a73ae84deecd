"""Read a YAML file into a typed section; every mistake in the file becomes one clear error."""

import difflib
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
        wrong = error.errors(include_url=False)
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
        allowed = (detail.get("ctx") or {}).get("expected_tags", "")
        by = (detail.get("ctx") or {}).get("discriminator", "'name'").strip("'")
        tag = (value.get(by) if isinstance(value, dict) else value) or "missing"
        near = difflib.get_close_matches(str(tag), [t.strip(" '") for t in allowed.split(",")], n=1)
        return f"`{key}.{by}` is {tag!r}; allowed: {allowed}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if kind == "value_error":
        return f"{'`' + key + '`: ' if key else ''}{detail['msg'].removeprefix('Value error, ')}"
    hint = ""
    if kind.startswith(("float_", "int_")) and isinstance(value, str):
        hint = " (YAML reads this as text; write 1.0e-2, not 1e-2, and use no quotes)"
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        hint = " (YAML reads yes, no, on, off, numbers and dates as no text; put it in quotes)"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"`{key}` is {value!r}: {message}{hint}"


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


def _listed(section: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in section.model_fields)
