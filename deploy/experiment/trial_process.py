# ruff: noqa: F401 - what is only imported is for the trials
"""The work of a trial's process. A fork server imports this file, and with it all that a trial needs, once for all."""

import shutil
import sys
from pathlib import Path

import evaluate
import peft
import rouge_score.rouge_scorer
import torch
import torch.utils.tensorboard
import transformers.models.auto

import client.session
import server.loop.rounds
import server.loop.server_model
import strategies.flower.named
from common.errors import FedSpanError
from deploy.experiment.simulate import simulate
from server.run.folder import CHECKPOINTS


def run(source: Path, folder: Path, ledgers: Path, threads: int, *, resume: bool) -> None:
    """Run a federation whose sites are in this process; ends the process when it fails.

    Args:
        source: the federation file.
        folder: the run's folder.
        ledgers: folder for ledgers of this run alone: in the sites' own, every trial would count against their limits.
        threads: number of threads that PyTorch may use.
        resume: resume the run in ``folder``.
    """
    ledgers.mkdir(exist_ok=True)
    try:
        simulate(source, folder, threads, ledgers=ledgers, resume=resume, keep_model=False)
    except FedSpanError as error:
        sys.exit(str(error))
    finally:  # only a trial that ended needs no checkpoint and ledgers; a killed one never gets here and is resumed
        for only_to_go_on in (folder / CHECKPOINTS, ledgers):
            shutil.rmtree(only_to_go_on, ignore_errors=True)
