"""The server's own model: gives the first state, evaluates the global state, exports the result."""

from pathlib import Path

import torch

from common.config.federation import FederationConfig
from common.data.evaluation import EvalSettings, generate_answers, in_fixed_order
from common.data.rows import Row
from common.data.tasks import make_task
from common.model import second_moments, tuning
from common.model.base_model import Base, check_length, read_again
from common.model.card import Card
from common.model.finished import Use, base_facts, source_folder, write_model
from common.model.quantization import WHOLE, Held, whole_sizes
from common.protocol.digest import base_digest, tensors_digest, tokenizer_digest
from server.run.outcome import Outcome
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
        self._source = str(model.path or model.hub), model.revision
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._base = self._load(Held(model.quantization, config.strategy, str(device)))
        check_length(self._base.model, config.training.max_length)
        self.model_parameters = sum(number for number, _ in whole_sizes(self._base.model))
        self.base_digest = base_digest(self._base.model)
        self.tokenizer_digest = tokenizer_digest(self._base.tokenizer)
        self._tuned = self._tune(self._base)
        self._tuned.model.to(device)
        self._local = {name: tensor.detach().cpu().clone() for name, tensor in self._tuned.local.items()}
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

    def card(self, state: Tensors, outcome: Outcome) -> Card:
        """The card of a state's model, for this machine and for the sites."""
        config, strategy = self._config, self._config.strategy
        folder = source_folder(*self._source)
        return Card(
            federation=config.name,
            task=config.task,
            base=base_facts(config, folder, self.base_digest, self.tokenizer_digest),
            strategy=strategy,
            form="adapter" if strategy.trains == "lora" and not strategy.changes_base else "model",
            rounds=config.rounds,
            trained_digest=tensors_digest({name: state[name] for name in second_moments.without(state)}),
            **vars(outcome),
        )

    def export(self, state: Tensors, folder: Path, card: Card) -> None:
        """Write a state's model with its tokenizer; see ``common.model.finished``.

        Args:
            state: the model's state.
            folder: the folder; with ``strategy.merge`` an adapter is also written merged, into ``merged`` beside it.
            card: the card.
        """
        strategy = self._config.strategy
        self._write(state, folder, card)
        if card.form == "adapter" and strategy.trains == "lora" and strategy.merge:
            self._write(state, folder.with_name("merged"), card.model_copy(update={"form": "model"}))

    def _write(self, state: Tensors, folder: Path, card: Card) -> None:
        source, tuned = source_folder(*self._source), self._tuned
        if card.form == "model" and self._config.model.quantization != "whole":
            tuned = self._tune(read_again(lambda: self._load(WHOLE), self.base_digest))
        write_model(folder, tuned, {**state, **self._local}, self._base.tokenizer, self.use, card, source)

    def _load(self, held: Held) -> Base:
        return self._task.load(*self._source, self._config.model.dtype, self._config.training.seed, held)

    def _tune(self, base: Base) -> tuning.Tuned:
        config = self._config
        return tuning.tune(base.model, config.strategy, self._task.peft_type, seed=config.training.seed)

    @property
    def use(self) -> Use:
        """How the model was evaluated here."""
        return Use.of(self._config, self._config.evaluation.server)
