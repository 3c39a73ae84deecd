"""The preflight: what it finds on a sound site, and every failure with its line and its mend; never a row."""

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from client.preflight import check, machine, memory
from client.preflight.context import CheckContext
from client.preflight.finding import Finding
from client.privacy.ledger import Ledger
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.system.keys import make_site
from deploy import cli
from deploy.sandbox.tiny import make_federation
from tests.harness.agreements import agree_all
from tests.harness.certificates import Authority
from tests.harness.programs import needs

PRIVATE = {"clip": 1.0, "noise_multiplier": 2.0, "delta": 1.0e-5, "max_epsilon": 1000.0}
MARKER = "Mrs-Miller-of-Leeds"  # is in every row of every shard here


class Files(NamedTuple):
    """A site's files."""

    site: Path
    federation: Path

    def change(self, file: str, **keys: Any) -> None:
        """Replace keys of the site or the federation file; a mapping is merged into a section."""
        path: Path = getattr(self, file)
        data = yaml.safe_load(path.read_text())
        for key, value in keys.items():
            merged = isinstance(value, dict) and isinstance(data.get(key), dict) and "name" not in value
            data[key] = {**data[key], **value} if merged else value
        path.write_text(yaml.safe_dump(data))

    def subject(self, **more: Any) -> CheckContext:
        federation = resolved(load(self.federation, FederationConfig), self.federation)
        return CheckContext(load(self.site, SiteConfig), self.site, federation, self.federation, deadline=20.0, **more)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    federation = make_federation(tmp_path, {"site-a": 40})
    write(tmp_path, [{"term": f"{MARKER} {i}", "title": f"case {i}"} for i in range(40)])
    made = Files(tmp_path / "site-a.yaml", federation)
    made.change("site", device="cpu", trust={"bundles": ["0" * 64]})
    agree_all(federation)
    return made


Output = Callable[[], tuple[str, str]]


@pytest.fixture(autouse=True)
def output(capfd: pytest.CaptureFixture[str]) -> Iterator[Output]:
    """What was printed and logged; no row is in it, whether a test looks at it or not."""

    def read() -> tuple[str, str]:
        out, err = capfd.readouterr()
        assert MARKER not in out + err
        return out, err

    loggers = [logging.getLogger(), logging.getLogger("common.data.images")]
    levels = [logger.level for logger in loggers]
    yield read
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    read()


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "site-a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def look(name: str, subject: CheckContext) -> Finding:
    """What one check finds; no row is in it."""
    finding = dict(check.findings({name: check.all_checks()[name]}, subject))[name]
    assert MARKER not in f"{finding}"
    return finding


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return cli.main(["site", "check", *map(str, arguments)])


# What the site promises itself


def test_site_without_trust_is_warned(files: Files) -> None:
    files.change("site", trust=None)
    finding = look("trust", files.subject())
    assert (finding.level, "every app bundle" in finding.found) == ("warning", True)


def test_key_that_is_missing_from_the_trust_list_fails(files: Files) -> None:
    files.change("site", trust={"keys": ["reviewer.pub"]})
    finding = look("trust", files.subject())
    assert (finding.level, "reviewer.pub" in finding.found) == ("FAIL", True)


def test_ledger_that_was_changed_fails(files: Files, tmp_path: Path) -> None:
    assert look("ledger", files.subject()).level == "skipped"
    file = tmp_path / "site-a-ledger.jsonl"
    with Ledger(file).opened() as ledger:
        ledger.append({"event": "begun", "site": "site-a"})
    assert look("ledger", files.subject()).level == "ok"
    files.change("site", name="site-b", ledger=file.name)
    assert look("ledger", files.subject()).found.endswith("is the ledger of site-a")
    files.change("site", name="site-a")
    file.write_bytes(file.read_bytes().replace(b"begun", b"began"))
    finding = look("ledger", files.subject())
    assert (finding.level, "line 1: it was changed" in finding.found) == ("FAIL", True)


def test_site_that_has_taken_part_is_as_ready_as_before(files: Files, tmp_path: Path) -> None:
    with Ledger(tmp_path / "site-a-ledger.jsonl").opened() as ledger:
        ledger.append({"event": "begun"})
    for name in ("disk", "ledger", "limits"):
        assert look(name, files.subject()).level == "ok", name


