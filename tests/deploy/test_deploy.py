"""The image and the manifests: no rights, a read-only root, pinned versions, and commands that the parsers take."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from tests.train.test_pretrain import CPU, ROOT
from tools.make_shards import Command
from train.config.recipes import parse_config
from train.storage.run_folder import SUMMARY_FILE

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
AS_USER = "setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --bounding-set=-all"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile; lines that end in a backslash are joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def test_the_image_has_a_pinned_base_and_no_rights() -> None:
    found = instructions()
    known = {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in found} <= known
    assert re.fullmatch(r"[a-z./-]+:\d+\.\d+\.\d+[a-z-]*", found[0][1])
    (user,) = [rest for word, rest in found if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    runs = [rest for word, rest in found if word == "RUN"]
    for run in runs:
        assert "sudo" not in run
        assert "apt-get" not in run or ("--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run)
        assert "pip install" not in run or "--no-cache-dir" in run
    assert found.index(("USER", user)) > max(found.index(("RUN", run)) for run in runs)


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="has no hadolint")
def test_the_linter_of_dockerfiles_finds_nothing(tmp_path: Path) -> None:
    hadolint = [str(Path(sys.executable).with_name("hadolint")), "--no-color", "--failure-threshold", "style"]
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    ignored = [number for number, line in enumerate(lines) if line.startswith("# hadolint ignore=")]
    assert all(lines[number - 1].startswith("# ") for number in ignored), "an exception has its reason above it"
    found = subprocess.run([*hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /src && sudo true\nRUN pip install torch\n")
    found = subprocess.run([*hadolint, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert {"DL3003", "DL3004", "DL3007", "DL3013"} <= set(re.findall(r"DL\d+", found.stdout))


def environment() -> dict[str, str]:
    (text,) = [rest for word, rest in instructions() if word == "ENV"]
    return dict(word.split("=", 1) for word in text.split())


def test_what_is_written_lies_under_tmp() -> None:
    folders = {name: value for name, value in environment().items() if name.endswith(("DIR", "HOME"))}
    assert {"HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"} <= set(folders)
    assert all(value == "/tmp" or value.startswith("/tmp/") for value in folders.values())


def jobs() -> list[Any]:
    documents = [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]
    return [document for document in documents if document["kind"] == "Job"]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job["metadata"]["name"])
def test_pods_have_no_rights_and_a_read_only_root(job: Any) -> None:
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"]
    assert (
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == dict(instructions())["USER"]
    )
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
        assert rights["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == volumes
        assert "/tmp" in mounts.values()
        assert not container["image"].endswith(":latest")
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_the_training_pods_meet_at_pod_0() -> None:
    service, job = list(yaml.safe_load_all((DEPLOY / "kubernetes-pretrain.yaml").read_text()))
    name = job["metadata"]["name"]
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": name})
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:29400" in arguments
    assert f"--nnodes=1:{job['spec']['completions']}" in arguments
    config = parse_config(arguments[arguments.index("pretrain") + 1 :])
    assert config.resume


def test_the_indexing_pods_have_a_part_each() -> None:
    (job,) = [job for job in jobs() if job["metadata"]["name"] == "siamstream-index"]
    verb, *arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert verb == "shard"
    count = job["spec"]["completions"]
    for number in (0, count - 1):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(number)) for word in arguments]
        command = tyro.cli(Command, args=words, config=(tyro.conf.FlagCreatePairsOff,))
        assert command.sharding.part_of() == (number, count)


def test_the_ray_job_shards_on_its_own_cluster() -> None:
    (job,) = yaml.safe_load_all((DEPLOY / "kuberay-shard.yaml").read_text())
    assert job["kind"] == "RayJob"
    name, verb, *words = shlex.split(job["spec"]["entrypoint"])
    assert (name, verb) == ("siamstream", "shard")
    command = tyro.cli(Command, args=words, config=(tyro.conf.FlagCreatePairsOff,))
    assert command.engine.engine == "ray"
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def may_mount() -> bool:
    """Whether this is root, and others can read the checkout and Python when /tmp is empty."""
    tools = [shutil.which(name) is not None for name in ("unshare", "setpriv")]
    if not sys.platform.startswith("linux") or not all(tools) or os.geteuid() != 0:
        return False
    python = f"{sys.executable} -c 'import decimal; open(\"{ROOT}/setup.py\")'"
    script = f"mount -t tmpfs tmpfs /tmp && cd / && exec {AS_USER} {python}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.faults
@pytest.mark.skipif(not may_mount(), reason="needs root, to make a mount namespace")
def test_it_trains_without_rights_on_a_read_only_root(photo_dataset_path: Path, tmp_path: Path) -> None:
    """The container's conditions: user 1000, / read-only, /tmp empty, the image's environment."""
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 1000, 1000)
    script = f"""
        mount -t tmpfs tmpfs /mnt && mkdir /mnt/data /mnt/runs &&
        mount --bind {photo_dataset_path} /mnt/data && mount --bind {tmp_path}/runs /mnt/runs &&
        mount -t tmpfs -o mode=1777 tmpfs /tmp && mount -o remount,ro,bind / && cd /tmp &&
        ! touch {ROOT}/written 2>/dev/null && exec {AS_USER} "$@"
    """
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment()}
    flags = ["--data", "/mnt/data", "--run-dir", "/mnt/runs/run", "--epochs", "1", "--global-batch", "12", *CPU]
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "siamstream", "pretrain", *flags],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "run" / SUMMARY_FILE).exists()
    assert (tmp_path / "runs" / "run" / SUMMARY_FILE).stat().st_uid == 1000


def docker_runs() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    )


@pytest.mark.faults
@pytest.mark.skipif(not docker_runs(), reason="needs a Docker daemon")
def test_the_image_is_built_and_runs() -> None:
    build = ["docker", "build", "-q", "-f", "deploy/Dockerfile", "."]
    image = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    command = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp:exec", image, "pretrain", "--help"]
    assert "--run-dir" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
