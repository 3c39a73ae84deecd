"""The server's own model: gives the first state, evaluates the global state, exports the result."""

from pathlib import Path
from typing import Any

import torch

from common.config.federation import FederationConfig
from common.data.evaluation import EvalSettings, generate_answers, in_fixed_order
from common.data.rows import Row
from common.data.tasks import make_task
from common.model import tuning
from common.model.base_model import check_length
from common.protocol.digest import base_digest, tokenizer_digest
from common.system.files import built
from strategies.rule import Tensors


class ServerModel:
    """The base model in the server's memory.

    Args:
        config: the federation file, with absolute paths.
        source: path of the federation file, for errors.

    Raises:
        ModelError: the base model cannot be used.
        DataError: the server's evaluation set cannot be used.
    """

    def __init__(self, config: FederationConfig, source: Path) -> None:
        self._config = config
        data = config.evaluation.server
        model = config.model
        self._task = make_task(config.task)
        self._rows: list[Row] = self._task.rows(data, source)[0] if data is not None else []
        seed = config.training.seed
        self._base = self._task.load(str(model.path or model.hub), model.revision, model.dtype, seed)
        check_length(self._base.model, config.training.max_length)
        self.model_parameters = sum(p.numel() for p in self._base.model.parameters())
        self.base_digest = base_digest(self._base.model)
        self.tokenizer_digest = tokenizer_digest(self._base.tokenizer)
        self._tuned = tuning.tune(self._base.model, config.strategy, self._task.peft_type, seed=seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tuned.model.to(device)
        system = data.system if data is not None else None
        self._settings = EvalSettings(config.evaluation, config.training.max_length, device, system)

    def initial_state(self) -> Tensors:
        """The state before round 1: the base model's trained tensors."""
        return tuning.first_state(self._tuned, self._config.strategy, self._config.training.seed)

    def evaluate(self, state: Tensors) -> dict[str, float]:
        """Metrics of a state on the server's own set; empty when there is none."""
        if not self._rows:
            return {}
        self._tuned.set(state)
        return self._task.evaluate(self._tuned.model, self._base.tokenizer, self._rows, self._settings)

    def answers(self, state: Tensors) -> list[dict[str, str]]:
        """Questions of the server's own set with the expected and the generated answer."""
        rows = in_fixed_order(self._rows)[: self._config.evaluation.samples]
        if not rows or not self._task.generates:
            return []
        self._tuned.set(state)
        generated = generate_answers(self._tuned.model, self._base.tokenizer, rows, self._settings)
        return [
            {"prompt": row.prompt, "expected": row.answer, "answer": answer}
            for row, answer in zip(rows, generated, strict=True)
        ]

    def export(self, state: Tensors, run_dir: Path) -> None:
        """Write the fine-tuned result with its tokenizer as ``model/``; with ``merge``, also ``merged/``.

        ``model/`` is a full model where base weights change, otherwise a PEFT adapter. A folder appears complete or not
        at all.
        """
        self._tuned.set(state)
        strategy = self._config.strategy
        if strategy.trains == "lora" and strategy.changes_base:
            self._write(self._tuned.model.merge_and_unload(), run_dir / "model")
            return
        self._write(self._tuned.model, run_dir / "model")
        if strategy.trains == "lora" and strategy.merge:
            self._write(self._tuned.model.merge_and_unload(), run_dir / "merged")

    def _write(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - a transformers or a peft model
        with built(folder) as new:
            model.save_pretrained(new)
            if self._task.labels:  # with an adapter, whose head has as many rows, in this order
                model.config.save_pretrained(new)
            self._base.tokenizer.save_pretrained(new)
