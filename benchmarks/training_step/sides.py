"""One side of the comparison in a process of its own: ``python -m benchmarks.training_step.sides CASE SIDE STEPS``.

It makes one optimizer step for every line that it reads, and answers with a line of JSON: wall-clock and processor
seconds of the step, its loss, and the process's peak memory. So steps of several sides can take turns.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.training_step.cases import CASES, SEED, Case, Work, prepare
from client.training.ranks import Ranks
from client.training.settings import make_optimizer
from client.training.trainer import train
from common.config.task import CausalLMTask
from common.data.chat import Example
from common.data.packing import choose
from common.data.tasks import make_task
from common.model.base_model import pad_id
from common.system.machine import resident_peak

MARK = "@"  # before every answer: libraries print, too


class Pace:
    """Waits for the word before every step, and answers after it."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._began: tuple[float, float] | None = None

    def pause(self, *, last: bool = False) -> None:
        """Between two steps, before the first, and after the last."""
        now = time.perf_counter(), time.process_time()
        told: dict[str, float] = {"peak": float(resident_peak())}
        if self._began is not None:
            told |= {"wall": now[0] - self._began[0], "cpu": now[1] - self._began[1], "loss": self.loss}
        print(MARK + json.dumps(told), flush=True)
        if not last:
            sys.stdin.readline()
        self._began = time.perf_counter(), time.process_time()

    def noting(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which notes its loss here."""

        @wraps(compute_loss)
        def noted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            loss = compute_loss(*args, **kwargs)
            self.loss = (loss[0] if isinstance(loss, tuple) else loss).item()
            return loss

        return noted

    def callback(self) -> TrainerCallback:
        """The callback that makes a Trainer pause."""
        pause = self.pause

        class Paced(TrainerCallback):
            def on_step_begin(self, *_: object, **__: object) -> None:
                pause()

            def on_train_end(self, *_: object, **__: object) -> None:
                pause(last=True)

        return Paced()


def ours(case: Case, work: Work, steps: int, pace: Pace, side: str) -> None:
    """FedSpan's own loop."""
    task, training = make_task(CausalLMTask()), case.training(steps)
    packing = choose(work.tuned.model, "off" if side == "FedSpan, padded" else "auto", None, packs=True)

    def loss_sum(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        summed, counted = task.loss_sum(model, batch)
        pace.loss = summed.item() / counted
        return summed, counted

    optimizer = make_optimizer(work.tuned.parameters, training, case.strategy, 1, None, None)
    pace.pause()
    train(
        work.tuned.model,
        optimizer,
        work.examples,
        task.collater(work.tokenizer, packing),
        loss_sum,
        training,
        server_round=1,
        rounds=1,
        max_batch_size=None,
        ranks=Ranks([torch.device("cpu")]),
        autocast=None,
        seed=SEED,
        on_step=lambda done, every: pace.pause(last=done == every),
    )


def peer(case: Case, work: Work, steps: int, pace: Pace, side: str) -> None:
    """Transformers' Trainer, or TRL's, with PEFT's model or galore-torch's optimizer."""
    import transformers as hf
    from datasets import Dataset

    training = case.training(steps)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": case.rows,
        "max_steps": steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": training.max_grad_norm or 0.0,  # 0: none
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if case.strategy.trains == "weights":
        names = "|".join(re.escape(name.removesuffix(".weight")) for name in work.tuned.parameters)
        more = (
            f"rank={case.strategy.rank}, update_proj_gap={case.strategy.update_proj_gap}, scale={case.strategy.scale}"
        )
        settings |= {"optim": "galore_adamw", "optim_target_modules": names, "optim_args": more}
    rows = [
        {"input_ids": e.input_ids, "attention_mask": [1] * len(e.input_ids), "labels": _labels(e)} for e in work.order
    ]
    data = Dataset.from_list(rows)
    tokenizer = work.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad_id(tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        if side == "SFTTrainer":
            from trl import SFTConfig, SFTTrainer

            how = SFTConfig(folder, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **settings)
            trainer = SFTTrainer(work.tuned.model, how, train_dataset=data, processing_class=tokenizer)
        else:
            collator = hf.DataCollatorForSeq2Seq(tokenizer, padding=True)
            how = hf.TrainingArguments(folder, **settings)
            trainer = hf.Trainer(work.tuned.model, how, train_dataset=data, data_collator=collator)
        trainer.compute_loss = pace.noting(trainer.compute_loss)
        trainer.add_callback(pace.callback())
        trainer.train()


def _labels(example: Example) -> list[int]:
    labels = [-100] * len(example.input_ids)
    for start, end in example.counted():
        labels[start:end] = example.input_ids[start:end]
    return labels


def main() -> None:
    """Command line."""
    name, side, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    case = CASES[name]
    work = prepare(case, steps)
    (ours if side.startswith("FedSpan") else peer)(case, work, steps, Pace(), side)


if __name__ == "__main__":
    main()
