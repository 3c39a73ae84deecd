"""Checks of the site's machine: device and precision, memory, disk."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import torch

from client.preflight import memory
from client.preflight.context import CheckContext
from client.preflight.finding import Finding
from client.privacy.guard import ledger_of
from client.site_model import places_of
from client.training.settings import describe, pick_autocast, pick_devices
from client.training.split import Places, free_bytes
from common.text import size

_SPARE = 2_000_000_000  # bytes that should be free wherever the site writes
_LEAST = 200_000_000
_Bytes = dict[torch.device | None, int]  # by device; None: all devices alike, or the host


def device(subject: CheckContext) -> Finding:
    """Device and precision as the site file asks for them."""
    asked = subject.site.device
    rows_per_step = None if subject.federation is None else subject.federation.training.rows_per_step
    devices = pick_devices(subject.site, rows_per_step)
    picked = devices[0]
    autocast = pick_autocast(subject.site.precision, picked)
    arithmetic = "the weights' own arithmetic" if autocast is None else str(autocast).removeprefix("torch.")
    if picked.type == "cuda":
        named = describe(devices, split=subject.site.split)
        return Finding("ok", f"{named} ({', '.join(map(str, devices))}), {arithmetic}")
    found = f"{describe(devices)}, {os.cpu_count()} cores, {arithmetic}"
    if asked == "auto":
        mend = "write `device: cpu` if that is meant; else check the driver, and that the container is given its GPU"
        return Finding("warning", f"{found}; this machine has no CUDA device", mend)
    return Finding("ok", found)


def training_memory(subject: CheckContext) -> Finding:
    """Peak memory of training against the free memory; and the number of rows per forward pass that would fit."""
    settings, site = subject.settings, subject.site
    devices = pick_devices(site, settings.training.rows_per_step)
    where: Places = {}
    if site.split and len(devices) > 1:
        where = places_of(subject.tuned, settings, devices, free_bytes(devices))
    picked, count = devices[0], 1 if where else len(devices)
    autocast = pick_autocast(site.precision, picked)
    asked = min(settings.training.batch_size, site.max_batch_size or settings.training.batch_size)
    asked = min(asked, math.ceil(settings.training.rows_per_step / count))  # a device's part of a step

    @cache
    def peaks(rows: int) -> dict[torch.device | None, memory.Peak]:
        return memory.estimates(subject.tuned, settings, subject.largest(rows), subject.steps, autocast, where)

    weights = sum(peak.weights for peak in peaks(asked).values())
    written = memory.whole_bytes(subject.tuned, settings.strategy) if site.keep is not None else 0
    loaded = 0 if picked.type == "cpu" else max(weights, written)
    on_host = memory.host_bytes(subject.tuned, settings.strategy, subject.tokens, loaded, count)
    free_host = _free_host()
    free: _Bytes
    if picked.type == "cpu":
        free, besides, owner = {None: free_host}, on_host, "the host"
    elif on_host > free_host:
        mend = "free memory on the host, or give the container more"
        return Finding("FAIL", f"the host needs about {size(on_host)}, {size(free_host)} are free", mend)
    else:
        each: _Bytes = dict(zip([*devices], free_bytes(devices), strict=True))
        owner = str(min(devices, key=lambda device: each[device]))
        free, besides = each if where else {None: min(each.values())}, 0
    together = count if picked.type == "cpu" else 1  # devices that share this memory
    least = weights + written if picked.type == "cpu" else 0
    need = {device: max(together * peak.total, least) + besides for device, peak in peaks(asked).items()}
    tight = min(need, key=lambda device: free[device] - need[device])
    found = " and ".join(size(most) + (f" on {device}" if where else "") for device, most in need.items())
    found = f"about {found} at the peak, {subject.largest(asked)} in a forward pass"
    found += f"; {size(free[tight])} of {tight or owner}'s memory are free"
    if need[tight] <= free[tight]:
        return Finding("ok", found)
    fit = _fitting(asked, {device: (free[device] - besides) // together for device in need}, peaks)
    if fit == 0:
        mend = "not even one row fits: free memory, take a larger device or several (`split`), or ask for a lower "
        return Finding("FAIL", found, f"{mend}`training.max_length` or `training.gradient_checkpointing: true`")
    # On CUDA the trainer halves its batch by itself; on a CPU the kernel kills the process.
    return Finding("warning" if picked.type == "cuda" else "FAIL", found, f"write `max_batch_size: {fit}`")


def _fitting(asked: int, room: _Bytes, peaks: Callable[[int], dict[torch.device | None, memory.Peak]]) -> int:
    """Most rows per forward pass, below ``asked``, whose peaks fit; a pass's memory is linear in its rows."""

    def fits(rows: int) -> bool:
        return all(peak.total <= room[device] for device, peak in peaks(rows).items())

    if asked == 1 or not fits(1):
        return int(fits(1))
    two, fit = peaks(2), asked - 1
    for device, one in peaks(1).items():
        fit = min(fit, 1 + (room[device] - one.total) // max(two[device].passes - one.passes, 1))
    while fit > 1 and not fits(fit):
        fit -= 1
    return fit


def _free_host() -> int:
    """Bytes that a process may take on this machine, or in this container; this process's own bytes count as free."""
    mine = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(
                free, int(limit) - int(used) + int(stat["inactive_file"])
            )  # the page cache of files, which the kernel drops when memory is needed
    except OSError:  # no container, or an old kind
        pass
    return free + mine


def disk(subject: CheckContext) -> Finding:
    """Free disk space where the site writes."""
    beside = subject.site_file.parent / f".{subject.site.name}"  # where `fedspan site join` puts it
    places = {
        "Flower's folder": Path(os.environ.get("FLWR_HOME", beside)).expanduser(),
        "temporary files": Path(tempfile.gettempdir()),
        "ledger": ledger_of(subject.site, subject.site_file),
    }
    told, scarce = [], False
    for what, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())  # the ledger may exist
        try:
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as error:
            return Finding("FAIL", f"{what}: {there} cannot be written ({error.strerror})", f"mend that, or {_ELSE}")
        told.append(f"{what} {place}: {size(free)} free")
        if free < _LEAST:
            return Finding("FAIL", told[-1], f"free at least {size(_SPARE)}, or {_ELSE}")
        scarce = scarce or free < _SPARE
    mend = f"free at least {size(_SPARE)}, or {_ELSE}" if scarce else ""
    return Finding("warning" if scarce else "ok", "; ".join(told), mend)


_ELSE = "name another folder with FLWR_HOME (Flower's), TMPDIR (temporary files) or `ledger` in the site file"
