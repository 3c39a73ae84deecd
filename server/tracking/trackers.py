"""All trackers of a run: which there are, that they are installed, and what each record gives them."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig, settings_for_sites
from common.errors import ConfigError
from server.tracking.mlflow import MLflow
from server.tracking.sink import InBackground, Tracked
from server.tracking.tensorboard import TensorBoard
from server.tracking.wandb import Wandb

_SECTIONS = ("train", "evaluate", "seconds", "bytes", "diagnostics")  # with numbers, in a record
_PATIENCE = 10.0  # seconds to wait for all trackers when the run ends


class Trackers:
    """The trackers of a run.

    Args:
        folder: the run's folder, which has the run's name.
        federation: the federation file.
        run_id: the run's id, see ``Tracked``.
        failed: called once with a sentence for each tracker that fails; the run goes on without it.
    """

    def __init__(self, folder: Path, federation: FederationConfig, run_id: str, failed: Callable[[str], None]) -> None:
        self._board, self._failed = TensorBoard(folder / "tensorboard"), failed
        self._remote: dict[str, InBackground] = {}
        tracking = federation.tracking
        if tracking is None:
            return
        check_trackers(federation)
        settings = flat(json.loads(settings_for_sites(federation)))
        run = Tracked(folder.name, run_id, folder, federation.name, settings)
        if (mlflow := tracking.mlflow) is not None:
            self._remote["MLflow"] = InBackground(lambda: MLflow(mlflow, run))
        if (wandb := tracking.wandb) is not None:
            self._remote["W&B"] = InBackground(lambda: Wandb(wandb, run))

    def log(self, record: Mapping[str, Any]) -> None:
        """Give the finite numbers of a record of metrics.jsonl to all trackers."""
        numbers = {
            f"{section}/{key}/{record['client']}": float(value)
            for section in _SECTIONS
            for key, value in record.get(section, {}).items()
            if value is not None and math.isfinite(value)
        }
        if not numbers:
            return
        self._board.log(numbers, record["round"])
        for sink in self._remote.values():
            sink.log(numbers, record["round"])
        self._drop_failed()

    def end(self, status: str) -> None:
        """Flush and close all; those that need more than ten seconds are given up."""
        self._board.end(status)
        for sink in self._remote.values():
            sink.ask_to_end(status)
        self._drop_failed(until=time.monotonic() + _PATIENCE)
        self._remote.clear()

    def _drop_failed(self, until: float | None = None) -> None:
        for name, sink in list(self._remote.items()):
            if (reason := sink.failure(until)) is not None:
                del self._remote[name]
                self._failed(f"{name} gets no more numbers: {reason}")


def check_trackers(federation: FederationConfig, *, environment: bool = True) -> None:
    """Raise a ConfigError when the federation file wants a tracker that this machine cannot feed.

    Args:
        federation: the federation file.
        environment: look at this process's environment, too, because the server's will be the same.
    """
    tracking = federation.tracking
    wanted = tracking.model_dump(exclude_none=True) if tracking is not None else {}
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`tracking.{name}` needs a package that is not installed; run: pip install 'fedspan[{name}]'"
            )
    if "uri" not in wanted.get("mlflow", {"uri": ""}) and environment and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("missing key `tracking.mlflow.uri`; or set MLFLOW_TRACKING_URI in the server's environment")


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
