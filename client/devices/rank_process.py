"""The program of a rank's process. Only ``client.devices.team`` starts it.

It imports FedSpan from where the process that started it has it, which may be an unpacked bundle.
"""

import json
import os
import sys


def main() -> None:
    """Read the search path and the settings from standard input, then serve."""
    handed = json.loads(sys.stdin.readline())
    sys.path[:] = handed.pop("path")
    from client.devices.rank import serve

    with os.fdopen(handed.pop("tell"), "w") as tell:
        serve(handed, tell)


if __name__ == "__main__":
    main()
