"""``fedspan VERB ...`` in this process."""

import contextlib
import io

from deploy.cli import main


def fedspan(*arguments: object) -> tuple[int, str]:
    """Exit code, and all that is printed, with spaces for line ends."""
    with io.StringIO() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(argument) for argument in arguments])
        return code, " ".join(out.getvalue().split())
