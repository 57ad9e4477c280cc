"""Claims: people read the very texts that were sampled and compared, characters whole, spread over prompts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import toy
from test_collect import G, N, groups_of

from rpt_jax.corpus.positions import Position
from rpt_jax.learning.collect import Groups, Source
from rpt_jax.learning.shown import shown
from rpt_jax.records import Prompts, Rollouts


def test_rollouts_are_shown_as_they_are():
    tokenizer = toy.tokenizer()
    encode, end = tokenizer.encode, tokenizer.end_of_text
    responses = [[*encode("a b</think>\\boxed{4}"), end], encode("0</think>\\boxed{")]
    width = max(map(len, responses))
    tokens_NGR = np.array([[response + [0] * (width - len(response)) for response in responses]])
    logprobs_NGR = -np.arange(2 * width, dtype=np.float32).reshape(1, 2, width) / 8
    truth = np.frombuffer(b"4.\0\0", np.uint8)[None]
    groups = Groups(
        (Position(1, toy.TARGET, 1.5),),
        Prompts(None, None, None, truth, np.array([[True, True, False, False]]), None),
        Rollouts(tokens_NGR, np.array([list(map(len, responses))]), logprobs_NGR, np.array([[True, False]])),
        np.array([[True, False]]),
        np.array([[0.5, 0.0]], np.float32),
        np.array([[True, False]]),
        np.array([list(map(len, responses))]),
    )
    source = Source(toy.config("unused"), toy.model(), tokenizer, None, toy.annotated().documents, (), None)
    first, second = shown(source, groups, 5, step=9)
    assert first == {
        "step": 9,
        "document": 1,
        "index": 2,
        "entropy": 1.5,
        "member": 0,
        "context": "b ",
        "thought": "a b",
        "prediction": "4",
        "truth": "4",
        "continuation": "4.",
        "reward": 0.5,
        "right": True,
        "finished": True,
        "tokens": len(responses[0]),
        "pieces": [[text, -i / 8] for i, text in enumerate(["a", " ", "b", "</think>", "\\boxed{", "4", "}", ""])],
    }
    assert second["pieces"] == [["0", -width / 8], ["</think>", -(width + 1) / 8], ["\\boxed{", -(width + 2) / 8]]
    assert (second["thought"], second["prediction"], second["finished"], second["right"]) == ("0", None, False, False)


def test_characters_that_tokens_share_are_shown_whole():
    """The euro sign is e2 82 ac, here in two tokens: one piece, with the log-prob of both."""
    contents = [b"<", b"\xe2\x82", b"\xac", b">", b"\xe2"]
    stub = SimpleNamespace(bytes_of=lambda ids: b"".join(contents[i] for i in ids))
    groups = groups_of([Position(0, toy.TARGET, 0.0)] * N, set())
    logprobs_NGR = np.tile(-np.array([1, 2, 4, 8, 16], np.float32), (N, G, 1))
    tokens_NGR, lengths_NG = np.tile(np.arange(5), (N, G, 1)), np.full((N, G), 5)
    rollouts = groups.rollouts.replace(tokens_NGR=tokens_NGR, lengths_NG=lengths_NG, logprobs_NGR=logprobs_NGR)
    source = Source(toy.config("unused"), toy.model(), stub, None, [np.zeros(4, np.int32)], (), None)
    (row,) = shown(source, dataclasses.replace(groups, rollouts=rollouts), 1, 0)
    assert row["pieces"] == [["<", -1], ["€", -6], [">", -8], ["\ufffd", -16]]


def test_shown_rollouts_are_spread_over_prompts():
    groups = groups_of([Position(document, toy.TARGET, 0.0) for document in range(N)], set())
    source = Source(toy.config("unused"), toy.model(), toy.tokenizer(), None, toy.annotated().documents, (), None)

    def places(count):
        return [(row["document"], row["member"]) for row in shown(source, groups, count, 0)]

    assert places(2) == [(0, 0), (2, 1)]
    assert places(5) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert len(places(100)) == N * G and places(0) == []
