"""An experiment whose first trial interrupts it, as Ctrl-C does, when it has written the checkpoint of round 2.

``python -m tests.deploy.experiment.interrupted``; the arguments are those of ``fedspan``.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from deploy.cli import main
from server.loop import rounds
from server.loop.checkpoint import Checkpoint, save


def save_and_interrupt(run_dir: Path, checkpoint: Checkpoint, keep: int) -> None:
    save(run_dir, checkpoint, keep)
    experiment = multiprocessing.parent_process()
    if checkpoint.round == 2 and experiment is not None and experiment.pid is not None:
        os.kill(experiment.pid, signal.SIGINT)
        signal.pause()  # until the experiment ends this process


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    sys.exit(main())
if __name__ == "__mp_main__":  # this module in the process of a trial
    rounds.save = save_and_interrupt
