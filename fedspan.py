"""The command ``fedspan``. It makes sure that FedSpan's packages are its own, then ``deploy.cli`` does the rest.

They are top-level packages, because Flower unpacks the bundle of an app on sys.path; and `common`, `server` or
`client` are names that others take, too. Nothing but the standard library is imported before that is looked into.
"""

import importlib.util
import sys
from pathlib import Path

ROOMS = ("client", "common", "deploy", "server", "strategies")
HOME = Path(__file__).resolve().parent


def hidden() -> str | None:
    """Say which other package hides one of FedSpan's, in one clause; None: all are FedSpan's own."""
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        ours = HOME / room
        if spec is not None and ours.is_dir() and str(ours) not in map(_real, spec.submodule_search_locations or []):
            return f"{spec.origin or room} is imported as `{room}` in place of FedSpan's {ours}"
        if ours.is_dir() and not (ours / "__init__.py").exists():
            return f"{ours} has no __init__.py: another package of that name was installed over FedSpan's, or removed"
    return None


def main() -> int:
    """Command line; returns the exit code."""
    reason = hidden()
    if reason is not None:
        print(  # noqa: T201
            f"error: {reason}; give FedSpan an environment of its own, and take the other one off PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    from deploy.cli import main as command

    return command()


def _real(folder: str) -> str:
    return str(Path(folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
