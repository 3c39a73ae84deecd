"""How a site's link to its server is: told to the site's log when it changes, and kept in a file for its status.

The file is JSON: state ("waiting": no server yet; "refused": the server does not let this site in; "up"; "lost"),
reason (null when up), since (Unix time).
"""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from common.system.files import write_atomically

UP, WAITING, REFUSED, LOST = "up", "waiting", "refused", "lost"
log = logging.getLogger("link")


class LinkState:
    """The state of a link; thread-safe.

    Args:
        superlink: the server's address.
        file: where the state is kept; None: nowhere.
    """

    def __init__(self, superlink: str, file: Path | None = None) -> None:
        self._superlink, self._file, self._lock = superlink, file, threading.Lock()
        self._now: dict[str, Any] = {"state": None}
        self._joined = False

    def up(self) -> None:
        """Note that the server answers, and lets this site in."""
        if self._now["state"] != UP and self._become(UP, None):
            again, self._joined = self._joined, True
            log.info("connected to %s%s; waiting to be asked", self._superlink, " again" if again else "")

    def down(self, reason: str, *, refused: bool = False, patience: float | None = None) -> None:
        """Note why the server is not reached, or does not let this site in; it is tried again.

        Args:
            reason: for people.
            refused: whether the server answers, and does not let this site in.
            patience: seconds for which it is tried again; None: for ever.
        """
        if self._become(REFUSED if refused else LOST if self._joined else WAITING, reason):
            log.warning("%s; trying on%s", reason, "" if patience is None else f" for {patience:g} seconds")

    def _become(self, state: str, reason: str | None) -> bool:
        """Take a state; returns whether it is another one than before."""
        with self._lock:
            if state == self._now["state"]:
                return False
            self._now = {"state": state, "reason": reason, "since": time.time()}
            if self._file is not None:
                try:
                    write_atomically(self._file, json.dumps(self._now) + "\n", durable=False)
                except OSError as error:  # e.g. a full disk: the link works on
                    log.warning("%s cannot be written (%s)", self._file, error.strerror)
                    self._file = None
            return True
