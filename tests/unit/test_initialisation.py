"""The starts of Lester et al. 3.2, on the real tokenizer of the quickstart base and a small random embedding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftscale import adapters
from peftscale.adapters import initialisation
from peftscale.config import RunConfig
from peftscale.errors import AdapterError

BASE = Path(__file__).parents[2] / "configs/quickstart/base"
H = 6
NUM_PADDING = 32
"""Embedding rows behind the tokenizer's last token, as padded vocabularies have them."""


class TableBase:
    """A base that is only its embedding, in bfloat16, and counts the collectives."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer) + NUM_PADDING
        self.hidden_size = H
        self.device = torch.device("cpu")
        self.table_VH = torch.randn(self.vocab_size, H, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.asked: list[list[int]] = []

    def embedding_rows(self, ids_N: Tensor) -> Tensor:
        self.asked.append(ids_N.tolist())
        return self.table_VH[ids_N].float()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not (BASE / "tokenizer.json").exists():
        pytest.skip("the quickstart base is not in this checkout")
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerBase) -> TableBase:
    return TableBase(tokenizer)


def run_config(seed: int = 7, **adapters_: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "seed": seed,
            "base": {
                "model": "base",
                "quantization": "none",
                "compute_dtype": "float32",
                "sharding": "replicated",
                "checkpoint_activations": False,
            },
            "adapters": {name: {"kind": "prompt", **fields} for name, fields in adapters_.items()},
            "task": {
                "name": "task",
                "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
                "input": "{{ text }}",
                "target": "{{ label }}",
                "metrics": ["exact_match"],
            },
            "train": {
                "steps": 1,
                "examples_per_step": 1,
                "microbatch_tokens": 64,
                "optimizer": "adamw",
                "learning_rate": 0.1,
                "evaluate_every": 1,
                "checkpoint_every": 1,
            },
            "cluster": {"workers": 0, "storage": "runs"},
        }
    )


def test_random_rows_fill_the_paper_s_interval_and_depend_on_the_seed_alone() -> None:
    rows_PH = initialisation.random_rows(100, 50, seed=1)
    assert rows_PH.shape == (100, 50) and rows_PH.dtype == torch.float32
    assert -0.5 <= rows_PH.min() < -0.49 and 0.49 < rows_PH.max() < 0.5  # the paper's code starts at 0 instead
    assert torch.equal(rows_PH, initialisation.random_rows(100, 50, seed=1))
    assert not torch.equal(rows_PH, initialisation.random_rows(100, 50, seed=2))


def test_vocabulary_draws_each_ordinary_frequent_token_once(base: TableBase) -> None:
    num_special = len(base.tokenizer.all_special_ids)
    assert num_special == 3  # ids 0, 1 and 2, so a draw of all others must leave out exactly those
    groups = initialisation.vocabulary_groups(50 - num_special, base, top=50, seed=3, where="adapters.a")
    assert sorted(groups) == [[token] for token in range(num_special, 50)]


def test_vocabulary_never_draws_the_padding_behind_the_tokenizer(base: TableBase) -> None:
    everything = len(base.tokenizer) - 3
    groups = initialisation.vocabulary_groups(everything, base, top=10**6, seed=3, where="adapters.a")
    assert max(token for group in groups for token in group) == len(base.tokenizer) - 1


def test_vocabulary_differs_by_seed_and_repeats_for_one(base: TableBase) -> None:
    first, again, other = (
        initialisation.vocabulary_groups(20, base, top=5000, seed=seed, where="adapters.a") for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_more_rows_than_ordinary_tokens_are_refused_by_the_key_of_the_run_file(base: TableBase) -> None:
    with pytest.raises(AdapterError, match=r"adapters\.sst2\.length: 48 rows cannot be drawn .* 47 ordinary") as caught:
        initialisation.vocabulary_groups(48, base, top=50, seed=3, where="adapters.sst2")
    assert "raise adapters.sst2.init_top" in str(caught.value)


@pytest.mark.parametrize("length", [2, 5, 13])
def test_text_is_repeated_or_cut_to_the_length_without_special_tokens(base: TableBase, length: int) -> None:
    text = "Is this review good or bad?"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 5 < len(ids) < 13
    groups = initialisation.text_groups(length, base, text=text, where="adapters.a")
    assert groups == [[token] for token in (ids * 3)[:length]]


def test_a_text_without_tokens_is_refused(base: TableBase) -> None:
    with pytest.raises(AdapterError, match=r"adapters\.a\.init_text: '' has no token"):
        initialisation.text_groups(2, base, text="", where="adapters.a")


def test_a_tokenizer_of_a_larger_model_is_refused(base: TableBase) -> None:
    base.vocab_size = 40
    with pytest.raises(AdapterError, match=r"embeds only the ids 0 \.\. 39.*check base\.model"):
        initialisation.text_groups(2, base, text="Is this good?", where="adapters.a")


def test_each_label_starts_as_the_mean_of_its_rows_and_the_vocabulary_fills_the_rest(base: TableBase) -> None:
    labels = (" bad", " incomprehensible")
    ids = [base.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    assert len(ids[0]) == 1 < len(ids[1])
    cohort = adapters.build(run_config(a={"length": 5, "init": "labels", "init_labels": labels, "seed": 9}), base)
    rows_PH = cohort["a"].rows_PH.detach()
    assert torch.equal(rows_PH[0], base.table_VH[ids[0][0]].float())
    torch.testing.assert_close(rows_PH[1], base.table_VH[ids[1]].float().mean(dim=0), rtol=0, atol=0)
    filled = initialisation.vocabulary_groups(3, base, top=5000, seed=9, where="adapters.a")
    assert torch.equal(rows_PH[2:], base.table_VH[[group[0] for group in filled]].float())


def test_more_labels_than_virtual_tokens_are_refused(base: TableBase) -> None:
    cfg = run_config(a={"length": 1, "init": "labels", "init_labels": ["good", "bad"]})
    with pytest.raises(AdapterError, match=r"adapters\.a\.init_labels: 2 labels .* got adapters\.a\.length=1"):
        adapters.build(cfg, base)


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "random"},
        {"init": "vocabulary"},
        {"init": "text", "init_text": "good or bad"},
        {"init": "labels", "init_labels": ["very good", "bad"]},
    ],
    ids=lambda fields: fields["init"],
)
def test_every_start_leaves_the_global_random_state_alone_and_asks_for_rows_once(
    base: TableBase, fields: dict[str, object]
) -> None:
    state = torch.random.get_rng_state()
    cohort = adapters.build(run_config(a={"length": 4, **fields}), base)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(base.asked) == (0 if fields["init"] == "random" else 1)
    assert cohort["a"].rows_PH.shape == (4, H) and cohort["a"].rows_PH.dtype == torch.float32


def test_training_a_prompt_never_writes_into_the_embedding(base: TableBase) -> None:
    before = base.table_VH.clone()
    cohort = adapters.build(run_config(a={"length": 4, "init": "vocabulary"}), base)
    with torch.no_grad():
        cohort["a"].rows_PH.zero_()
    assert torch.equal(base.table_VH, before)


def test_an_adapter_starts_the_same_alone_and_in_a_cohort(base: TableBase) -> None:
    vocabulary = {"length": 4, "init": "vocabulary"}
    both = adapters.build(
        run_config(b={"length": 3, "init": "random"}, a=vocabulary, c={**vocabulary, "seed": 8}), base
    )
    alone = adapters.build(run_config(a=vocabulary), base)
    assert torch.equal(both["a"].rows_PH, alone["a"].rows_PH)
    assert not torch.equal(both["a"].rows_PH, both["c"].rows_PH)  # its own seed
    assert list(both) == ["b", "a", "c"]
