"""Puts pyproject.toml and LICENSE into the wheel, because the app bundle holds them; pyproject.toml cannot say so."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithApp(build_py):
    """Copies both to where ``server.superlink.bundle`` looks for them in an installation."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:  # a checkout has them at its root
            folder = Path(self.build_lib, "server", "superlink", "app")
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("pyproject.toml", "LICENSE"):
                shutil.copy(name, folder)


setup(cmdclass={"build_py": BuildWithApp})
