"""Weights & Biases: a run with the federation's settings; offline into the run's folder, for `wandb sync`."""

import os
from collections.abc import Mapping

from common.config.tracking import WandbConfig
from server.tracking.sink import Tracked

_ROUND = "round"
#: Nothing is sent but the numbers and settings: no reports of errors, output, code, packages or machine.
_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_save_requirements": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "silent": True,
    "host": "fedspan",  # else the machine's and the account's
    "username": "fedspan",
    "program": "fedspan",
    "login_timeout": 5.0,  # seconds, as the next two; the end of the process waits for them
    "init_timeout": 20.0,
    "finish_timeout": 5.0,
    "finish_timeout_raises": True,
}


class Wandb:
    """See ``Sink``.

    Args:
        config: the section ``tracking.wandb``.
        run: the run.
    """

    def __init__(self, config: WandbConfig, run: Tracked) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=config.project or run.federation,
            name=run.name,
            id=run.id,
            resume="allow",
            mode=config.mode,
            dir=str(run.folder),
            config=dict(run.settings),
            # A run is stopped by `fedspan stop`; by default, W&B's page would interrupt the server.
            settings=wandb.Settings(**_SETTINGS, stop_fn=lambda: None),
        )
        self._run.define_metric(_ROUND)
        self._run.define_metric("*", step_metric=_ROUND)  # W&B's own step never goes back, a resumed run may

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See ``Sink``."""
        self._run.log({**numbers, _ROUND: step})

    def end(self, status: str) -> None:
        """See ``Sink``."""
        self._run.finish(exit_code=0 if status == "completed" else 1)
