"""``flower-supernode`` that asks its SuperLink for messages as often as it is told.

    python -m client.supernode --poll 0.5 [options of flower-supernode]

Flower 1.39 waits three seconds between two questions, which on a near link is most of a short round. Nothing else is
different. Like ``client.worker`` this file imports nothing of FedSpan.
"""

import argparse
import sys
import time

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode


class _Clock:
    """The time module as that one file of Flower's sees it."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the longest pause."""
        time.sleep(min(seconds, self._longest))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m client.supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--poll", type=float, default=3.0)
    options, rest = parser.parse_known_args()
    if not 0.05 <= options.poll <= 60.0:
        parser.error(f"--poll is {options.poll:g}; allowed: 0.05 to 60 seconds")
    start_client_internal.time = _Clock(options.poll)  # type: ignore[attr-defined, assignment]
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()


if __name__ == "__main__":
    main()
