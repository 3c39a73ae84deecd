"""Flower's programs, and the environment in which they and all that they start run."""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def program(name: str) -> str:
    """A console script of the environment that this process runs in."""
    return str(Path(sysconfig.get_path("scripts")) / name)


LOOPBACK = ("localhost", "127.0.0.0/8", "127.0.0.1", "::1")  # gRPC takes subnets, httpx names of hosts


def direct(env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that keep proxies away from addresses of this machine, in every spelling in use."""
    told = env.get("no_proxy", env.get("NO_PROXY", ""))
    entries = [entry for entry in told.replace(" ", "").split(",") if entry and entry not in LOOPBACK]
    around = ",".join([*entries, *LOOPBACK])
    return {**env, "no_proxy": around, "NO_PROXY": around}


def environment(home: Path, *, hub: bool, **defaults: str) -> dict[str, str]:
    """Environment of Flower's processes: its files in ``home``, no telemetry, no look for updates, no proxy at home.

    Args:
        home: Flower's folder.
        hub: whether a model may be fetched from Hugging Face's hub.
        defaults: further variables, where this process's own environment does not set them.
    """
    fixed = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    if not hub:
        fixed["HF_HUB_OFFLINE"] = "1"
    scripts = sysconfig.get_path("scripts")  # where Flower's programs find each other
    fixed["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {"TOKENIZERS_PARALLELISM": "false", **defaults, **direct(os.environ), **fixed}
