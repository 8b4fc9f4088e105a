"""The compose files and the Kubernetes manifests: linted, checked against their schemas, and in agreement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm_export.cli import make_parser
from ldm_export.verbs import serve
from tests.support.dockerfile import ROOT, stages
from tests.support.kserve_types import MODELS, faults

DOCKER = ROOT / "docker"
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
KUBERNETES = [DOCKER / "kubernetes" / name for name in ("deployment.yaml", "autoscaling.yaml")]
BIN = Path(sys.executable).parent


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


def documents(name: str) -> dict[str, Any]:
    """The documents of a manifest, by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text())}


def test_yamllint_has_nothing_to_say() -> None:
    done = run(BIN / "yamllint", "--strict", "-c", DOCKER / ".yamllint", DOCKER)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_files_fit_their_schema(file: Path, tmp_path: Path) -> None:
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = run(*check, file)
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.yaml").write_text(file.read_text().replace("build:", "builds:"))
    assert run(*check, tmp_path / "bad.yaml").returncode == 1


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_manifests_fit_the_schemas_of_kubernetes(file: Path, tmp_path: Path) -> None:
    done = run(BIN / "kubernetes-validate", "--strict", "-k", "1.33", file)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "bad.yaml").write_text(file.read_text().replace("spec:\n", "spec:\n  replica: 2\n", 1))
    assert run(BIN / "kubernetes-validate", "--strict", tmp_path / "bad.yaml").returncode == 1


def test_kserve_manifests_fit_the_types_of_kserve_and_kubernetes(tmp_path: Path) -> None:
    assert MODELS.exists(), f"{MODELS} is missing: `make test` makes it"
    result = documents("kserve.yaml")
    for kind, name in (("ServingRuntime", "V1alpha1ServingRuntime"), ("InferenceService", "V1beta1InferenceService")):
        assert list(faults(result[kind], name, kind)) == []
    assert list(faults({"spec": {"predictor": {"minReplica": 1}}}, "V1beta1InferenceService", "")) != []
    runtime, predictor = result["ServingRuntime"]["spec"], result["InferenceService"]["spec"]["predictor"]
    containers = [{**runtime["containers"][0], "resources": predictor["model"]["resources"]}]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ldm"}}
    pod["spec"] = {"containers": containers, "volumes": runtime["volumes"]}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    done = run(BIN / "kubernetes-validate", "--strict", "-k", "1.33", tmp_path / "pod.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kserve_service_and_runtime_belong_together() -> None:
    result = documents("kserve.yaml")
    runtime, predictor = result["ServingRuntime"], result["InferenceService"]["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    formats = [{key: each[key] for key in ("name", "version")} for each in runtime["spec"]["supportedModelFormats"]]
    assert predictor["model"]["modelFormat"] in formats
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_the_same_server_is_started_everywhere() -> None:
    """With the options of the image, not as root, on a file system that is read only, and probed alike."""
    serve = stages()["serve"]
    options, health = serve.command("CMD"), serve.command("HEALTHCHECK")
    deployed = documents("deployment.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    runtime = documents("kserve.yaml")["ServingRuntime"]["spec"]["containers"][0]
    assert deployed["args"] == options
    assert runtime["args"] == [option.replace("=/models", "=/mnt/models") for option in options]
    for container in (deployed, runtime):
        assert container["livenessProbe"]["exec"]["command"] == health
        assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/dev/shm"}
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["serve"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_http_server_is_started_with_options_that_it_has() -> None:
    service = yaml.safe_load((DOCKER / "compose.http.yaml").read_text())["services"]["http"]
    args = make_parser().parse_args(service["command"])
    assert args.command is serve.run and args.host == "0.0.0.0"
    assert str(args.api_key_file) == f"/run/secrets/{service['secrets'][0]}"
    assert [str(bundle) for bundle in args.bundles] == [service["volumes"][0]["target"]]
    build = service["build"]
    assert build["target"] in stages() and (ROOT / f"requirements/{build['args']['EXTRA']}.txt").exists()
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > args.grace, "running requests get their time before the container is killed"


def test_selectors_find_the_pods_and_the_scaler_its_deployment() -> None:
    deployment, scaler = documents("deployment.yaml"), documents("autoscaling.yaml")["HorizontalPodAutoscaler"]
    labels = deployment["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert deployment["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert deployment["Service"]["spec"]["selector"] == labels
    assert deployment["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["Deployment"]["metadata"]["name"]
    assert scaler["spec"]["minReplicas"] > 1
    container = deployment["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in deployment["Service"]["spec"]["ports"]} <= ports
