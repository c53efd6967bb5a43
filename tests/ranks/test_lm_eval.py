"""An adapter under lm-evaluation-harness on two sharded ranks: each has all results, and they are those of one rank."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import run_ranks

import peftscale
from peftscale.config import RunConfig, SoftPromptConfig
from peftscale.errors import DataError
from peftscale.session import Session
from peftscale.train import comm

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra 'harness'")
pytestmark = pytest.mark.ranks

PAIRS = [(f"{text}\nVerdict:", f" {label} enough") for text, label in tiny.REVIEWS]


def _ask(cfg: RunConfig) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    from peftscale.harness import AdapterLM

    base = peftscale.load_base(cfg.base.model, quantization="nf4", compute_dtype="float32", sharding="world")
    assert base.is_sharded == (comm.world_size() > 1)
    mood = SoftPromptConfig(kind="prompt", length=5, init="random")
    session = Session(base, {"mood": mood}, optimizer="adamw", learning_rate=0.1)
    model = AdapterLM(base, session.cohort["mood"], microbatch_tokens=64)
    assert (model.rank, model.world_size) == (0, 1)  # as the harness sees it: it gives every rank all requests
    scored = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    # Three requests for two ranks, one of which has none in its last pass.
    written = [
        Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": num}), i)
        for i, ((text, _), num) in enumerate(zip(PAIRS, (9, 9, 4), strict=False))
    ]
    rolled = [Instance("loglikelihood_rolling", {}, ("One two three. " * 60,), 0)]
    found = {
        "pairs": model.loglikelihood(scored),
        "texts": model.generate_until(written),
        "rolling": model.loglikelihood_rolling(rolled),
    }
    if comm.world_size() > 1:
        with pytest.raises(DataError, match=f"rank {comm.rank()} was given other requests than another rank"):
            model.loglikelihood(scored[comm.rank() :])
    return found


def test_two_sharded_ranks_answer_as_one_does(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path)
    (one,), two = (run_ranks(_ask, world, tmp_path / str(world), cfg) for world in (1, 2))
    assert two[0] == two[1]
    assert [logp for logp, _ in two[0]["pairs"]] == pytest.approx(
        [logp for logp, _ in one["pairs"]], abs=2e-5
    )  # measured 0
    assert two[0]["rolling"] == pytest.approx(one["rolling"], rel=1e-6)
    assert two[0]["texts"] == one["texts"] and len(set(one["texts"])) == 3
