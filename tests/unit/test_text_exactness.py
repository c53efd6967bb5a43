"""A base on which a text as embeddings, as behind a prompt, differs from its ids is refused when it is loaded."""

from pathlib import Path

import pytest
import tiny
import torch

from peftscale.base import load, text_exactness
from peftscale.errors import ModelError
from peftscale.train import setup

GEMMA3N = {key: value for key, value in tiny.LLAMA.items() if key != "tie_word_embeddings"} | {
    "model_type": "gemma3n_text",
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 4096,
}
"""Each layer looks up embeddings of the ids: without ids it goes on without them, and every other check passes."""


def test_a_decoder_that_looks_its_ids_up_again_is_refused_by_name(tmp_path: Path) -> None:
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", GEMMA3N), **{"base.quantization": "none"})
    placed = setup.make_plan(cfg, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"base: no adapter .*gemma3n_text: a text as embeddings is off by [^0]"):
        setup.load_base(cfg.base, placed, torch.device("cpu"))


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_lets_exact_families_pass(tmp_path: Path, config: dict[str, object], dtype: str) -> None:
    cfg = tiny.run_config(tmp_path, base=tiny.save_base(tmp_path / "base", config), **{"base.compute_dtype": dtype})
    base = load.load(cfg.base, sharding="replicated", device=torch.device("cpu"))
    assert text_exactness.texts_differ(base) is None
    assert base.model.training
