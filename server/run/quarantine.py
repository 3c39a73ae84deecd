"""Sites whose updates were refused too often in a row: left out until ``fedspan readmit``."""

from pathlib import Path

FOLDER = "readmit"  # in a run's folder: a file for every site that an operator has readmitted


class Quarantine:
    """Counts refusals in a row.

    Args:
        run_dir: the run's folder, where an operator's word arrives.
        limit: so many in a row leave a site out.

    Attributes:
        counts: refusals in a row by site; a site without any is not in it.
    """

    def __init__(self, run_dir: Path, limit: int) -> None:
        self.counts: dict[str, int] = {}
        self._folder, self._run_dir, self._limit = run_dir / FOLDER, run_dir, limit

    def note(self, site: str, *, refused: bool) -> None:
        """An update of ``site`` was refused, or admitted."""
        if refused:
            self.counts[site] = self.counts.get(site, 0) + 1
        else:
            self.counts.pop(site, None)

    def excluded(self) -> dict[str, str]:
        """Sites that are left out, with the reason and what can be done."""
        return {
            site: f"{site}: left out after {count} refused updates in a row; to readmit it: "
            f"fedspan readmit {self._run_dir.name} {site} --runs {self._run_dir.parent}"
            for site, count in self.counts.items()
            if count >= self._limit
        }

    def readmitted(self) -> list[str]:
        """Sites that an operator has readmitted since the last call."""
        asked = sorted(file.name for file in self._folder.glob("*"))
        for site in asked:
            (self._folder / site).unlink(missing_ok=True)
        back = [site for site in asked if site in self.excluded()]
        for site in back:
            del self.counts[site]
        return back
