"""Soft prompts and cohorts: what is trained, in which order, and how many bytes of it."""

import pytest
import torch

from peftscale.adapters import Cohort, SoftPrompt
from peftscale.errors import AdapterError


def test_a_soft_prompt_is_a_float32_copy_of_its_rows() -> None:
    rows_PH = torch.randn(3, 5).bfloat16()
    prompt = SoftPrompt(rows_PH)
    assert prompt.rows_PH.dtype == torch.float32 and prompt.rows_PH.requires_grad
    assert (prompt.length, prompt.hidden_size) == (3, 5)
    same_dtype = torch.randn(3, 5)
    SoftPrompt(same_dtype).rows_PH.data.zero_()
    assert same_dtype.abs().sum() > 0


def test_a_cohort_keeps_its_order_and_counts_exactly_the_trained_bytes() -> None:
    second, first = SoftPrompt(torch.zeros(2, 5)), SoftPrompt(torch.zeros(3, 5))
    cohort = Cohort({"z": second, "a": first})
    assert list(cohort) == ["z", "a"] and len(cohort) == 2 and cohort["a"] is first
    assert list(cohort.named_parameters()) == ["z/rows_PH", "a/rows_PH"]
    assert [id(tensor) for tensor in cohort.parameters()] == [id(second.rows_PH), id(first.rows_PH)]
    assert cohort.num_parameters == (2 + 3) * 5
    assert cohort.num_bytes == (2 + 3) * 5 * 4


def test_the_paper_s_prompt_parameters_of_table_4_are_recomputed() -> None:
    # Table 4 at length 100, and the row of length 20 of T5 Small, where the paper prints 10,420.
    for hidden_size, length, expected in [(512, 100, 51_200), (4096, 100, 409_600), (512, 20, 10_240)]:
        assert Cohort({"a": SoftPrompt(torch.zeros(length, hidden_size))}).num_parameters == expected


def test_a_cohort_over_two_hidden_sizes_or_of_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="one hidden size; got a: 5, b: 6"):
        Cohort({"a": SoftPrompt(torch.zeros(2, 5)), "b": SoftPrompt(torch.zeros(2, 6))})
    with pytest.raises(AdapterError, match="got no adapter"):
        Cohort({})
