"""Rendered jobs: of the run file alone, accepted by the schemas of whoever takes them, equal to the golden files.

Where a change of the files in tests/golden is meant, write them anew and read the difference:

    PEFTSCALE_RENEW_GOLDEN=1 pytest tests/unit/test_render.py; git diff tests/golden
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import commands
import jsonschema
import kubernetes_validate
import manifests
import pytest
import yaml

from peftscale import configio
from peftscale.jobs.render import Target

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
RUN_FILE = ROOT / "configs" / "cluster.yaml"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TARGETS = get_args(Target)
ON_VIRTUAL_MACHINES = ("ray-aws", "ray-gcp")
CRD = os.environ.get("PEFTSCALE_KUBERAY_CRD")


def rendered(target: str, *overrides: str, run_file: Path = RUN_FILE) -> str:
    """What the command prints."""
    without = ["cluster.deploy.secrets=[]"] if target in ON_VIRTUAL_MACHINES else []
    done = commands.run("render", run_file, *without, *overrides, "--target", target)
    assert done.code == 0, done.err
    return done.out


def refused(target: str, *overrides: str, run_file: Path = RUN_FILE) -> str:
    """The message with which the command refuses."""
    done = commands.run("render", run_file, *overrides, "--target", target)
    assert done.code == 2 and done.out == ""
    return done.err


def ray_job(*overrides: str) -> dict[str, Any]:
    """The last document of a KubeRay manifest."""
    *_, found = yaml.safe_load_all(rendered("kuberay", *overrides))
    return dict(found)


def check(target: str, text: str) -> None:
    """Raise where whoever takes the target would refuse the text."""
    match target:
        case "kuberay":
            manifests.check_kuberay(text)
        case "skypilot":
            manifests.check_skypilot(text)
            manifests.check_shell(yaml.safe_load(text)["run"])
        case "slurm" | "torchrun":
            manifests.check_shell(text)
        case _:
            manifests.check_launcher(text)
            manifests.check_shell(written_on_the_head(text, "run.sh"))


def written_on_the_head(cluster: str, name: str) -> str:
    """What a file on the head of a launched cluster holds."""
    command = next(line for line in yaml.safe_load(cluster)["head_setup_commands"] if line.endswith(name))
    return shlex.split(command)[2]


def run_file_in(target: str, text: str) -> str:
    """The run file that a job brings along."""
    match target:
        case "kuberay":
            return str(next(one for one in yaml.safe_load_all(text) if one["kind"] == "ConfigMap")["data"]["run.yaml"])
        case "ray-aws" | "ray-gcp":
            return written_on_the_head(text, "run.yaml")
        case "skypilot":
            text = yaml.safe_load(text)["run"]
    return text.partition("<<'END_OF_RUN_FILE'\n")[2].partition("\nEND_OF_RUN_FILE\n")[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_rendered_file_is_the_golden_one(target: str, tmp_path: Path) -> None:
    without = ["cluster.deploy.secrets=[]"] if target in ON_VIRTUAL_MACHINES else []
    done = commands.run("render", RUN_FILE, *without, "--target", target, "--out", tmp_path)
    assert done.code == 0 and done.out == "", done.err
    (made,) = tmp_path.iterdir()
    assert done.err.strip() == str(made)
    golden = GOLDEN / made.name
    # The fingerprint covers defaults too: it changes with every new key of run files, and nothing else does then.
    text, num_fingerprints = re.subn(r"(?<=settings )[0-9a-f]{12}\b", "f" * 12, made.read_text())
    assert num_fingerprints == 1
    if os.environ.get("PEFTSCALE_RENEW_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_a_rendered_file_would_be_accepted(target: str) -> None:
    check(target, rendered(target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_job_without_gpus_queue_and_claim_would_be_accepted(target: str, tmp_path: Path) -> None:
    run_file = yaml.safe_load(RUN_FILE.read_text())
    cluster, deploy = run_file["cluster"], run_file["cluster"]["deploy"]
    for key in ("queue", "gpu", "node_selector", "hours", "secrets"):
        del deploy[key]
    del deploy["shared"]["claim"], cluster["gpus_per_worker"]
    source = tmp_path / "run.yaml"
    source.write_text(yaml.safe_dump(run_file))
    done = commands.run("render", source, "--target", target)
    assert done.code == 0, done.err
    check(target, done.out)
    assert "nvidia" not in done.out and "H100" not in done.out and "GPU" not in done.out


@pytest.mark.skipif(not CRD, reason="PEFTSCALE_KUBERAY_CRD names no ray.io_rayjobs.yaml")
def test_kuberay_s_own_definition_accepts_the_job_and_refuses_unknown_keys() -> None:
    text = rendered("kuberay")
    manifests.check_kuberay(text, Path(CRD or ""))
    wrong = text.replace("volumeMounts:", "volumeMount:", 1)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="volumeMount"):
        manifests.check_kuberay(wrong, Path(CRD or ""))


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("kuberay", "shutdownAfterJobFinishes:", "shutdownAfterJobFinish:"),
        ("kuberay", "  suspend: true\n", ""),  # with a queue
        ("kuberay", "            volumeMounts:", "            volumeMount:"),
        ("kuberay", "mountPath: /dev/shm", "mountPaths: /dev/shm"),
        ("kuberay", "- name: shm\n            emptyDir", "- name: shn\n            emptyDir"),
        ("kuberay", "policyTypes:", "policyType:"),
        ("kuberay", "replicas: 2", "replicas: '2'"),
        ("skypilot", "num_nodes:", "num_node:"),
        ("skypilot", "accelerators:", "accelerator:"),
        ("skypilot", "HF_TOKEN: null", "HF_TOKEN: hf_abc"),
        ("ray-aws", "max_workers: 2\nidle", "max_worker: 2\nidle"),
        ("ray-gcp", "head_node_type: head", "head_node_type: heads"),
        ("ray-aws", "max_workers: 2\nidle", "max_workers: 1\nidle"),  # fewer than are wanted from the start
        ("slurm", 'ray symmetric-run --address "$head:6379"', 'ray symmetric-run --address "$heads:6379"'),
        ("torchrun", '"$run_file" "$@"', "$runfile $@"),
    ],
)
def test_a_wrong_manifest_is_caught(target: str, right: str, wrong: str) -> None:
    text = rendered(target)
    assert right in text
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError, subprocess.CalledProcessError, ValueError)
    ):
        check(target, text.replace(right, wrong, 1))


def test_counts_follow_from_the_workers_and_what_one_takes() -> None:
    more = ["cluster.workers=32", "cluster.cpus_per_worker=1.5"]
    (group,) = ray_job(*more)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    assert limits == {"cpu": "12", "memory": "512Gi", "nvidia.com/gpu": "8"}
    slurm = rendered("slurm", *more)
    for line in ("--nodes=4", "--cpus-per-task=12", "--mem=512G", "--gpus-per-node=H100:8"):
        assert f"#SBATCH {line}\n" in slurm
    assert "--min-nodes 4 " in slurm and "--num-cpus=12 --num-gpus=8 " in slurm
    sky = yaml.safe_load(rendered("skypilot", *more))
    assert (sky["num_nodes"], sky["resources"]["accelerators"], sky["resources"]["cpus"]) == (4, "H100:8", "12+")
    aws = yaml.safe_load(rendered("ray-aws", *more))
    assert aws["available_node_types"]["workers"]["min_workers"] == aws["max_workers"] == 4
    assert aws["available_node_types"]["workers"]["resources"] == {"CPU": 12, "GPU": 8}
    assert " --nnodes 4 " in rendered("torchrun", *more) and " --nproc-per-node 8 " in rendered("torchrun", *more)


def test_workers_that_do_not_fill_the_nodes_are_refused() -> None:
    assert "Take 16 or 24 workers" in refused("slurm", "cluster.workers=20")
    assert "say how many" in refused("torchrun", "cluster.workers=0", run_file=QUICKSTART)


def test_a_job_of_fewer_workers_than_a_node_holds_asks_for_these_alone() -> None:
    (group,) = ray_job("cluster.workers=4")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 1
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


@pytest.mark.parametrize("target", TARGETS)
def test_the_run_file_that_a_job_brings_along_is_the_same_run(target: str, tmp_path: Path) -> None:
    run_file = yaml.safe_load(RUN_FILE.read_text())
    run_file["task"] = {
        "name": "own",
        "hub": {"path": "data/set", "subset": "1e5"},
        "input": "~/ {{ text }} \\${HOME} 'on'\nVerdict: ü",
        "target": "{{ label }}",
        "labels": {"0": "no", "1": "1e-5"},
        "metrics": ["accuracy"],
    }
    prompt = {"kind": "prompt", "length": 5, "init": ["random", "vocabulary"]}
    run_file["adapters"] = {"a": {**prompt, "train": {"learning_rate": [3e-4, 0.3]}}}
    run_file["cluster"]["deploy"]["secrets"] = []
    source = tmp_path / "run.yaml"
    source.write_text(json.dumps(run_file))  # in which all text is quoted
    there = tmp_path / "there.yaml"
    there.write_text(run_file_in(target, rendered(target, "train.steps=7", run_file=source)))
    cfg = configio.load(there)
    assert cfg.train.steps == 7 and cfg.task.input.startswith("~/ {{ text }} ${HOME} 'on'\n")
    assert set(cfg.adapters) >= {"a-random-lr0.3", "a-vocabulary-lr0.0003"}
    assert configio.fingerprint(cfg) == configio.fingerprint(configio.load(source, ["train.steps=7"]))


def test_paths_are_those_of_the_shared_directory() -> None:
    shared = f"{{path: /mnt/p, claim: p, local: {ROOT}}}"
    deploy = f"cluster.deploy={{workers_per_node: 2, memory_gb_per_worker: 2, image: r/p:1, shared: {shared}}}"
    text = rendered("kuberay", deploy, run_file=QUICKSTART)
    run_file = yaml.safe_load(run_file_in("kuberay", text))
    assert run_file["base"]["model"] == "/mnt/p/configs/quickstart/base"
    assert run_file["task"]["files"]["train"] == "/mnt/p/configs/quickstart/reviews/train.jsonl"
    assert run_file["cluster"]["storage"] == "/mnt/p/runs"
    assert str(ROOT) not in text


def test_a_path_that_the_nodes_do_not_see_is_refused_by_its_key(tmp_path: Path) -> None:
    elsewhere = f"cluster.storage={tmp_path}"
    message = refused("skypilot", elsewhere)
    assert f"cluster.storage: the nodes do not see {tmp_path}. Put it under /mnt/peftscale" in message
    assert f"storage: {tmp_path}" in rendered("slurm", elsewhere)  # they see what this machine sees


@pytest.mark.parametrize(
    ("target", "key"),
    [("kuberay", "workers_per_node"), ("slurm", "workers_per_node"), ("skypilot", "workers_per_node")],
)
def test_a_missing_section_is_named(target: str, key: str) -> None:
    assert f"cluster.deploy.{key}: missing; --target {target} needs it." in refused(target, run_file=QUICKSTART)


@pytest.mark.parametrize(
    ("target", "key"),
    [("kuberay", "image"), ("kuberay", "shared"), ("skypilot", "gpu"), ("ray-aws", "aws"), ("ray-gcp", "gcp")],
)
def test_a_missing_key_is_named(target: str, key: str) -> None:
    without = ["cluster.deploy.secrets=[]"] if target in ON_VIRTUAL_MACHINES else []
    message = refused(target, f"cluster.deploy.{key}=null", *without)
    assert f"cluster.deploy.{key}: missing; --target {target} needs it." in message


@pytest.mark.parametrize("image", ["registry.example.com/peftscale", "peftscale:latest", "localhost:5000/peftscale"])
def test_an_image_that_may_be_another_tomorrow_is_refused(image: str) -> None:
    assert "a tag other than latest, or a digest" in refused("kuberay", f"cluster.deploy.image={image}")


def test_a_secret_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_5up3rs3cr3t")
    for target in ("kuberay", "slurm", "skypilot", "torchrun"):
        text = rendered(target)
        assert "HF_TOKEN" in text and "hf_5up3rs3cr3t" not in text
    assert "no place for HF_TOKEN" in refused("ray-gcp")
    message = refused("kuberay", "cluster.deploy.secrets=[HF_TOKEN=hf_5up3rs3cr3t]")
    assert "each must be VARIABLE=SECRET/KEY" in message and "hf_5up3rs3cr3t" not in message.partition("(override")[0]


def test_every_ray_that_is_started_asks_for_a_token() -> None:
    assert ray_job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "export RAY_AUTH_MODE=token\n" in rendered("slurm")
    sky = yaml.safe_load(rendered("skypilot"))
    assert "export RAY_AUTH_MODE=token\n" in sky["run"] and "RAY_AUTH_TOKEN" in sky["secrets"]
    for target in ON_VIRTUAL_MACHINES:
        cluster = yaml.safe_load(rendered(target))
        assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
        assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]


def test_pods_are_reached_by_each_other_the_operator_and_prometheus_alone() -> None:
    policy, _, job = yaml.safe_load_all(rendered("kuberay"))
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert all(template["metadata"]["labels"] == labels for template in manifests.pod_templates(job))
    among, *outside = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert [rule["ports"][0]["port"] for rule in outside] == [8265, 8080]
    # What KubeRay calls every pod of every Ray cluster, and what it calls its operator.
    ray_pod = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
    operator = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
    let_in = [rule["from"][0]["podSelector"]["matchLabels"] for rule in outside]
    assert not any(wanted.items() <= ray_pod.items() for wanted in let_in)
    assert let_in[0].items() <= operator.items()


def test_a_job_is_ended_after_its_hours() -> None:
    half = "cluster.deploy.hours=0.5"
    assert ray_job(half)["spec"]["activeDeadlineSeconds"] == 1800
    assert "#SBATCH --time=30\n" in rendered("slurm", half)
    assert "#SBATCH --time=1\n" in rendered("slurm", "cluster.deploy.hours=0.001")  # 0 would be no limit
    for target in ("skypilot", "torchrun", "ray-aws", "ray-gcp"):
        assert "timeout --foreground --signal=INT --kill-after=60 1800 " in rendered(target, half)
        assert "timeout --" not in rendered(target, "cluster.deploy.hours=null")


def test_a_job_of_a_queue_waits_for_it() -> None:
    assert ray_job()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert ray_job()["spec"]["suspend"] is True
    free = ray_job("cluster.deploy.queue=null")
    assert "kueue.x-k8s.io/queue-name" not in free["metadata"]["labels"] and "suspend" not in free["spec"]


def test_a_name_becomes_one_that_kubernetes_takes() -> None:
    assert ray_job("name=Run_7.b")["metadata"]["name"] == "run-7-b"
    for target in TARGETS:
        check(target, rendered(target, "name=70b-boolq"))
    assert ray_job("name=70b-boolq")["metadata"]["name"] == "run-70b-boolq"
    assert "sky launch -c run-70b-boolq " in rendered("skypilot", "name=70b-boolq")
    assert "KubeRay takes up to 47 characters, got 60" in refused("kuberay", f"name={'a' * 60}")


def test_prometheus_finds_the_pods_of_every_run() -> None:
    monitor = yaml.safe_load((ROOT / "cluster" / "monitoring" / "pod-monitor.yaml").read_text())
    (wanted,) = monitor["spec"]["selector"]["matchExpressions"]
    _, head, worker = manifests.pod_templates(ray_job())
    assert wanted["operator"] == "Exists"
    assert wanted["key"] in head["metadata"]["labels"] and wanted["key"] in worker["metadata"]["labels"]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]  # KubeRay adds it


def test_the_image_has_the_user_that_pods_run_as() -> None:
    dockerfile = (ROOT / "cluster" / "docker" / "Dockerfile").read_text()
    _, head, _ = manifests.pod_templates(ray_job())
    assert f"--uid {head['spec']['securityContext']['runAsUser']} " in dockerfile
    assert "latest" not in dockerfile


def test_the_run_file_on_a_launched_head_holds_no_tilde(tmp_path: Path) -> None:
    # Ray replaces it by the home directory wherever it stands in a command.
    text = written_on_the_head(rendered("ray-aws", "task.cue=~/x"), "run.yaml")
    assert "~" not in text and json.loads(text)["task"]["cue"] == "~/x"
