"""A place where trials run, and how a trial ends there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.config.federation import FederationConfig

ENDED = (0, 1)  # exit codes of a trial that has told its outcome itself; with any other one its process died
UNSEEN = 75  # exit code: the machine does not see the experiment's files


@dataclass(frozen=True)
class Trial:
    """A cell that is ready to be run; see ``deploy.experiment.trial.prepare``.

    Attributes:
        folder: its run folder.
        attempt: the mark of this attempt in the folder: an earlier one that starts late ends at once.
        resume: whether it goes on after its last round.
        federation: its federation file, with absolute paths.
    """

    folder: Path
    attempt: str
    resume: bool
    federation: FederationConfig


@dataclass(frozen=True)
class End:
    """How the process of a trial ended.

    Attributes:
        code: its exit code, negative for a signal; None: the machine or the cluster lost it.
        said: the cluster's or the machine's word on it.
        seconds: time at work; None: not known.
    """

    code: int | None
    said: str = ""
    seconds: float | None = None

    @property
    def died(self) -> bool:
        """Whether the trial ended without an outcome of its own, so that another try may go better."""
        return self.code not in ENDED


class Place(Protocol):
    """Runs trials. Leaving it, in whatever way, ends all trials that are at work.

    Attributes:
        slots: number of trials that are handed over at a time.
    """

    slots: int

    def check(self, federation: FederationConfig, summary: Path) -> None:
        """Check, as far as the place can tell before a trial, that its machines see the experiment's files.

        Args:
            federation: a cell's federation file, with absolute paths.
            summary: a file that the experiment has just written into its folder.

        Raises:
            LaunchError: one does not; names the machine and the path.
        """

    def start(self, trial: Trial) -> None:
        """Hand over a trial.

        Raises:
            LaunchError: the place does not take it.
        """

    def ended(self, patience: float) -> Iterator[tuple[Trial, End]]:
        """The trials that have ended; waits until there is one, at most so many seconds.

        Raises:
            LaunchError: the place can run no trial any more.
        """

    def stop(self) -> None:
        """End all trials, and wait until their processes are gone."""

    def close(self) -> None:
        """Stop, and leave the cluster."""
