"""Reads what runs in a container out of Dockerfiles, the compose file and the Kubernetes manifests."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from client.connect import join
from deploy import health
from server.operate import supervise

ROOT = Path(__file__).parents[2]
PARSERS = {
    "client.connect.join": join._parser,
    "server.operate.supervise": supervise._parser,
    "deploy.health": health._parser,
}


def read(file: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file."""
    return list(yaml.safe_load_all(file.read_text()))


def understood(command: list[str]) -> argparse.Namespace:
    """A container's command as the program itself reads it; fails as the program would."""
    module, *arguments = command
    return PARSERS[module]().parse_args(arguments)


def paths(command: list[str]) -> list[str]:
    """Absolute paths that a command names."""
    return [found for part in command for found in re.findall(r"(?:^|=)(/[^=]*)$", part)]


def within(path: str, folders: list[str]) -> bool:
    """Whether a path lies in one of the folders, or is one of them."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
