"""One cell of an experiment: a whole federation in a process of its own.

That process is forked from one that has imported everything, so a cell costs no import, gives all of its memory back at
its end, and can be killed without harm.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from common.config import FederationConfig
from common.errors import FedSpanError, LaunchError
from common.processes import die_with_parent
from common.yaml_file import load
from server.run_folder import changes, write_atomically

SUMMARY = "experiment.json"  # of the whole experiment, in its folder
FACTS = "cell.json"
LOG = "log"
_FEDERATION = "federation.yaml"
#: What every cell needs, imported before it is forked; by name, because the server's code imports no client's.
_PRELOAD = ["torch.utils.tensorboard", "transformers.models.auto", "peft", "evaluate", "rouge_score.rouge_scorer"]
_PRELOAD += [
    "server.app",
    "server.inprocess",
    "server.evaluation",
    "server.rounds",
    "strategies.named",
    "client.session",
]


def outcome(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says of a cell; empty when it did not begin."""
    file = folder / "run.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def refuse_changed(folder: Path, federation: FederationConfig) -> None:
    """Raise a LaunchError when the folder's cell was begun under another federation file."""
    file = folder / _FEDERATION
    if not file.exists():
        return
    how = changes(yaml.safe_load(file.read_text(encoding="utf-8")), federation.model_dump(mode="json"))
    if how:
        raise LaunchError(f"{folder}: the experiment has changed since this cell began: {how}; choose another --out")


def start(folder: Path, federation: FederationConfig, facts: Mapping[str, Any], threads: int) -> BaseProcess:
    """Start a cell; one that was killed goes on after its last round, unless a site has lost what it kept for itself.

    Args:
        folder: of the cell, not that of a finished one.
        federation: its federation file, with absolute paths.
        facts: which cell it is.
        threads: that PyTorch may use.
    """
    from server.app import lost_with_the_run

    resume = outcome(folder).get("status") == "running" and lost_with_the_run(federation) is None
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / FACTS, json.dumps(facts, indent=2) + "\n")
        write_atomically(folder / _FEDERATION, yaml.safe_dump(federation.model_dump(mode="json"), sort_keys=False))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_run, args=(folder, resume, threads), daemon=True)
    process.start()
    return process


def _run(folder: Path, resume: bool, threads: int) -> None:
    """The process of a cell."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the experiment, which ends its cells
    with (folder / LOG).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    import torch

    from server.app import federate
    from server.checkpoint import FOLDER as CHECKPOINTS
    from server.inprocess import InProcessGrid

    torch.set_num_threads(threads)
    source = folder / _FEDERATION
    local = load(source, FederationConfig).local
    assert local is not None  # noqa: S101 - the plan wrote it
    try:
        with InProcessGrid([Path(site) for site in local.sites]) as grid:
            federate(grid, source, folder, resume=resume, flower_run=None, keep_model=False)
    except FedSpanError as error:
        sys.exit(str(error))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
