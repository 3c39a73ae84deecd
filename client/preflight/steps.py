"""A few training steps in a process of its own: ``python -m client.preflight.steps SITE.yaml FEDERATION.yaml N``.

Prints one JSON object: seconds per step, bytes at the peak (of the process on the host, of tensors on a CUDA device),
and rows per forward pass at the end; or ``{"error": ...}``. The steps run in a separate process, because the kernel may
kill it for its memory, and because the kernel records the peak per process.
"""

import json
import subprocess
import sys
from pathlib import Path

from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import FedSpanError, TrainingError
from common.system.machine import resident_peak
from strategies.flower.named import make_rule


def measured(site_file: Path, federation_file: Path, steps: int, deadline: float) -> dict[str, float]:
    """Start a process that makes ``steps`` training steps twice, and measures the second time.

    Raises:
        TrainingError: the process fails, is killed, or takes longer than ``deadline`` seconds.
    """
    command = [sys.executable, "-m", "client.preflight.steps", str(site_file), str(federation_file), str(steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise TrainingError(f"twice {steps} training steps took longer than {deadline:g} seconds") from None
    try:
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        memory = ", most likely for its memory" if done.returncode == -9 else ""
        raise TrainingError(f"training {how}{memory}") from None
    if "error" in answer:
        raise TrainingError(answer["error"])
    return {key: float(value) for key, value in answer.items()}


def _make(site_file: Path, federation_file: Path, steps: int) -> dict[str, float]:
    site, federation = load(site_file, SiteConfig), resolved(load(federation_file, FederationConfig), federation_file)
    settings = federation.model_dump(mode="json")
    settings["training"] |= {"local_epochs": None, "local_steps": steps}
    session = Session(site, site_file, FederationConfig.model_validate(settings))
    session.hello()
    names = make_rule(federation.strategy, seed=0).active(1, session.exchanged)
    session.train(1, names)  # the first steps are slower than all others
    _, told = session.train(1, names)
    return {
        "seconds": told["seconds"] / told["steps"],
        "host": float(resident_peak()),
        "device": told["peak_memory_bytes"],
        "rows": told["micro_batch"],
    }


def main() -> int:
    """Command line."""
    site_file, federation_file, steps = sys.argv[1:]
    try:
        answer: dict[str, object] = dict(_make(Path(site_file), Path(federation_file), int(steps)))
    except FedSpanError as error:
        answer = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - its text might quote a row
        answer = {"error": f"{type(error).__name__} while training"}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
