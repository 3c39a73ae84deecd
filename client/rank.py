"""One rank's part in a round, and the process of a rank other than 0 (decision 037). No Flower.

Every device of a site has a process that runs the same training on its share of the rows. That of rank 0 has the
session. Any other loads the model on its device and takes part in the rounds that rank 0 announces. It reports to rank
0, a line of JSON each: ``ready`` with the number of training rows, ``done`` after a round with the bytes of CUDA memory
that it holds, ``error`` with ``text`` before it ends. It ends when its standard input does, so it never outlives rank
0's process.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import torch

from client.site_model import SiteModel
from client.training.between_rounds import restore
from client.training.ranks import Connected, Ranks
from client.training.settings import pick_autocast
from client.training.trainer import TrainResult, train
from client.update import Work
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.rows import split_held_out
from common.data.tasks import Task, make_task
from common.errors import FedSpanError, ModelError, kind_of, place_of
from common.protocol.tensors import Tensors
from common.system import logs

_SAME = 1e-6  # relative difference of norms that the last bits of unlike devices may make
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The training of one device.

    Attributes:
        site: the site file's content.
        federation: the federation's settings.
        model: the model, on this rank's device.
        task: the learning task.
        examples: all of the site's encoded training rows.
    """

    site: SiteConfig
    federation: FederationConfig
    model: SiteModel
    task: Task[Any]
    examples: Sequence[Any]

    def train(
        self,
        work: Work,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        max_batch_size: int | None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainResult:
        """Train one round; see ``client.training.trainer.train``."""
        seed = work.begin(self.site.name)
        if ranks.rank:  # each device draws its own dropout
            torch.manual_seed(torch.initial_seed() + ranks.rank)
        return train(
            self.model.tuned.model,
            optimizer,
            self.examples,
            self.task.collater(self.model.base.tokenizer, self.model.packing),
            self.task.loss_sum,
            self.federation.training,
            server_round=work.server_round,
            rounds=self.federation.rounds,
            max_batch_size=max_batch_size,
            ranks=ranks,
            autocast=pick_autocast(self.site.precision, self.model.device),
            seed=seed,
            go_on=self.site.privacy is not None,
            on_step=on_step,
        )

    def share(self, ranks: Ranks, beside: Tensors) -> None:
        """Bring rank 0's trained tensors to all ranks, and ``beside``, on the CPU: what its optimizer starts with.

        Raises:
            ModelError: the ranks have not read the same base model.
        """
        trained = {id(p): p.data for p in (self.model.tuned.parameters | self.model.tuned.local).values()}
        ranks.from_first([*trained.values(), *beside.values()])
        model = self.model.tuned.model
        frozen = (tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in trained)
        norm = sum(float(torch.linalg.vector_norm(tensor.float())) ** 2 for tensor in frozen) ** 0.5
        norms = [number for (number,) in ranks.gather([norm])]
        if max(norms) - min(norms) > _SAME * max(norms):
            raise ModelError("the devices have not read the same base model; its files have changed, ask again")


def serve(handed: dict[str, Any]) -> None:
    """Work until standard input is closed, or an error ends the round; ``handed``: from ``client.training.team``."""
    tell = os.fdopen(handed["tell"], "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; rank 0 ends this one
    logs.configure("site", f"rank {handed['rank']}")
    if handed["aside"]:
        logs.set_aside(Path("/dev/fd/1"))
    commands: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    try:
        work(handed, commands, tell)
    except Exception as error:
        known = isinstance(error, FedSpanError)
        log.error("rank %d ends: %s", handed["rank"], error if known else place_of(error), exc_info=error)
        _tell(tell, error=kind_of(error), text=str(error) if known else place_of(error))
        raise SystemExit(1) from None


def _listen(commands: "SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)  # rank 0 has stopped or died: nothing that goes on here is of use


def work(handed: dict[str, Any], commands: "SimpleQueue[dict[str, Any]]", tell: IO[str]) -> None:
    """Take part in the rounds whose commands arrive; reports go to ``tell``."""
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
        _tell(tell, done=sum(map(torch.cuda.memory_reserved, {device for device in devices if device.type == "cuda"})))


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
