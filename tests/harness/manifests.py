"""Reads what runs in a container out of Dockerfiles, the compose file and the Kubernetes manifests."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from deploy import cli

ROOT = Path(__file__).parents[2]


def read(file: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file."""
    return list(yaml.safe_load_all(file.read_text()))


def understood(command: list[str]) -> argparse.Namespace:
    """A container's command as the program itself reads it; fails as the program would."""
    verb = next(verb for verb in cli.VERBS if command[: len(verb.split())] == verb.split())
    return cli.parser(verb, cli.load(verb)).read(command[len(verb.split()) :])


def paths(command: list[str]) -> list[str]:
    """Absolute paths that a command names."""
    return [found for part in command for found in re.findall(r"(?:^|=)(/[^=]*)$", part)]


def within(path: str, folders: list[str]) -> bool:
    """Whether a path lies in one of the folders, or is one of them."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
