"""The arguments that say where an experiment's trials run."""

import argparse
import os
from pathlib import Path

from common.errors import ConfigError
from common.system.command import add_tries, number
from deploy.experiment.places.local import LocalJobs
from deploy.experiment.places.place import Place
from deploy.experiment.places.ray_cluster import RayJobs
from deploy.experiment.places.slurm_cluster import SlurmJobs

LOCAL, RAY, SLURM = "local", "ray", "slurm"
_FILES = ".slurm"  # folder of submitit's files


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``choose`` reads, and ``--tries``."""
    parser.add_argument(
        "--on",
        choices=(LOCAL, RAY, SLURM),
        default=LOCAL,
        help="where cells run: on this machine, on a Ray cluster, or on Slurm (default: local)",
    )
    parser.add_argument(
        "--jobs",
        type=number(int, 1),
        metavar="N",
        help="most cells at a time (default: 1; with --on ray or slurm, what there is room for)",
    )
    parser.add_argument(
        "--cpus-per-trial",
        type=number(int, 1),
        metavar="N",
        help="CPUs and threads of a cell (default: 1; on this machine, its cores divided by --jobs)",
    )
    parser.add_argument(
        "--gpus-per-trial",
        type=number(float, 0),
        metavar="N",
        help="GPUs of a cell, with --on ray or slurm (default: 0); on Ray also a part of one, such as 0.5",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster, also ray://HOST:PORT or auto; without it, --on ray starts one on this machine",
    )
    parser.add_argument(
        "--slurm",
        action="append",
        type=_option,
        metavar="KEY=VALUE",
        help="an option of sbatch, such as partition=gpu or time=8:00:00; can be given several times",
    )
    add_tries(parser, 2, "times that a cell is started again when its process or machine dies")


def choose(options: argparse.Namespace, out: Path) -> Place:
    """The place that the arguments name; ``out`` is the experiment's folder.

    Raises:
        ConfigError: arguments do not fit together, or a package is not installed.
        LaunchError: the cluster is not there, or too small.
    """
    for name, owners in (("address", (RAY,)), ("slurm", (SLURM,)), ("gpus_per_trial", (RAY, SLURM))):
        if getattr(options, name) is not None and options.on not in owners:
            raise ConfigError(f"--{name.replace('_', '-')} needs --on {' or '.join(owners)}")
    given = [key for key, _ in options.slurm or ()]
    if twice := [key for key in given if given.count(key) > 1]:
        raise ConfigError(f"--slurm {twice[0]} is given {len(twice)} times; allowed: once")
    cpus, gpus = options.cpus_per_trial or 1, options.gpus_per_trial or 0.0
    if options.on == RAY:
        return RayJobs(options.address, options.jobs, cpus, gpus)
    if options.on == SLURM:
        return SlurmJobs(out / _FILES, options.jobs, cpus, gpus, dict(options.slurm or ()))
    jobs = options.jobs or 1
    return LocalJobs(jobs, options.cpus_per_trial or max(1, len(os.sched_getaffinity(0)) // jobs))


def _option(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    key = key.removeprefix("--")
    if not key or not value:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: KEY=VALUE, such as partition=gpu")
    return key, value