@pytest.mark.parametrize(
    ("site", "federation", "found"),
    [
        ({"policy": {"federations": ["other"]}}, {}, "`federations` allows other; this is tiny"),
        ({"policy": {"strategies": ["fedit"]}}, {}, "`strategies` allows fedit; this is fedftg"),
        ({"policy": {"tensors": ["*.attn.*"]}}, {}, "`tensors` allows *.attn.*; asked was model.layers.0.mlp"),
        ({"policy": {"tensors": ["*.lora_B.*"]}}, {"strategy": {"name": "rolora", "rank": 2}}, "lora_A.weight"),
        ({"policy": {"min_examples": 41}}, {}, "`min_examples` is 41"),
        ({"privacy": PRIVATE}, {}, "noise of 2 is added to every number; the federation admits 0"),
        ({"privacy": PRIVATE}, {"strategy": {"name": "flora", "rank": 2, "merge": True}}, "`privacy` allows"),
        ({}, {"admission": {"max_rows": 3}}, "training rows; the federation admits up to 3"),
    ],
)
def test_limits_that_do_not_go_together_fail(
    files: Files, site: dict[str, Any], federation: dict[str, Any], found: str
) -> None:
    assert look("limits", files.subject()).level == "ok"
    files.change("site", **site)
    files.change("federation", **federation)
    finding = look("limits", files.subject())
    assert (finding.level, found in finding.found) == ("FAIL", True), finding
    assert not (files.site.parent / "site-a-ledger.jsonl").exists()


# The whole command


