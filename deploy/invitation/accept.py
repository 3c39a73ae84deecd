"""Accept an invitation: ``fedspan site accept ARCHIVE`` checks it, lays it out, and says what is left to do."""

import argparse
import hashlib
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError, FedSpanError
from common.system.command import Command
from common.system.files import keep_private, make_private
from common.system.keys import (
    fingerprint,
    make_site,
    may_be_in_git,
    read_certificates,
    read_private,
    read_public,
    read_signature,
    refuse_existing,
    refuse_git,
    write_new,
)
from deploy.invitation import archive
from deploy.invitation.site_file import FILL_IN, proposed, site_file


def checked(path: Path, own: Mapping[str, Any]) -> tuple[archive.Manifest, dict[str, bytes]]:
    """The manifest of an archive and its files, each of which is what its name says; the site file with our own values.

    Args:
        path: the archive.
        own: see ``site_file``.

    Raises:
        ConfigError: names the archive, and what is wrong in it.
    """
    from common.config.federation import FederationConfig
    from common.config.load import load

    manifest, files = archive.unpack(path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        try:
            read_certificates(folder / archive.CA)
            federation = load(folder / archive.FEDERATION, FederationConfig)
            site = proposed(folder / archive.SITE)
            if archive.REVIEWER in files:
                read_public(folder / archive.REVIEWER)
            if archive.SIGNATURE in files:
                read_signature(folder / archive.SIGNATURE)
        except FedSpanError as error:
            raise ConfigError(f"{path}: {str(error).replace(f'{folder}/', '')}") from None
    if (site.name, federation.name) != (manifest.site, manifest.federation):
        raise ConfigError(f"{path}: its files are for {site.name} in {federation.name}, the manifest says otherwise")
    if federation.local is not None or federation.model.path is not None or federation.evaluation.server is not None:
        raise ConfigError(f"{path}: {archive.FEDERATION} names files of the operator's own machine")
    trust = {"keys": [archive.REVIEWER]} if archive.REVIEWER in files else None
    theirs = {key: value for key in ("prompt", "answer") if (value := getattr(site.data, key)) != FILL_IN}
    values = {**theirs, **{key: value for key, value in own.items() if value}, "trust": trust}
    return manifest, {**files, archive.SITE: site_file(site.name, federation, values).encode()}


def lay_out(folder: Path, manifest: archive.Manifest, files: Mapping[str, bytes]) -> str:
    """Write the files and, where there is none yet, the site's pair of keys; the fingerprint of that.

    Raises:
        ConfigError: a file exists, or cannot be written.
    """
    refuse_existing(*(folder / name for name in (archive.MANIFEST, *files)))
    prefix, key = folder / manifest.site, folder / f"{manifest.site}.key"
    mark = fingerprint(read_private(key).public_key()) if key.exists() else None
    try:
        make_private(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror})") from None
    write_new(folder / archive.MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode(), 0o600)
    for name, content in files.items():
        write_new(folder / name, content, 0o600)
    return mark or make_site(prefix)


def left_to_do(folder: Path, manifest: archive.Manifest, files: Mapping[str, bytes]) -> list[str]:
    """Commands and remarks, in order, for whoever pastes them into a shell."""
    site, server = manifest.site, shlex.quote(manifest.superlink)
    link = f"--superlink {server} --root-certificates {archive.CA} --auth-supernode-private-key {site}.key"
    lines = [f"cd {shlex.quote(str(folder.resolve()))}"]
    if FILL_IN.encode() in b"\n".join(line for line in files[archive.SITE].splitlines() if line[:1] != b"#"):
        lines += [f"${{EDITOR:-vi}} {archive.SITE}    # fill in what says {FILL_IN}"]
    signature = f" --signature {archive.SIGNATURE}" if archive.SIGNATURE in files else ""
    if (yaml.safe_load(files[archive.FEDERATION]) or {}).get("secure_aggregation"):
        lines += ["# add --peer FILE.pub to the next line for every other site, whose key you compare with its people"]
    lines += [f"fedspan site agree {archive.FEDERATION} --site {archive.SITE}{signature}"]
    lines += [f"fedspan site check {archive.SITE} --federation {archive.FEDERATION} {link}"]
    lines += [f"# send {site}.pub to the operator, who runs: fedspan sites add sites.json {site} {site}.pub"]
    return [*lines, f"fedspan site join {archive.SITE} {link} --status status.json"]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="that the operator has sent")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where it is laid out (default: FEDERATION-SITE)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="for the site file: your rows")
    parser.add_argument("--prompt", help="for the site file: column, or template of columns, of the prompt")
    parser.add_argument("--answer", help="likewise of the answer")
    parser.add_argument("--model", type=Path, metavar="DIR", help="for the site file: your copy of the base model")
    may_be_in_git(parser)


def _run(options: argparse.Namespace) -> None:
    for path in filter(None, (options.data, options.model)):
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
    own = {"path": options.data and str(options.data.resolve()), "prompt": options.prompt, "answer": options.answer}
    own["model"] = options.model and str(options.model.resolve())
    manifest, files = checked(options.archive, own)
    folder: Path = options.to or Path(f"{manifest.federation}-{manifest.site}")
    refuse_git(folder, options)
    keep_private()
    mark = lay_out(folder, manifest, files)
    digest = hashlib.sha256(options.archive.read_bytes()).hexdigest()
    print(  # noqa: T201
        f"{folder}: {manifest.site} in federation {manifest.federation}, server {manifest.superlink}\n"
        f"SHA-256 of the archive {digest}: is it what the operator was shown?\n"
        f"fingerprint of {manifest.site}.pub {mark}; {manifest.site}.key is secret and stays here\n\n"
        "left to do, in this order:\n"
    )
    print("\n".join(f"    {line}" for line in left_to_do(folder, manifest, files)))  # noqa: T201


ACCEPT = Command(
    _arguments,
    _run,
    example="coding-site-a.zip --data rows.jsonl --model models/smollm2",
    then="the commands that it prints: site agree, site check, site join",
    notes="Nothing is overwritten. The site's pair of keys is made in the folder, unless it is there.",
)
