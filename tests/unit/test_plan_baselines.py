"""Plans of full fine-tuning, LoRA and prompt design: from the run file alone, and beside what a run counts itself."""

import json
from pathlib import Path
from typing import Any

import commands
import pytest
import small_plans
import tiny

from peftscale import baselines, facts, plan
from peftscale.baselines import lora
from peftscale.config import RunConfig
from peftscale.errors import ConfigError
from peftscale.plan import Hardware, Plan
from peftscale.plan import baselines as planned_baselines

CONFIG = Path(__file__).parents[2] / "configs" / "baselines.yaml"
CPU = Hardware.parse("cpu-24GB")
LORA = {"method": "lora", "lora": {"rank": 4, "alpha": 8}}
FULL = {"method": "full_finetuning", "base.quantization": "none"}
FEW = {"method": "few_shot", "few_shot": {"examples": 2}}


def _plan(cfg: RunConfig, hardware: Hardware = CPU, world: int = 1) -> Plan:
    (made,) = plan.compare(cfg, facts.load(cfg.base.model), [hardware], worlds=(world,), lora_targets=lora.targets)
    return made


@pytest.mark.parametrize(
    "changes",
    [LORA, {**LORA, "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "up_proj"]}}, FULL],
    ids=["peft's own linears", "named linears", "full"],
)
def test_what_a_baseline_trains_is_counted_from_the_config_as_the_run_counts_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cfg = tiny.run_config(tmp_path, **changes)
    cfg.run_dir.mkdir(parents=True)
    (trained,) = baselines.main(cfg).adapters.values()
    made = _plan(cfg)
    assert made.adapter_bytes == 4 * trained.trainable_parameters
    assert made.num_steps == cfg.num_steps and made.hours is None


def test_lora_takes_all_linears_where_it_is_told_to(tmp_path: Path) -> None:
    named = {"rank": 3, "alpha": 8, "target_modules": ["all-linear"]}
    made = _plan(tiny.run_config(tmp_path, **{**LORA, "lora": named}))
    # Three blocks: q, o 64 x 64, k, v 32 x 64, gate, up 112 x 64, down 64 x 112. The head is not meant.
    assert made.adapter_bytes == 4 * 3 * 3 * (2 * 128 + 2 * 96 + 3 * 176)
    absent = tiny.run_config(tmp_path, **{**LORA, "lora": {**named, "target_modules": ["c_attn"]}})
    with pytest.raises(ConfigError, match=r"lora.target_modules=c_attn: .* has no such linear; it has down_proj, "):
        _plan(absent)


def test_bytes_of_full_fine_tuning_over_three_ranks_by_hand() -> None:
    cfg = small_plans.cfg(
        adapters={"a": 5}, base={"quantization": "none"}, train={"optimizer": "adafactor"}
    ).model_copy(update={"method": "full_finetuning"})
    base = small_plans.base()
    made = planned_baselines.of_training(cfg, base, CPU, world=3)
    num = 400 + 2 * (2 * 192 + 8) + 8  # table, two blocks, norm
    assert base.num_parameters == num
    assert made.adapter_bytes == num * 4 // 3
    assert made.gradient_bytes == num * 2 * 2 + num * 4 // 3
    assert made.optimizer_bytes == num * 4 * 2 // 3  # one moment and one intermediate
    assert made.reduced_bytes_per_step == num * 4  # one pass
    assert made.gathered_bytes_per_step == num * 2
    assert made.control_bytes_per_step == 64 + 16 * (1 + 2 * 3 + 1)  # squares of each tensor
    alone = planned_baselines.of_training(cfg, base, CPU, world=1)
    assert alone.reduced_bytes_per_step == alone.gathered_bytes_per_step == alone.control_bytes_per_step == 0


def test_prompt_design_holds_weights_and_one_pass_without_a_backward(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, **FEW)
    made = _plan(cfg, world=2)
    assert made.activation_bytes == made.logits_bytes == made.optimizer_bytes == made.num_steps == 0
    assert made.peak_rank_bytes == sum(
        getattr(made, f"{key}_bytes") for key in ("slice", "gathered_units", "dequantized", "evaluation")
    )


def test_a_baseline_that_does_not_fit_a_machine_still_has_its_column() -> None:
    machines = ["--hardware", "cpu-1GB", "--hardware", "cpu-24GB"]
    for method in ("lora", "full_finetuning", "few_shot"):
        done = commands.run("plan", CONFIG, f"method={method}", *machines, "--json")
        assert done.code == 0, done.err
        small, large = json.loads(done.out)["plans"]
        assert small["peak_rank_bytes"] == large["peak_rank_bytes"] > 0
        done = commands.run("plan", CONFIG, f"method={method}", "train.microbatch_tokens=200000", *machines)
        assert done.code == 2
        assert f"cpu-1GB: method={method}: a rank needs" in done.err and "cpu-24GB: method" not in done.err