def test_sound_site_is_ready(files: Files, monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    assert main(monkeypatch, files.site, "--federation", files.federation) == 0
    lines = output()[0].splitlines()
    assert [line[9:26].strip() for line in lines[:-1]] == list(check.all_checks())
    assert not [line for line in lines if line.startswith(("warning", "FAIL"))]
    assert "40 rows with prompt (term) and answer (title)" in lines[2]
    assert lines[-1] == "site-a is ready to join: 0 failed, 0 warning(s)"


def test_site_file_alone_is_enough_for_what_concerns_the_site(
    files: Files, monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    files.change("site", model="model")
    assert main(monkeypatch, files.site, "--json") == 0
    told = json.loads(output()[0])
    levels = {line["check"]: line["level"] for line in told["checks"]}
    assert told["ready"] is True
    assert {levels[name] for name in ("shard", "held out", "model family", "digests", "row lengths")} == {"ok"}
    assert levels["memory"] == levels["traffic"] == levels["selection"] == "skipped"


def test_failure_is_told_once_and_ends_with_1(files: Files, monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    (files.site.parent / "site-a.jsonl").unlink()
    assert main(monkeypatch, files.site, "--federation", files.federation, "--json") == 1
    told = json.loads(output()[0])
    lines = {line["check"]: line for line in told["checks"]}
    assert told["ready"] is False
    assert "does not exist" in lines["shard"]["found"]
    assert lines["duplicates"] == {"check": "duplicates", "level": "skipped", "found": "see above", "mend": ""}
    assert [name for name, line in lines.items() if line["level"] == "FAIL"] == ["shard"]


@pytest.mark.parametrize("file", ["site", "federation"])
def test_wrong_file_ends_with_2(files: Files, file: str, monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    files.change(file, colour="red")
    assert main(monkeypatch, files.site, "--federation", files.federation) == 2
    out, err = output()
    assert out == ""
    assert "unknown key `colour`" in err


def test_command_line_that_makes_no_sense_ends_with_2(
    files: Files, monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    assert main(monkeypatch, files.site, "--superlink", "127.0.0.1:1") == 2
    assert output()[1] == "error: --superlink needs --root-certificates\n"


def test_unexpected_error_is_told_without_its_text(files: Files) -> None:
    def broken(subject: CheckContext) -> Finding:
        raise ValueError(subject.rows[0].prompt)

    (_, finding), *_ = check.findings({"broken": check.Check(broken, "try again")}, files.subject())
    assert finding.level == "FAIL"
    assert finding.found.startswith("ValueError at test_check.py:")
    assert MARKER not in f"{finding}"


def test_what_a_stranger_wrote_commands_no_terminal(files: Files) -> None:
    odd = check.Check(lambda _: Finding("ok", "CN=\x1b[2Jserver\n"), "")
    assert list(check.findings({"odd": odd}, files.subject())) == [("odd", Finding("ok", "CN=?[2Jserver?", ""))]


# The machine


def test_device_that_is_not_there_fails(files: Files) -> None:
    files.change("site", device="cuda:7")
    finding = look("device", files.subject())
    assert finding.level == "FAIL"
    assert "device cuda:7 is asked for; this machine has" in finding.found
    assert "correct `device`" in finding.mend


def test_more_devices_than_a_step_has_rows_fail(files: Files) -> None:
    files.change("site", devices=99)
    finding = look("device", files.subject())
    assert finding.level == "FAIL"
    assert "`devices` is 99, but the federation's steps have" in finding.found
    assert "correct `device`" in finding.mend


def test_memory_of_several_processes_on_the_cpu_is_their_sum(files: Files) -> None:
    one = look("memory", files.subject()).found
    files.change("site", devices=2)
    two = look("memory", files.subject()).found
    assert "row(s)" in one
    assert one != two
    assert look("device", files.subject()).found.startswith("2 x cpu, ")


def test_precision_that_the_device_lacks_fails(files: Files) -> None:
    files.change("site", precision="float16")
    finding = look("device", files.subject())
    assert (finding.level, "float16 needs a CUDA device" in finding.found) == ("FAIL", True)


def test_missing_gpu_is_a_warning_where_none_was_asked_for(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files.change("site", device="auto")
    finding = look("device", files.subject())
    assert finding.level == "warning"
    assert "`device: cpu`" in finding.mend


@pytest.mark.parametrize(("free", "level"), [(10**8, "FAIL"), (10**9, "warning"), (10**10, "ok")])
def test_disk_that_is_nearly_full(files: Files, free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    finding = look("disk", files.subject())
    assert finding.level == level
    assert ("free at least 2.0 GB" in finding.mend) == (level != "ok")


def test_folder_that_cannot_be_written_fails(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/proc/flwr")
    finding = look("disk", files.subject())
    assert finding.level == "FAIL"
    assert "/proc cannot be written" in finding.found
    assert "FLWR_HOME" in finding.mend


def test_too_little_memory_names_the_batch_that_fits(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.change("federation", training={"batch_size": 16})
    subject = files.subject()
    host = memory.host_bytes(subject.tuned, subject.settings.strategy, 0, 0) + 10**5
    peaks = [memory.estimate(subject.tuned, subject.settings, subject.largest(n), 3, None).total for n in (6, 16)]
    assert peaks[0] + 10**6 < peaks[1]
    monkeypatch.setattr(machine, "_free_host", lambda: peaks[0] + host)
    finding = look("memory", files.subject())
    assert finding.level == "FAIL"
    fit = int(finding.mend.removeprefix("write `max_batch_size: ").removesuffix("`"))
    assert 6 <= fit < 16
    files.change("site", max_batch_size=fit)
    assert look("memory", files.subject()).level == "ok"
    files.change("site", max_batch_size=fit + 1)
    assert look("memory", files.subject()).level == "FAIL"
    monkeypatch.setattr(machine, "_free_host", lambda: 10**6)
    assert "not even one row fits" in look("memory", files.subject()).mend


# The shard


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"term": MARKER}, "no column 'title'; columns: term"),
        ({"term": MARKER, "title": " "}, "row 1: column 'title' is empty"),
    ],
)
def test_shard_that_cannot_be_read_fails(files: Files, row: dict[str, str], found: str) -> None:
    write(files.site.parent, [row])
    finding = look("shard", files.subject())
    assert finding.level == "FAIL"
    assert found in finding.found
    assert "`data` in the site file" in finding.mend


def test_copies_are_named_by_their_number(files: Files) -> None:
    rows = [{"term": f"{MARKER} {i % 37}", "title": "x"} for i in range(40)]
    write(files.site.parent, rows)
    finding = look("duplicates", files.subject())
    assert finding.level == "warning"
    assert finding.found == "3 of 40 rows repeat an earlier one: row 38, 39, 40"
    assert "take them out" in finding.mend


def test_held_out_rows_are_counted_and_must_leave_some(files: Files) -> None:
    train, kept = files.subject().split
    assert look("held out", files.subject()).found == f"{len(train)} rows to train on, {len(kept)} held out"
    files.change("site", data={"held_out": 0.000001})
    assert "will not evaluate" in look("held out", files.subject()).found
    files.change("site", data={"held_out": 0.25}, policy={"min_held_out": len(kept) + 1})
    assert (
        f"fewer than `policy.min_held_out` {len(kept) + 1}: no scores leave" in look("held out", files.subject()).found
    )
    files.change("site", policy={"min_rows_per_update": 13})
    finding = look("held out", files.subject())
    assert (finding.level, "a round trains on 12, fewer than" in finding.found) == ("FAIL", True)
    files.change("site", data={"held_out": 0.999999})
    finding = look("held out", files.subject())
    assert (finding.level, "leaves none" in finding.found) == ("FAIL", True)
    assert "lower `data.held_out`" in finding.mend


def test_rows_that_will_be_cut_are_counted(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"term": f"{MARKER} {'long ' * 30 * (i % 2)}", "title": f"{i}"} for i in range(40)]
    write(files.site.parent, rows)
    subject = files.subject()
    counts = sorted(len(e.input_ids) for e in subject.examples)
    finding = look("row lengths", subject)
    assert finding.level == "warning"
    assert finding.found.startswith(f"{counts[0]} to {counts[-1]} tokens a row")
    share = sum(count > 64 for count in counts) / len(counts)
    assert 0.2 < share < 0.8
    assert f"{share:.1%} are longer than max_length 64" in finding.found
    assert "`training.max_length:" in finding.mend
    monkeypatch.setattr("client.preflight.context.MOST_ROWS", 10)
    assert len(files.subject().examples) <= 10


# The model


def test_weights_that_are_cut_off_fail(files: Files) -> None:
    file = files.site.parent / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    finding = look("model files", files.subject())
    assert finding.level == "FAIL"
    assert finding.found.endswith("model.safetensors is damaged or cut off")
    assert "fetch the model folder again" in finding.mend


def test_weight_file_that_the_index_names_is_missed(files: Files) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (files.site.parent / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = look("model files", files.subject())
    assert (finding.level, "model-00001-of-00002.safetensors does not exist" in finding.found) == ("FAIL", True)


def test_folder_without_a_model_fails(files: Files) -> None:
    files.change("site", model="nowhere")
    finding = look("digests", files.subject())
    assert finding.level == "FAIL"
    assert "nowhere does not exist" in finding.found
    assert "correct `model` in the site file" in finding.mend


def test_cause_is_told_once_and_is_the_files_fault(files: Files) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (files.site.parent / "model" / "model.safetensors").write_text(pointer)
    found = dict(check.findings(check.all_checks(), files.subject()))
    failed = [name for name, finding in found.items() if finding.level == "FAIL"]
    assert failed == ["model files"]
    assert "is a Git-LFS pointer" in found["model files"].found
    assert not any("report this" in finding.mend for finding in found.values())


def test_digests_are_those_that_the_federation_compares(files: Files) -> None:
    from client.session import Session

    subject = files.subject()
    settings = subject.settings
    hello = Session(subject.site, subject.site_file, settings).hello()
    found = look("digests", subject).found
    assert f"model {hello.base_digest[:16]} " in found
    assert f"tokenizer {hello.tokenizer_digest[:16]};" in found


def test_selection_is_counted_and_must_match(files: Files) -> None:
    found = look("selection", files.subject()).found
    assert found == "fedftg trains 6 tensors, 9,216 parameters of 40,480 parameters"  # 2 blocks of 3 times 32 x 48
    files.change("federation", strategy={"name": "fedftg", "modules": ["up_projj"]})
    finding = look("selection", files.subject())
    assert (finding.level, "did you mean 'mlp.up_proj'?" in finding.found) == ("FAIL", True)
    files.change("federation", strategy={"name": "fedit", "rank": 8})
    files.change("site", max_rank=4)
    finding = look("selection", files.subject())
    assert (finding.level, "max_rank 4 is below" in finding.found) == ("FAIL", True)
    assert "`max_rank`" in finding.mend


def test_model_that_must_pack_rows_and_cannot_fails(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.change("federation", training={"packing": "on"})
    assert look("selection", files.subject()).level == "ok"
    monkeypatch.setattr("common.data.packing._probe", lambda *_: 0.4)  # as of a model with states that cross rows
    finding = look("selection", files.subject())
    assert (finding.level, "`training.packing` is on, but this llama model" in finding.found) == ("FAIL", True)


# Certificate and key


@pytest.mark.parametrize(
    ("start", "end", "level", "found"),
    [
        (-2, 400, "ok", "valid until"),
        (-2, 20, "warning", "in 19 days"),
        (-20, -2, "FAIL", "expired on"),
        (2, 20, "FAIL", "not valid before"),
    ],
)
def test_root_certificate_is_valid_for_a_while(
    files: Files, tmp_path: Path, start: int, end: int, level: str, found: str
) -> None:
    authority = Authority(tmp_path, start=start, end=end)
    finding = look("root certificate", files.subject(root_certificates=authority.file))
    assert finding.level == level
    assert found in finding.found
    assert level == "ok" or "ask the operator for a new certificate file" in finding.mend
    assert start < 0 or "clock" in finding.mend


def test_root_certificate_that_is_none_fails(files: Files, tmp_path: Path) -> None:
    for subject, found in (
        (files.subject(root_certificates=tmp_path / "ca.crt"), "cannot be read"),
        (files.subject(root_certificates=files.site), "no certificate in PEM form"),
    ):
        finding = look("root certificate", subject)
        assert (finding.level, found in finding.found) == ("FAIL", True)
        assert "ask the operator" in finding.mend


def key_file(folder: Path, *options: str) -> Path:
    """A new private key, by another program than ours."""
    file = folder / "key"
    file.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", *(options or ("-t", "ecdsa", "-b", "384", "-N", "")), "-f", str(file)]
    subprocess.run(command, check=True)
    return file


@needs("ssh-keygen")
def test_private_key_is_shown_by_its_fingerprint(files: Files, tmp_path: Path) -> None:
    file = key_file(tmp_path)
    finding = look("private key", files.subject(private_key=file))
    assert finding.level == "ok"
    shown = subprocess.run(["ssh-keygen", "-l", "-f", str(file)], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] in finding.found


@needs("ssh-keygen")
def test_private_key_that_others_may_read_fails(files: Files, tmp_path: Path) -> None:
    file = key_file(tmp_path)
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        finding = look("private key", files.subject(private_key=file))
        assert (finding.level, finding.mend) == ("FAIL", f"chmod 600 {file}")


def test_private_key_of_somebody_else_may_be_mounted_for_our_group(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "site")
    file = tmp_path / "site.key"
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    for mode, level in ((0o440, "ok"), (0o444, "FAIL")):
        file.chmod(mode)
        assert look("private key", files.subject(private_key=file)).level == level


@needs("ssh-keygen")
def test_private_key_that_cannot_be_used_fails(files: Files, tmp_path: Path) -> None:
    cases = [
        (("-t", "ed25519", "-N", ""), "another kind than ECDSA"),
        (("-t", "ecdsa", "-N", "secret"), "without a passphrase"),
        (("-t", "ecdsa", "-N", "", "-m", "PEM"), "OpenSSH's alone"),
    ]
    for options, found in cases:
        finding = look("private key", files.subject(private_key=key_file(tmp_path, *options)))
        assert (finding.level, found in finding.found) == ("FAIL", True)
        assert f"fedspan keys site {tmp_path / 'site-a'}" in finding.mend
    files.site.chmod(0o600)
    assert "no private key" in look("private key", files.subject(private_key=files.site)).found
    assert "cannot be read" in look("private key", files.subject(private_key=tmp_path / "none")).found
