"""Elastic runs before they start: what a run file may ask for, what is planned, rendered and refused. Running one is
`tests/ray/test_nodes.py`."""

from pathlib import Path

import pytest
import tiny
import yaml

from peftscale import configio, facts, plan, workers
from peftscale.config import RunConfig
from peftscale.errors import ClusterError, ConfigError
from peftscale.jobs import render

CONFIGS = Path(__file__).parents[2] / "configs"


def _elastic(tmp_path: Path, **changes: object) -> RunConfig:
    return tiny.run_config(tmp_path, **{"cluster.workers": [2, 6], **changes})


def test_workers_are_a_number_or_the_least_and_the_most_of_an_elastic_run(tmp_path: Path) -> None:
    cluster = _elastic(tmp_path).cluster
    assert (cluster.is_elastic, cluster.min_workers, cluster.max_workers) == (True, 2, 6)
    fixed = tiny.run_config(tmp_path, **{"cluster.workers": 3}).cluster
    assert (fixed.is_elastic, fixed.min_workers, fixed.max_workers) == (False, 3, 3)
    assert configio.load(tmp_path / "run.json", ["cluster.workers=[1,4]"]).cluster.workers == (1, 4)


@pytest.mark.parametrize("wrong", [[0, 2], [3, 2], [2], [1, 2, 3], [1, 2.5], [], "two", -1, True, None])
def test_other_numbers_of_workers_are_refused_with_what_was_got(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(
        ConfigError, match=r"1 problem.*\n  cluster.workers: must be a whole number >= 0, or \[least, m"
    ):
        tiny.run_config(tmp_path, **{"cluster.workers": wrong})


def test_an_elastic_run_is_refused_where_ray_could_not_count_its_places_or_nothing_could_be_resumed(
    tmp_path: Path,
) -> None:
    assert (0.3 + 0.3 + 0.3) // 0.3 == 2  # Ray's own arithmetic: where three workers have room it counts two
    with pytest.raises(ConfigError, match=r"cluster.cpus_per_worker: .* in shares of 0.3; take a whole number, 0.5 or"):
        _elastic(tmp_path, **{"cluster.cpus_per_worker": 0.3})
    assert _elastic(tmp_path, **{"cluster.cpus_per_worker": 0.5}).cluster.is_elastic
    with pytest.raises(ConfigError, match=r"method: 'full_finetuning' keeps no checkpoint, .* got \[2, 6\]"):
        _elastic(tmp_path, **{"method": "full_finetuning", "base.quantization": "none"})


def test_an_elastic_run_needs_room_for_its_fewest_workers_alone(tmp_path: Path) -> None:
    cfg = _elastic(tmp_path)
    workers.refuse_too_few_places(cfg, [{"CPU": 1.0}, {"CPU": 1.5}])
    workers.refuse_too_much(cfg, 2, 0, "this machine")
    with pytest.raises(ClusterError, match="cluster.workers=2: the 1 node.* have room for 1 worker"):
        workers.refuse_too_few_places(cfg, [{"CPU": 1.5}])
    with pytest.raises(ClusterError, match="cluster.workers=2 x cluster.cpus_per_worker=1 needs 2 CPUs, this machine"):
        workers.refuse_too_much(cfg, 1, 0, "this machine")


def test_an_elastic_run_is_planned_on_its_most_and_on_its_fewest_ranks() -> None:
    cfg = configio.load(CONFIGS / "plan" / "llama-3.1-70b.yaml", ["cluster.workers=[1,8]", "base.quantization=none"])
    assert plan.worlds_of(cfg) == (8, 1)
    machines = [plan.Hardware.parse("8xH100-80GB")]
    plans = plan.compare(cfg, facts.load(cfg.base.model), machines, worlds=plan.worlds_of(cfg), lora_targets=_none)
    assert [(p.world_size, p.fits) for p in plans] == [(8, True), (1, False)]
    (misfit,) = plan.misfits(plans)
    assert misfit.startswith("8xH100-80GB, 1 rank(s): a rank needs")


def _none(cfg: RunConfig, model_type: str) -> tuple[str, ...]:
    return ()


def test_an_elastic_job_asks_for_its_most_and_starts_with_its_fewest_nodes() -> None:
    def rendered(target: render.Target) -> str:
        return render.render(
            CONFIGS / "cluster.yaml", ["cluster.workers=[9,32]", "cluster.deploy.secrets=[]"], target
        ).text

    (group,) = list(yaml.safe_load_all(rendered("kuberay")))[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 4, 4)
    aws = yaml.safe_load(rendered("ray-aws"))
    of_workers = aws["available_node_types"]["workers"]
    assert (of_workers["min_workers"], of_workers["max_workers"]) == (2, 4)
    assert any("-gt 2 ]" in command for command in aws["head_setup_commands"])
    assert "#SBATCH --nodes=4\n" in rendered("slurm")
    assert "workers: [9, 32]" in rendered("slurm") or "workers:\n  - 9\n  - 32\n" in rendered("slurm")
