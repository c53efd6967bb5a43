"""A baseline as Ray workers: the driver's own path, and DeepSpeed's optimizer over two of them."""

from pathlib import Path

import pytest
import tiny

from peftscale import driver

pytestmark = pytest.mark.ray


def test_full_finetuning_on_two_ray_workers_ends_where_one_process_ends(tmp_path: Path) -> None:
    changes = {"method": "full_finetuning", "base.quantization": "none", "train.learning_rate": 1e-3}
    workers = {"cluster.workers": 2, "cluster.cpus_per_worker": 0.5}
    alone = driver.run(tiny.run_config(tmp_path, **changes, name="alone"), show=False)
    together = driver.run(tiny.run_config(tmp_path, **changes, **workers, name="together"), show=False)
    assert (alone.world_size, together.world_size) == (1, 2)
    (one,), (two,) = alone.adapters.values(), together.adapters.values()
    assert (two.before, two.after) == (one.before, one.after)
    assert two.train_loss == pytest.approx(one.train_loss, rel=1e-4)
    assert together.reduced_bytes_per_step == together.predicted.reduced_bytes_per_step > 0
