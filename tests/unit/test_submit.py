"""What a job is handed, and which addresses it may be handed to. The cluster itself is tests/ray/test_submit.py."""

import subprocess
from pathlib import Path

import commands
import pytest
import yaml

from peftscale import configio, records
from peftscale.errors import ClusterError, ConfigError
from peftscale.jobs import submit

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHARED = (
    "cluster.deploy={workers_per_node: 2, memory_gb_per_worker: 1, shared: {path: /mnt/all, local: .., nfs: 'f:/x'}}"
)


def _refused(address: str) -> str:
    done = commands.run("submit", QUICKSTART, "--address", address)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    return done.err


def test_a_job_holds_the_whole_run_file_and_reads_back_to_the_same(tmp_path: Path) -> None:
    changes = ["train.steps=7", "name=other", "adapters.grades.length=[3, 5]"]
    run = submit.package(QUICKSTART, changes)
    (tmp_path / "run.yaml").write_text(run.files["run.yaml"])
    there = configio.load(tmp_path / "run.yaml")
    assert there == configio.load(QUICKSTART, changes)
    assert (run.name, run.digest, list(run.files)) == ("other", configio.fingerprint(there), ["run.yaml"])
    assert run.entrypoint == "exec peftscale train run.yaml --finish"


def test_paths_and_caches_are_those_of_the_nodes_where_they_share_a_directory() -> None:
    run = submit.package(QUICKSTART, [SHARED])
    raw = yaml.safe_load(run.files["run.yaml"])
    assert raw["base"]["model"] == "/mnt/all/configs/quickstart/base"
    assert raw["cluster"]["storage"] == "/mnt/all/runs" and "deploy" not in raw["cluster"]
    assert run.variables["HF_HOME"] == "/mnt/all/.cache/huggingface"
    with pytest.raises(ConfigError, match="cluster.storage: the nodes do not see /elsewhere"):
        submit.package(QUICKSTART, [SHARED, "cluster.storage=/elsewhere"])


def test_variables_on_the_list_are_passed_and_secrets_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in submit.PASSED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", 'it\'s "quoted" $HOME\nand more')
    monkeypatch.setenv("WANDB_API_KEY", "of-nobody-s-business")
    secrets = "cluster.deploy={workers_per_node: 2, memory_gb_per_worker: 1, secrets: [HF_TOKEN=hub/token]}"
    run = submit.package(QUICKSTART, [secrets])
    assert {name for name in run.variables if not name.startswith("RAY_JOB_STOP_")} == {
        "NCCL_DEBUG",
        "PEFTSCALE_SECRETS",
    }
    assert run.variables["PEFTSCALE_SECRETS"] == "HF_TOKEN"
    assert "HF_TOKEN" not in " ".join([run.files["run.yaml"], run.entrypoint, *run.metadata.values()])
    script = run.files["secrets.env"] + 'printf %s "$HF_TOKEN"'
    read = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={})
    assert read.stdout == 'it\'s "quoted" $HOME\nand more'
    assert "of-nobody-s-business" not in repr(run)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="cluster.deploy.secrets: HF_TOKEN must be set in this environment"):
        submit.package(QUICKSTART, [secrets])


def test_a_run_without_workers_is_no_job() -> None:
    with pytest.raises(ConfigError, match="cluster.workers: a job starts workers on its cluster, got 0"):
        submit.package(QUICKSTART, ["cluster.workers=0"])


def test_the_revision_is_that_of_the_run_file_and_says_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "run.yaml"
    file.write_text("name: x\n")
    assert records.revision(file) is None
    git("init")
    assert records.revision(file) is None  # git does not know it
    git("add", ".")
    git("commit", "-m", "x")
    clean = records.revision(file)
    assert clean is not None and len(clean) == 40
    file.write_text("name: y\n")
    assert records.revision(file) == f"{clean}-dirty"


@pytest.mark.parametrize("host", ["192.0.2.1", "ray.example.com", "0.0.0.0", "[2001:db8::1]", "127.0.0.1.example.com"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_cluster_elsewhere_is_not_talked_to_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, host: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    message = _refused(f"{scheme}://{host}:8265")
    assert "is not on this machine, and there is no token for it" in message and "Give it in RAY_AUTH_TOKEN" in message
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled must go, too" in _refused(f"{scheme}://{host}:8265")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8"])
def test_a_cluster_on_this_machine_needs_no_token_of_ours(host: str) -> None:
    with pytest.raises(ClusterError, match=r"no Ray answers there .*reach it by `ssh -L"):
        submit.Cluster(f"http://{host}:1")  # asked, in vain


@pytest.mark.parametrize(
    "address", ["ray://h:10001", "h:8265", "http://h", "http://h:port", "http://", "auto", "http://[::1"]
)
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    assert "must be that of the cluster's dashboard, http://HOST:8265 or https://HOST" in _refused(address)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    message = _refused("https://me:pa55word@ray.example.com")
    assert "must hold no user and no password" in message and "pa55word" not in message


def test_that_a_network_can_listen_is_said_before_it_hears_anything() -> None:
    assert "http://192.0.2.1:8265 is not encrypted: who listens has the token" in _refused("http://192.0.2.1:8265")
    for closed in ("https://192.0.2.1", "http://127.0.0.1:1"):
        assert "is not encrypted" not in _refused(closed)


def test_options_that_exclude_each_other_are_refused() -> None:
    done = commands.run("submit", QUICKSTART, "--address", "http://127.0.0.1:1", "--stop", "--follow")
    assert done.code == 2 and "--follow, --status, --stop: give one of the three" in done.err
