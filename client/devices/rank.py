"""A rank other than 0: loads the model on its device, and takes part in the rounds that rank 0 announces.

Reports to rank 0, a line of JSON each: ``ready`` with the number of training rows, ``done`` after a round, ``error``
with ``text`` before it ends. It ends when its standard input does, so it never outlives rank 0's process.
"""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import torch

from client.devices.part import Part
from client.site_model import SiteModel
from client.training.between_rounds import restore
from client.training.ranks import Connected
from client.update import Work
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.rows import split_held_out
from common.data.tasks import make_task
from common.errors import FedSpanError, kind_of, place_of
from common.protocol.tensors import Tensors
from common.system import logs

log = logging.getLogger(__name__)


def serve(handed: dict[str, Any], tell: IO[str]) -> None:
    """Work until standard input is closed, or an error ends the round.

    Args:
        handed: settings from ``client.devices.team``.
        tell: pipe for the reports.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; rank 0 ends this one
    logs.configure("site", f"rank {handed['rank']}")
    if handed["aside"]:
        logs.set_aside(Path("/dev/fd/1"))
    commands: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    try:
        _work(handed, commands, tell)
    except Exception as error:
        known = isinstance(error, FedSpanError)
        log.error("rank %d ends: %s", handed["rank"], error if known else place_of(error), exc_info=error)
        _tell(tell, error=kind_of(error), text=str(error) if known else place_of(error))
        raise SystemExit(1) from None


def _listen(commands: "SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)  # rank 0 has stopped or died: nothing that goes on here is of use


def _work(handed: dict[str, Any], commands: "SimpleQueue[dict[str, Any]]", tell: IO[str]) -> None:
    rank, devices = handed["rank"], [torch.device(name) for name in handed["devices"]]
    if devices[rank].type == "cuda":
        torch.cuda.set_device(devices[rank])
    else:
        torch.set_num_threads(handed["threads"])
    part = _part(handed)
    _tell(tell, ready=len(part.examples))
    ranks: Connected | None = None
    while True:
        command = commands.get()
        ranks = ranks or Connected(Path(handed["meeting"]), devices, rank, handed["deadline"])
        _round(part, ranks, command)
        _tell(tell, done=True)


def _part(handed: dict[str, Any]) -> Part:
    site = SiteConfig.model_validate_json(handed["site"])
    federation, site_file = FederationConfig.model_validate_json(handed["federation"]), Path(handed["site_file"])
    task = make_task(federation.task)
    model = SiteModel(site, site_file, federation, task, None, {})
    rows, _ = split_held_out(task.rows(site.data, site_file)[0], site.data.held_out)
    examples = task.examples(model.base.tokenizer, rows, site.data.system, federation.training.max_length)
    _ = model.tuned
    return Part(site, federation, model, task, examples)


def _round(part: Part, ranks: Connected, command: dict[str, Any]) -> None:
    kept, moments = (_empty(command[key]) for key in ("kept", "moments"))
    part.share(ranks, kept | moments)
    work = Work(part.model, part.federation, None, command["round"], command["active"], len(part.examples))
    optimizer = work.optimizer(moments)
    restore(optimizer, work.mine, kept)
    part.train(work, optimizer, ranks, command["max_batch_size"])


def _empty(described: list[tuple[str, list[int], str]]) -> Tensors:
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in described}


def _tell(pipe: IO[str], **told: object) -> None:
    pipe.write(json.dumps(told) + "\n")
    pipe.flush()
