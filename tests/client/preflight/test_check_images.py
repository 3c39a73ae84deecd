"""The preflight at a site of images."""

from pathlib import Path

import pytest

from client.preflight import check, memory
from client.preflight.context import CheckContext
from client.preflight.finding import Finding
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.section import ModelSource
from common.config.site import SiteConfig
from tests.harness.agreements import agree_all
from tests.harness.tiny_images import make_image_federation


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    return agree_all(make_image_federation(tmp_path, {"site-a": 8}))


def subject(federation: Path, *, known: bool = True, skip: bool = False) -> CheckContext:
    file = federation.parent / "site-a.yaml"
    site = load(file, SiteConfig)
    data = site.data.model_copy(update={"skip_unreadable": skip})
    site = site.model_copy(update={"device": "cpu", "model": ModelSource(path="model"), "data": data})
    if not known:
        return CheckContext(site, file)
    return CheckContext(site, file, resolved(load(federation, FederationConfig), federation), federation)


def findings(of: CheckContext) -> dict[str, Finding]:
    return dict(check.findings(check.all_checks(), of))


def test_sound_site_is_ready(federation: Path) -> None:
    of = subject(federation)
    found = findings(of)
    assert [name for name, finding in found.items() if finding.level == "FAIL"] == []
    assert found["shard"].found.startswith("24 rows")
    assert found["row lengths"].found == "images are brought to the size that the model takes"
    assert "6 image(s) of 3 x 16 x 16 in a forward pass" in found["memory"].found
    hello = Session(of.site, of.site_file, of.settings).hello()
    assert found["held out"].found == f"{hello.train_rows} rows to train on, {hello.held_out_rows} held out"


def test_memory_grows_with_the_images(federation: Path) -> None:
    of = subject(federation)
    two, four = (memory.estimate(of.tuned, of.settings, of.largest(rows), 1, None) for rows in (2, 4))
    assert 1.8 < four.passes / two.passes < 2.2


def test_image_that_cannot_be_read_fails_or_is_counted(federation: Path) -> None:
    (federation.parent / "site-a" / "red" / "0.png").write_bytes(b"no image")
    found = findings(subject(federation))
    assert (found["shard"].level, "1 of 24 images cannot be read" in found["shard"].found) == ("FAIL", True)
    allowed = findings(subject(federation, skip=True))["shard"]
    assert (allowed.level, "1 images that cannot be read are left out" in allowed.found) == ("warning", True)


def test_copies_are_found_by_their_content(federation: Path) -> None:
    red = federation.parent / "site-a" / "red"
    (red / "copy.png").write_bytes((red / "0.png").read_bytes())
    assert "1 of 25 rows repeat an earlier one" in findings(subject(federation))["duplicates"].found


def test_task_must_be_known(federation: Path) -> None:
    found = findings(subject(federation, known=False))
    for name in ("shard", "model files", "digests"):
        assert (found[name].level, "needs --federation: what a vit model learns" in found[name].found) == (
            "skipped",
            True,
        )


def test_damaged_configuration_is_a_fault_of_the_model(federation: Path) -> None:
    (federation.parent / "model" / "config.json").write_text("{")
    found = findings(subject(federation, known=False))
    assert found["model files"].level == "FAIL"
    assert "cannot be loaded" in found["model files"].found
    assert "fault of FedSpan" not in " ".join(finding.mend for finding in found.values())
