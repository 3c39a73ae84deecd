"""``docs/reference.md``: every command and every key of the files, made from the parsers and the schemas."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy import cli

FILE = Path(__file__).parents[2] / "docs" / "reference.md"
_FILES = {"federation": "The federation file", "site": "The site file", "experiment": "The experiment file"}
_HEAD = """# Reference

Made by `fedspan schemas` from the code; a test holds it against the code.
"""


def reference(schemas: Mapping[Path, str]) -> str:
    """The text of the page, from the schemas by their paths."""
    parts = [
        _HEAD,
        "## Commands\n",
        "Exit codes: 0 well, 1 failed, 2 a file or an argument is wrong, 130 interrupted.\n",
    ]
    for group, verbs in cli.GROUPS.items():
        parts.append(f"### {group}\n")
        parts += [_command(verb, about) for verb, (_, about) in verbs.items()]
    for path, text in schemas.items():
        name = path.name.partition(".")[0]
        parts += [f"## {_FILES[name]}\n", *_sections(json.loads(text))]
    return "\n".join(parts).rstrip() + "\n"


def _command(verb: str, about: str) -> str:
    command = cli.load(verb)
    parser = cli.parser(verb, command)
    lines = [f"#### fedspan {verb}\n", f"{about[0].upper()}{about[1:]}.\n"]
    rows = [_argument(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if rows:
        lines += ["| argument | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, f"    {f'fedspan {verb} {command.example}'.strip()}\n"])


def _argument(action: argparse.Action) -> str:
    shown = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    value = " ".join(shown) if isinstance(shown, tuple) else str(shown)
    name = f"{action.option_strings[-1]} {value}".strip() if action.option_strings else value
    text = (action.help or "") % {**vars(action), "prog": "fedspan"}
    return f"| `{name}` | {_cell(text)} |"


def _sections(schema: dict[str, Any]) -> Iterator[str]:
    """A table of keys for the file itself, then one for every section of it."""
    definitions = schema["$defs"]
    yield _keys(schema, definitions)
    for name, section in definitions.items():
        if "properties" in section:
            about = _cell(section.get("description", ""))
            yield f"### {_title(name, section)}\n\n{about}\n\n{_keys(section, definitions)}"


def _title(name: str, section: dict[str, Any]) -> str:
    """How a file speaks of a section: by its kind where it has one, else by its class without Config."""
    for key in ("name", "method", "kind"):
        if "const" in section["properties"].get(key, {}):
            return f"`{key}: {section['properties'][key]['const']}`"
    return name.removesuffix("Config")


def _keys(section: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, value in section["properties"].items():
        default = "must be given" if key in required else f"`{json.dumps(value.get('default'))}`"
        takes = " or ".join(dict.fromkeys(_takes(value, definitions)))
        rows.append(f"| `{key}` | {takes} | {default} | {_cell(value.get('description', ''))} |")
    return "\n".join(rows) + "\n"


def _takes(value: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Which values a key takes, in words."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        section = definitions[name]
        yield _title(name, section) if "properties" in section else " or ".join(_takes(section, definitions))
    elif options := value.get("anyOf") or value.get("oneOf"):
        for option in options:
            yield from _takes(option, definitions)
    elif "enum" in value:
        yield from (f"`{json.dumps(word).strip(chr(34))}`" for word in value["enum"])
    elif "const" in value:
        yield f"`{value['const']}`"
    elif value.get("type") == "array":
        yield f"a list of {' or '.join(dict.fromkeys(_takes(value.get('items', {}), definitions)))}"
    else:
        yield _limits(value)


def _limits(value: dict[str, Any]) -> str:
    words = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    kind = words.get(str(value.get("type")), {"null": "null", "object": "a mapping"}.get(str(value.get("type")), "any"))
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    return " ".join([kind, *(f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
