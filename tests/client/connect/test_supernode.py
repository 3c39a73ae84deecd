"""The SuperNode with a pause of one's own choice."""

from pathlib import Path

import pytest
import yaml
from flwr.app import Context, RecordDict

from client.privacy.agreement import make_agreement
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from deploy.cli import main
from deploy.sandbox.tiny import make_federation


@pytest.mark.parametrize("poll", ["0", "-1", "nan", "61"])
def test_pause_outside_its_limits_is_refused(poll: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "supernode", "--poll", poll]) == 2
    assert "allowed: 0.05 to 60 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--superlink", "127.0.0.1:1"], "give --superlink HOST:PORT, and --root-certificates FILE"),
        (["--superlink", "nowhere", "--insecure"], "--superlink: 'nowhere'; allowed: HOST:PORT"),
        (["--superlink", "127.0.0.1:1", "--root-certificates", "/none/ca.crt"], "/none/ca.crt: cannot be read"),
        (["--superlink", "127.0.0.1:1", "--insecure", "--auth-supernode-private-key", "{}/site-a.key"], "needs TLS"),
        (["--superlink", "127.0.0.1:1", "--insecure", "--connect-deadline", "-1"], "'-1'; allowed: 0 seconds and more"),
        (
            ["--superlink", "127.0.0.1:1", "--insecure", "--node-config", 'site="{}/site-a.yaml"'],
            "`trust` is kept by the worker alone; start this with --isolation process",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys", "site", str(tmp_path / "site-a")]) == 0
    data = {"path": "rows.jsonl", "prompt": "p", "answer": "a"}
    trust = {"bundles": ["0" * 64]}
    (tmp_path / "site-a.yaml").write_text(yaml.safe_dump({"name": "site-a", "data": data, "trust": trust}))
    socket = ["--socket", str(tmp_path / "socket")]
    assert main(["site", "supernode", *socket, *(argument.format(tmp_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_app_refuses_to_work_unchecked_where_the_site_trusts_only_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.app import _session

    file = make_federation(tmp_path, {"site-a": 8})
    site = tmp_path / "site-a.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "trust": {"bundles": ["0" * 64]}}))
    agreement = make_agreement(resolved(load(file, FederationConfig), file))
    context = Context(1, 1, {"site": str(site)}, RecordDict(), {})
    monkeypatch.delenv("FEDSPAN_VETTED", raising=False)
    with pytest.raises(ConfigError, match="site-a: its site file has `trust`, but nobody has checked this bundle"):
        _session(load(site, SiteConfig), agreement, context)
    monkeypatch.setenv("FEDSPAN_VETTED", "1")
    assert _session(load(site, SiteConfig), agreement, context).site.name == "site-a"
