"""The Flower ServerApp: reads the federation file, runs the rounds, writes the results into the run folder."""

import os
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config.federation import FederationConfig, check_source, resolved, settings_for_sites
from common.config.load import load
from common.errors import ConfigError, FederationError, FedSpanError, ModelError, kind_of
from common.model.adapters import BASE_WEIGHT
from common.protocol.messages import HelloRequest
from common.system import logs
from server.run import from_supervisor
from server.run.folder import RunFolder

app = ServerApp()
_ORPHAN_SECONDS = 20.0  # time to note in the run folder that the run was interrupted


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; the run config gives ``federation`` (file), ``run-dir`` and ``resume``.

    Raises:
        FedSpanError: with the reason, after it was written to the run folder; Flower then marks the run failed.
    """
    logs.configure("server")
    _end_with_parent()
    source, run_dir = (Path(str(context.run_config.get(key, ""))) for key in ("federation", "run-dir"))
    if not source.is_absolute() or not run_dir.is_absolute():
        raise ConfigError("--run-config must give federation='/path/FEDERATION.yaml' and run-dir='/path/runs/NAME'")
    federate(grid, source, run_dir, resume=bool(context.run_config.get("resume", False)), flower_run=context.run_id)


def _end_with_parent() -> None:
    """End this process soon after its parent has ended, whatever this process is doing.

    Flower's own watch raises SIGINT in a thread. The signal does not wake the main thread from a call to a SuperLink
    that is gone, and Flower repeats such calls for ever (decision 011).
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def federate(
    grid: Grid, source: Path, run_dir: Path, *, resume: bool, flower_run: int | None, keep_model: bool = True
) -> None:
    """Run one federation on a grid, from its file to a run folder.

    Args:
        grid: the grid through which messages to sites are sent.
        source: the federation file.
        run_dir: the run's folder, for the results.
        resume: resume the run in ``run_dir``.
        flower_run: Flower's number of the run; None: no Flower run.
        keep_model: write the fine-tuned model; false: only numbers and answers.

    Raises:
        FedSpanError: with the reason, after it was written to the run folder.
        SuperLinkLost: calls to the SuperLink fail for good.
    """
    from server.loop.transport import SuperLinkLost

    config = resolved(load(source, FederationConfig), source)
    folder = RunFolder.reopen(run_dir, config) if resume else RunFolder.create(run_dir, config)
    folder.model_info({} if flower_run is None else {"flower_run": flower_run})
    try:
        _run(grid, config, source, folder, resume=resume, keep_model=keep_model)
    except FedSpanError as error:
        folder.fail(str(error), kind_of(error), error.causes if isinstance(error, FederationError) else None)
        raise
    except SuperLinkLost:  # no outcome: whoever supervises the run sees that its server has died
        raise
    except (SystemExit, KeyboardInterrupt):  # Flower raises these after `flwr stop`, and when the SuperLink ends
        folder.interrupt()
        raise
    except BaseException as error:
        folder.fail(f"the server stopped on {kind_of(error)}: {error}", kind_of(error))
        raise
    finally:
        folder.close()


def _run(
    grid: Grid, config: FederationConfig, source: Path, folder: RunFolder, *, resume: bool, keep_model: bool
) -> None:
    from server.buffered.loop import BufferedLoop
    from server.loop.checkpoint import newest
    from server.loop.rounds import RoundLoop
    from server.loop.server_model import ServerModel
    from strategies.flower.named import make_strategy

    check_source(config, source)
    server_model = ServerModel(config, source)
    if (wrong := config.model.difference(server_model.base_digest, server_model.tokenizer_digest)) is not None:
        raise ModelError(f"{source}: {wrong}")
    state = server_model.initial_state()
    checkpoint = (
        newest(folder.path, lambda reason: folder.event("checkpoint_damaged", reason=reason)) if resume else None
    )
    if resume:
        folder.same_models({"base_digest": server_model.base_digest, "tokenizer_digest": server_model.tokenizer_digest})
        done = 0 if checkpoint is None else checkpoint.round
        if checkpoint is None or folder.fact("last_round") != done:  # else all is measured, and only not delivered
            folder.rewind(0 if checkpoint is None else checkpoint.metrics_bytes)
        folder.event("resumed", round=done)
    trained = {name: tensor for name, tensor in state.items() if not name.endswith(BASE_WEIGHT)}
    folder.model_info(
        {
            "base_digest": server_model.base_digest,
            "tokenizer_digest": server_model.tokenizer_digest,
            "model_parameters": server_model.model_parameters,
            "trained": {name: list(tensor.shape) for name, tensor in trained.items()},
        }
    )
    folder.event(
        "started",
        rounds=config.rounds,
        strategy=config.strategy.name,
        trained_tensors=len(trained),
        trained_parameters=sum(tensor.numel() for tensor in trained.values()),
        model_parameters=server_model.model_parameters,
    )
    before = server_model.answers(state)
    strategy = make_strategy(
        config.strategy,
        seed=config.training.seed,
        aggregation=config.aggregation,
        server_optimizer=config.server_optimizer,
    )
    settings = HelloRequest(
        federation=settings_for_sites(config),
        signatures=from_supervisor.kept_signatures(folder.path),
        run=folder.fact("id"),
    )
    make_loop = BufferedLoop if config.cohort.buffered else RoundLoop
    loop = make_loop(grid, config, settings, strategy, server_model, folder)
    state = loop.run(state, checkpoint)
    after = server_model.answers(state)
    folder.samples(
        [
            {"prompt": b["prompt"], "expected": b["expected"], "before": b["answer"], "after": a["answer"]}
            for b, a in zip(before, after, strict=True)
        ]
    )
    if keep_model:
        loop.deliver(state)
    folder.finish()
