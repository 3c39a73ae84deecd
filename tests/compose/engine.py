"""A Docker engine, and one project of docker-compose.yml on it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(command: Sequence[str], env: Mapping[str, str], timeout: float, *, check: bool = True) -> str:
    """What a command says on both channels; fails with that when the command fails."""
    done = subprocess.run(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout.strip()


class Engine:
    """Docker, and a compose project of a name of its own.

    Args:
        project: its name.
        user: user and group, by number, that everything runs as.
        runs: where results go.
        deadline: seconds that any one thing may take.
    """

    def __init__(self, project: str, user: str, runs: Path, deadline: float) -> None:
        self.project, self.user, self.deadline = project, user, deadline
        self._env = {**os.environ, "FEDSPAN_USER": user, "FEDSPAN_RUNS": str(runs), "COMPOSE_PROJECT_NAME": project}
        plugin = subprocess.run(["docker", "compose", "version"], env=self._env, capture_output=True)
        self._compose = ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]

    def docker(self, *arguments: str, check: bool = True, timeout: float | None = None) -> str:
        """Docker's command line."""
        return run(["docker", *arguments], self._env, timeout or self.deadline, check=check)

    def compose(self, *arguments: str) -> str:
        """Compose's command line, whichever of the two is there."""
        return run([*self._compose, *arguments], self._env, self.deadline)

    def container(self, service: str) -> str:
        """Id of a service's container."""
        found = self.docker(
            "ps", "-aq", "--no-trunc", *self.mine(), "-f", f"label=com.docker.compose.service={service}"
        )
        (container,) = found.split()
        return container

    def mine(self) -> list[str]:
        """The filter for what belongs to this project."""
        return ["-f", f"label=com.docker.compose.project={self.project}"]

    def inspect(self, container: str) -> dict[str, Any]:
        """All that Docker knows of a container."""
        return dict(json.loads(self.docker("inspect", container))[0])

    def start(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """Start a container on the federation's network, confined as the others; its id."""
        confined = ["--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp", "--tmpfs", "/var/lib/fedspan"]  # noqa: S108
        network = ["--network", f"{self.project}_federation", "--user", self.user]
        return self.docker("run", "-d", *confined, *network, *options, image, *command).splitlines()[-1]

    def python(self, container: str, code: str, *, check: bool = True) -> str:
        """What a piece of Python says inside a container."""
        return self.docker("exec", container, "python", "-c", code, check=check)

    def wait(self, what: str, found: Callable[[], bool], logs: str) -> None:
        """Wait until something is so; else fail with a container's logs."""
        deadline = time.monotonic() + self.deadline
        while not found():
            assert time.monotonic() < deadline, f"not within {self.deadline:g} s: {what}\n{self.docker('logs', logs)}"
            time.sleep(0.5)
