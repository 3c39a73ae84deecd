"""Where a site finds the base model, and that it is the one which the federation file names."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.session import Session
from client.training.settings import model_source
from common.config.federation import FederationConfig, as_invited, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, ModelError
from deploy.sandbox.tiny import make_federation, make_model
from tests.harness.agreements import agree_all
from tests.harness.processes import FEDSPAN, environment

HUB, COMMIT = "example/tiny", "c0ffee" + "0" * 34


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_federation(tmp_path, {"site-a": 9})


def federation(file: Path, **model: Any) -> FederationConfig:
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "model": {**config["model"], **model}}))
    return resolved(load(file, FederationConfig), file)


def site(file: Path, model: object) -> SiteConfig:
    path = file.with_name("site-a.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": model}))
    return load(path, SiteConfig)


def cached(model: Path, home: Path) -> None:
    """A folder's model as the hub's client keeps one that it has fetched."""
    snapshot = home / "hub" / f"models--{HUB.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)


def hello(file: Path, config: FederationConfig) -> Any:
    path = file.with_name("site-a.yaml")
    return Session(load(path, SiteConfig), path, config).hello()


def test_site_names_a_folder_or_a_commit_of_the_hub(file: Path) -> None:
    config, path = federation(file), file.with_name("site-a.yaml")
    assert model_source(load(path, SiteConfig), path, config.model) == (str(file.with_name("model")), None)
    folder = (str(file.with_name("copy")), None)
    assert model_source(site(file, "copy"), path, config.model) == folder
    assert model_source(site(file, {"path": "copy"}), path, config.model) == folder
    assert model_source(site(file, {"hub": HUB, "revision": COMMIT}), path, config.model) == (HUB, COMMIT)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"hub": HUB}, "`model`: `revision` (a commit of the hub model) is required with `hub`"),
        ({"path": "copy", "hub": HUB}, "`model`: give exactly one of `path` and `hub`"),
        ({"pth": "copy"}, "unknown key `model.pth`; did you mean `path`?"),
        ({"path": "copy", "dtype": "float32"}, "unknown key `model.dtype`; allowed here: `path`, `hub`, `revision`"),
        (7, "`model` is 7"),
    ],
)
def test_slip_in_a_sites_model_is_named(file: Path, model: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        site(file, model)
    assert says in str(error.value)


def test_model_of_the_hubs_cache_is_checked_and_loaded_without_the_hub(file: Path, tmp_path: Path) -> None:
    found = hello(file, federation(file))
    cached(tmp_path / "model", tmp_path / "hf")
    shutil.rmtree(tmp_path / "model")
    federation(file, digest=found.base_digest, tokenizer_digest=found.tokenizer_digest)
    site(file, {"hub": HUB, "revision": COMMIT})
    agree_all(file)
    env = {**os.environ, **environment(), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [*FEDSPAN, "site", "check", str(tmp_path / "site-a.yaml"), "--federation", str(file), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    checks = {line["check"]: line for line in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["model files"]["level"]) == (0, "ok"), done.stdout + done.stderr
    assert checks["digests"]["found"].endswith("those of the federation file")
    assert found.base_digest[:16] in checks["digests"]["found"]


@pytest.mark.parametrize("key", ["digest", "tokenizer_digest"])
def test_site_does_not_begin_with_another_model_than_the_file_names(file: Path, key: str) -> None:
    found = hello(file, federation(file))
    names = {"digest": found.base_digest, "tokenizer_digest": found.tokenizer_digest}
    assert hello(file, federation(file, **names)) == found
    what = {"digest": "base model", "tokenizer_digest": "tokenizer"}[key]
    says = f"^site-a: the {what} differs: digest {names[key]}, the federation file's is {'0' * 64}$"
    with pytest.raises(ModelError, match=says):
        hello(file, federation(file, **{**names, key: "0" * 64}))


def test_other_weights_of_the_same_shape_are_told_apart(file: Path, tmp_path: Path) -> None:
    found = hello(file, federation(file))
    make_model(tmp_path / "other", seed=1)
    site(file, "other")
    with pytest.raises(ModelError, match="the base model differs"):
        hello(file, federation(file, digest=found.base_digest))


def test_invited_site_is_told_no_path_of_the_operators_and_needs_its_own_copy(file: Path, tmp_path: Path) -> None:
    found = hello(file, federation(file))
    invited = as_invited(federation(file), found.base_digest, found.tokenizer_digest)
    assert str(tmp_path) not in invited.model_dump_json()
    assert (invited.local, invited.evaluation.server) == (None, None)
    with pytest.raises(ModelError, match="does not say where the base model is; give `model` in the site file"):
        hello(file, invited)
    site(file, "model")
    assert hello(file, invited) == found
