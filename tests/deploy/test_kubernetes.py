"""The Kubernetes manifests: valid to the letter, restricted, and with commands that the programs understand."""

import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from common.system.keys import make_site, read_private
from tests.harness.manifests import ROOT, paths, read, understood, within

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ["1.34", "1.37"]  # the oldest that is supported by its makers today, and the newest
FILL = read(FOLDER / "fill.yaml")[0]
RESOURCES = [
    (file.parent.name, data) for file in sorted(FOLDER.glob("*/*.yaml")) for data in read(file) if "spec" in data
]
PODS = [
    pytest.param(data["spec"]["template"]["spec"], folder, id=folder)
    for folder, data in RESOURCES
    if data["kind"] in ("Deployment", "Job")
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("folder", "data"), [pytest.param(f, d, id=f"{f}-{d['kind']}") for f, d in [*RESOURCES, ("", FILL)]]
)
def test_manifest_is_valid(folder: str, data: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(data, version, strict=True)


def test_the_check_sees_a_misspelled_key() -> None:
    data = read(FOLDER / "server" / "service.yaml")[0]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**data, "spec": {**data["spec"], "ports_": []}}, VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", ["server", "site"])
def test_kustomization_lists_every_manifest_and_every_file_of_it_exists(folder: str) -> None:
    (listed,) = read(FOLDER / folder / "kustomization.yaml")
    generated = [name for maker in listed["configMapGenerator"] for name in maker["files"]]
    files = {file.name for file in (FOLDER / folder).iterdir()} - {"kustomization.yaml"}
    assert set(listed["resources"]) | set(generated) == files
    images = {image["name"] for image in listed["images"]}
    (used,) = [c["image"] for p in PODS if p.values[1] == folder for c in p.values[0]["containers"]]
    assert images == {used}


@pytest.mark.parametrize(("pod", "folder"), [*PODS, pytest.param(FILL["spec"], "fill", id="fill")])
def test_pod_keeps_the_restricted_profile(pod: dict[str, Any], folder: str) -> None:
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert "runAsUser" not in pod["securityContext"]  # any will do
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {"configMap", "secret", "persistentVolumeClaim", "emptyDir"} >= {k for v in pod["volumes"] for k in v} - {
        "name"
    }


@pytest.mark.parametrize(("pod", "folder"), [*PODS, pytest.param(FILL["spec"], "fill", id="fill")])
def test_pod_has_limits_of_memory_and_of_the_nodes_disk(pod: dict[str, Any], folder: str) -> None:
    (container,) = pod["containers"]
    assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
    assert all(volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume)


@pytest.mark.parametrize(("pod", "folder"), PODS)
def test_what_the_container_names_is_mounted_and_its_commands_are_understood(pod: dict[str, Any], folder: str) -> None:
    (container,) = pod["containers"]
    probes = [container[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness", "liveness")]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for command in (container["args"], *(probe[3:] for probe in probes)):
        understood(command)
        assert all(within(path, list(mounts)) for path in paths(command)), command
    written = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert written == {"/tmp", "/runs" if folder == "server" else "/var/lib/fedspan"}  # noqa: S108
    assert {m["name"] for m in mounts.values()} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize(
    ("file", "section"), [("server/federation.yaml", FederationConfig), ("site/site.yaml", SiteConfig)]
)
def test_example_files_are_read_and_their_places_are_mounted(file: str, section: Any) -> None:
    load(FOLDER / file, section)
    pods = {param.values[1]: param.values[0] for param in PODS}
    mounts = [m["mountPath"] for m in pods[Path(file).parent.name]["containers"][0]["volumeMounts"]]
    named = [v for v in _strings(yaml.safe_load((FOLDER / file).read_text())) if v.startswith("/")]
    assert len(named) >= 2
    assert all(within(path, mounts) for path in named)


def test_site_may_take_part_in_the_federation_of_the_server() -> None:
    federation = load(FOLDER / "server" / "federation.yaml", FederationConfig)
    assert (FOLDER / "site" / "federation.yaml").read_text() == (FOLDER / "server" / "federation.yaml").read_text()
    assert load(FOLDER / "site" / "site.yaml", SiteConfig).policy.federations == [federation.name]


def test_claims_that_are_filled_are_those_that_the_pods_read() -> None:
    claims = {
        param.values[1]: {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in param.values[0]["volumes"]
            if volume.get("persistentVolumeClaim", {}).get("readOnly")
        }
        for param in PODS
    }
    filled = [volume["persistentVolumeClaim"]["claimName"] for volume in FILL["spec"]["volumes"]]
    assert filled == list(claims["site"].values())
    assert claims["server"]["data"] in (FOLDER / "fill.yaml").read_text()  # said beside the site's
    assert claims["server"]["model"] == claims["site"]["model"]


def test_site_lets_nobody_in_and_the_server_goes_nowhere() -> None:
    policies = {folder: data["spec"] for folder, data in RESOURCES if data["kind"] == "NetworkPolicy"}
    assert all(set(spec["policyTypes"]) == {"Ingress", "Egress"} for spec in policies.values())
    assert policies["site"]["ingress"] == []
    assert policies["server"]["egress"] == []
    assert [rule["ports"] for rule in policies["server"]["ingress"]] == [[{"port": 9092, "protocol": "TCP"}]]
    for folder, data in RESOURCES:
        if data["kind"] in ("Deployment", "Job"):
            labels = data["spec"]["template"]["metadata"]["labels"]
            assert labels == policies[folder]["podSelector"]["matchLabels"]


def test_site_has_one_gpu() -> None:
    (pod,) = [param.values[0] for param in PODS if param.values[1] == "site"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_key_from_a_secret_belongs_to_root_and_is_read_through_the_pods_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "site")
    (tmp_path / "site.key").chmod(0o440)
    with pytest.raises(ConfigError, match="can be read by others"):
        read_private(tmp_path / "site.key")
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    read_private(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(0o444)
    with pytest.raises(ConfigError, match="can be read by others"):
        read_private(tmp_path / "site.key")


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in _strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []
