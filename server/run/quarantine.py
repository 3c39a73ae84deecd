"""Quarantine: sites that sent no usable update too often in a row are left out until ``fedspan readmit``."""

from pathlib import Path

FOLDER = "readmit"  # folder in the run's folder with one file for every site that the operator has readmitted


class Quarantine:
    """Counts each site's rejected updates, and errors in their place, in a row.

    Args:
        run_dir: the run's folder, where ``fedspan readmit`` writes.
        limit: number of rejections in a row after which a site is left out.

    Attributes:
        counts: rejections in a row by site; sites without any are not listed.
    """

    def __init__(self, run_dir: Path, limit: int) -> None:
        self.counts: dict[str, int] = {}
        self._folder, self._run_dir, self._limit = run_dir / FOLDER, run_dir, limit

    def note(self, site: str, *, refused: bool) -> None:
        """Note that an update of ``site`` was rejected, or replaced by an error; or that it was admitted."""
        if refused:
            self.counts[site] = self.counts.get(site, 0) + 1
        else:
            self.counts.pop(site, None)

    def excluded(self) -> dict[str, str]:
        """Sites in quarantine, with the reason and the command that readmits them."""
        return {
            site: f"{site}: left out after {count} refused updates or errors in a row; to readmit it: "
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
