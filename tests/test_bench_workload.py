"""The workload of `rpt bench step`: numbers that other implementations draw too, and documents that prompts share."""

import hashlib

import numpy as np
import pytest

from rpt_jax.bench.workload import WORKLOADS, Workload, draw_data
from rpt_jax.records import InputError

SIZES = {"vocabulary": 64, "prompt": 9, "prompts": 6, "group": 2, "tokens": 4}


def fingerprint(workload):
    data = draw_data(workload)
    prompts = (data.prompts.tokens_NT, data.prompts.lengths_N, data.prompts.ids_N2)
    arrays = (*prompts, data.tokens_NGR, data.lengths_NG, data.advantages_NG)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        (WORKLOADS["W1"], "0b63b9f743f84700"),
        (WORKLOADS["tiny"], "1e893436fcb673ec"),
        (Workload(lengths="geometric"), "9b60b60c956845b4"),
    ],
)
def test_draws_are_those_of_the_first_version(workload, expected):
    """Scripts for other implementations draw these; the figures beside theirs stand on it."""
    assert fingerprint(workload) == expected


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_positions_of_a_document_are_its_beginnings(k):
    """Each prompt is a token longer than the one before it and begins with it; the last is the whole document, which is
    one of the prompts that are drawn without sharing. Responses, their lengths and advantages do not change."""
    plain, data = draw_data(Workload(**SIZES)), draw_data(Workload(**SIZES, positions_per_document=k))
    for n in range(6):
        document, place = divmod(n, k)
        length = 9 - (k - 1 - place)
        assert data.prompts.lengths_N[n] == length
        np.testing.assert_array_equal(data.prompts.tokens_NT[n, :length], plain.prompts.tokens_NT[document, :length])
        assert not data.prompts.tokens_NT[n, length:].any()
        assert data.prompts.ids_N2[n].tolist() == [document, place]
    for name in ("tokens_NGR", "lengths_NG", "advantages_NG"):
        np.testing.assert_array_equal(getattr(data, name), getattr(plain, name))
    live = [tuple(data.prompts.tokens_NT[n, :t]) for n in range(6) for t in range(1, data.prompts.lengths_N[n] + 1)]
    assert len(set(live)) == Workload(**SIZES, positions_per_document=k).distinct_prompt_tokens


@pytest.mark.parametrize("k", [0, 4, 12])
def test_positions_that_do_not_divide_are_refused(k):
    with pytest.raises(InputError, match=f"workload.positions_per_document={k}: use"):
        Workload(**SIZES, positions_per_document=k).check()


def test_documents_have_a_token_for_each_position():
    with pytest.raises(InputError, match="positions_per_document=6: use a divisor .* no more than workload.prompt=5"):
        Workload(**SIZES | {"prompt": 5}, positions_per_document=6).check()
