"""Sites whose updates were refused too often in a row: left out until an operator readmits them.

python -m server.run.quarantine RUN_DIR SITE
"""

import argparse
import sys
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.config.federation import Name

_FOLDER = "readmit"


class Refusals:
    """Counts refusals in a row.

    Args:
        run_dir: the run's folder, where an operator's word arrives.
        limit: so many in a row leave a site out.

    Attributes:
        counts: refusals in a row by site; a site without any is not in it.
    """

    def __init__(self, run_dir: Path, limit: int) -> None:
        self.counts: dict[str, int] = {}
        self._folder, self._run_dir, self._limit = run_dir / _FOLDER, run_dir, limit

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
            f"python -m server.run.quarantine {self._run_dir} {site}"
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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.run.quarantine", description="Readmit a site to a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("site", metavar="SITE")
    options = parser.parse_args(arguments)
    try:
        site = TypeAdapter(Name).validate_python(options.site)
        if not (options.run_dir / "run.json").is_file():
            raise OSError(f"{options.run_dir} holds no run")
        (options.run_dir / _FOLDER).mkdir(exist_ok=True)
        (options.run_dir / _FOLDER / site).touch()
    except ValidationError:
        print(f"error: {options.site!r} is no name of a site", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{site} takes part again from the next round on, if it was left out")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
