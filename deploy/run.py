"""``fedspan run FEDERATION.yaml``: run a federation, all of its sites on this machine (``deploy.local``)."""

import argparse

from common.system.command import Command, start_log
from server.operate.serve import add_run_options


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from deploy import local
    from server.operate.supervise import make_folder, run_until_done

    start_log("supervisor")
    plan = local.make_plan(options.federation, options.runs, options.name, resume=options.resume)
    make_folder(plan.run_dir)
    return run_until_done(plan.run_dir, options, lambda: local.run(plan, Console(), options.tries))


RUN = Command(
    add_run_options,
    _run,
    example="deploy/demo/federation.yaml --name demo",
    then="fedspan report demo",
    notes="The federation file names the site files under `local.sites`. Ctrl-C ends all processes of the run.",
)
