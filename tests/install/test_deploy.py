"""Manifests and images agree with each other and with the command line. No engine is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cli.main import _parser
from wire.sizes import parse_size

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
USER = 7420


def documents() -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    return [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
    ]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] in kinds]


WORKLOADS = of_kind("Deployment", "DaemonSet")


def name_of(document: dict[str, Any]) -> str:
    return str(document["metadata"]["name"])


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def test_every_manifest_is_listed_and_in_the_namespace() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert set(kustomization["resources"]) == files - {"kustomization.yaml"}
    for document in documents():
        namespace = document["metadata"].get("namespace", document["metadata"]["name"])
        assert namespace == kustomization["namespace"] == "shoal"


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_a_manifest_follows_the_schema(document: dict[str, Any]) -> None:
    """Of the newest Kubernetes that the package knows, without unknown keys; nothing is fetched."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_a_pod_runs_without_rights_and_finds_what_it_names(workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    pod = pod_of(workload)
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["runAsNonRoot"]
    (config,) = of_kind("ConfigMap")
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"]["drop"] == ["ALL"]
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        given = {variable["name"] for variable in container.get("env", ())}
        assert set(re.findall(r"\$\((\w+)\)", str(container.get("args", "")))) <= given
        for variable in container.get("env", ()):
            reference = variable["valueFrom"].get("configMapKeyRef")
            assert reference is None or reference["key"] in config["data"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_a_pod_starts_a_command_that_exists(workload: dict[str, Any]) -> None:
    (container,) = pod_of(workload)["containers"]
    (config,) = of_kind("ConfigMap")
    values = {"NODE_NAME": "pi-1"}
    for variable in container["env"]:
        reference = variable["valueFrom"].get("configMapKeyRef")
        if reference is not None:
            values[variable["name"]] = config["data"][reference["key"]]
    kind = workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
    arguments = [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], a) for a in container["args"]]
    options = _parser().parse_args([kind, *arguments])
    if kind == "agent":
        # What is left is for the agent itself.
        limit_bytes = parse_size(container["resources"]["limits"]["memory"].replace("i", "iB"))
        assert options.memory + (512 << 20) <= limit_bytes


def test_a_service_leads_to_the_coordinator() -> None:
    (service,) = of_kind("Service")
    (deployment,) = of_kind("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    named = {p["name"]: p["containerPort"] for p in pod_of(deployment)["containers"][0]["ports"]}
    ports = {port["port"]: named[port["targetPort"]] for port in service["spec"]["ports"]}
    assert ports == {7420: 7420, 7421: 7421}
    (config,) = of_kind("ConfigMap")
    assert config["data"]["coordinator"] == f"{name_of(service)}:7420"
    for policy in of_kind("NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_image_is_built_from_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY ([\w.]+)/ \1/$", text, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    packages = set(re.findall(r'"(\w+)"', project.partition("root_packages = ")[2].split("]")[0]))
    assert copied == packages | {"requirements", "systemd"}
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert all(f"!{name}/\n" in ignored for name in copied)
    for lock in re.findall(r"requirements/[\w.]+", text):
        assert (ROOT / lock).exists()
    assert f"USER {USER}:{USER}" in text
    assert "HEALTHCHECK" in text


def health_checks() -> list[list[str]]:
    """The command of the image, and those of all workloads."""
    (of_image,) = re.findall(
        r"^HEALTHCHECK .*\\\n +CMD (.*)$", DOCKERFILE.read_text(), re.MULTILINE
    )
    probes = [pod_of(workload)["containers"][0]["livenessProbe"] for workload in WORKLOADS]
    return [json.loads(of_image), *(probe["exec"]["command"] for probe in probes)]


@pytest.mark.parametrize("command", health_checks())
def test_a_hung_process_is_not_alive_because_the_clock_was_set_back(
    command: list[str], tmp_path: Path
) -> None:
    """The file's time is then in the future. A process that works touches it again at once."""
    file = tmp_path / "alive"
    for age_s, code in ((5, 0), (100, 1), (-3600, 1)):
        file.touch()
        os.utime(file, (time.time() - age_s, time.time() - age_s))
        environment = {**os.environ, "SHOAL_ALIVE_FILE": str(file)}
        assert subprocess.run(command, env=environment, check=False).returncode == code
    file.unlink()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode
