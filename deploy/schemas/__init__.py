"""JSON schemas of the federation, site and experiment files, for editors and for checks outside Python.

``fedspan schemas`` writes them from the code, and ``docs/what-leaves.md`` and ``docs/reference.md`` beside them. YAML
editors find them through the first line of a file: ``# yaml-language-server: $schema=<path of the schema>``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig
from common.config.section import Section
from common.config.site import SiteConfig
from common.system.command import Command
from deploy.experiment.config import ExperimentConfig

FOLDER = Path(__file__).parent
_SECTIONS: dict[str, type[Section]] = {
    "federation": FederationConfig,
    "site": SiteConfig,
    "experiment": ExperimentConfig,
}


def schemas() -> dict[Path, str]:
    """The text of every schema file by its path."""
    return {FOLDER / f"{name}.schema.json": _text(section) for name, section in _SECTIONS.items()}


def _text(section: type[Section]) -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **section.model_json_schema()}
    for key, value in schema["properties"].items():
        if "discriminator" in value:
            schema["properties"][key] = _one_word_or_mapping(value, schema["$defs"])
        for option in value.get("anyOf", []):
            if "discriminator" in option:  # beside null, for which `none` is another word
                choices = _one_word_or_mapping(option, schema["$defs"])["anyOf"]
                schema["properties"][key] = {**value, "anyOf": [*choices, {"enum": ["none", None]}]}
    return json.dumps(schema, indent=2) + "\n"


def _one_word_or_mapping(union: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of a section such as ``strategy``: a mapping that names its kind, or the name alone if that is enough."""
    tag, kinds = union["discriminator"]["propertyName"], union["discriminator"]["mapping"]
    words = []
    for word, reference in kinds.items():
        definition = definitions[reference.rpartition("/")[2]]
        if not definition.get("required"):
            words.append(word)
        definition["required"] = [tag, *definition.get("required", [])]
    kept = {name: value for name, value in union.items() if name not in ("discriminator", "oneOf")}
    return {**kept, "anyOf": [{"type": "string", "enum": words}, {"oneOf": union["oneOf"]}]}


def written() -> dict[Path, str]:
    """The text of every file that is made from the code, by its path."""
    from deploy.schemas import reference  # which asks every command for its options
    from deploy.schemas.what_leaves import what_leaves  # which needs Flower

    found = schemas()
    pages = {reference.FILE: reference.reference(found), reference.FILE.with_name("what-leaves.md"): what_leaves()}
    return found | pages


def _write(options: argparse.Namespace) -> None:
    for path, text in written().items():
        if path.parent.is_dir():  # an installation has no docs
            path.write_text(text, encoding="utf-8")
            print(path)  # noqa: T201


SCHEMAS = Command(
    lambda parser: None,
    _write,
    example="",
    then="# yaml-language-server: $schema=FILE, as the first line of a federation, site or experiment file",
)
