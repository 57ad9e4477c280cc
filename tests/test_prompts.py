r"""Claims: a prompt is head + document[:t] + tail and loses only context, on the left; the truth is the exact bytes
that follow, with boundaries at the ends of tokens; the answer is what the docstring of parse_answer says."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.prompts import assemble, parse_answer, parse_answers
from rpt_jax.corpus.surroundings import continuation
from rpt_jax.corpus.templates import load_template
from rpt_jax.corpus.tokenizer import load_tokenizer
from rpt_jax.records import InputError

MARKUP = ("<think>", "</think>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(pieces=MARKUP, bytes_of_pieces=None):
    """Bytes 0..255 are ids 0..255, then the given pieces; id -> bytes by default their spelling."""
    token_bytes = tuple(bytes([byte]) for byte in range(256)) + tuple(
        piece.encode() if bytes_of_pieces is None else bytes_of_pieces for piece in pieces
    )

    def encode_markup(text):
        for i, piece in enumerate(pieces):
            text = text.replace(piece, chr(0xE000 + i))
        return [
            token
            for char in text
            for token in ([ord(char) - 0xE000 + 256] if 0xE000 <= ord(char) < 0xE100 else char.encode())
        ]

    return SimpleNamespace(
        token_bytes=token_bytes,
        vocab_size=len(token_bytes),
        encode_markup=encode_markup,
        bytes_of=lambda ids: b"".join(token_bytes[i] for i in ids),
        id_of=lambda piece: 256 + pieces.index(piece) if piece in pieces else None,
    )


TOKENIZER = byte_tokenizer()
DOCUMENTS = {3: np.frombuffer(b"one two three", np.uint8).astype(np.int32), 8: np.arange(97, 123, dtype=np.int32)}
POSITIONS = [Position(3, 4, 1.75), Position(8, 25, 0.5), Position(3, 1, 2.0)]


def prompts_of(config, positions=POSITIONS, template=None):
    return assemble(TOKENIZER, template or load_template(config.template), config, DOCUMENTS, positions)


def live(prompts, n):
    return TOKENIZER.bytes_of(prompts.tokens_NT[n, : prompts.lengths_N[n]].tolist())


def test_prompts_by_hand(tmp_path):
    (tmp_path / "mine.txt").write_text("Go on: {context}|<think>")
    template = load_template(str(tmp_path / "mine.txt"))
    prompts = prompts_of(PromptConfig(max_tokens=64, truth_bytes=6), template=template)
    assert [live(prompts, n) for n in range(3)] == [
        b"Go on: one |<think>",
        b"Go on: abcdefghijklmnopqrstuvwxy|<think>",
        b"Go on: o|<think>",
    ]
    assert prompts.tokens_NT[0, prompts.lengths_N[0] - 1] == 256  # the markup is one token
    assert prompts.tokens_NT.shape == (3, 64) and prompts.tokens_NT.dtype == np.int32
    assert not prompts.tokens_NT[0, prompts.lengths_N[0] :].any()
    assert prompts.ids_N2.tolist() == [[3, 4], [8, 25], [3, 1]] and prompts.ids_N2.dtype == np.uint32
    assert prompts.entropies_N.tolist() == [1.75, 0.5, 2.0]
    # "two th" of "two three"; "z" is all that is left of the alphabet; every byte is a token here
    assert [bytes(truth_X) for truth_X in prompts.truth_NX] == [b"two th", b"z\0\0\0\0\0", b"ne two"]
    assert prompts.boundaries_NX.tolist() == [[True] * 6, [True] + [False] * 5, [True] * 6]


def test_a_long_context_loses_its_left_end_only():
    frame = len(TOKENIZER.encode_markup("<predict><think>"))
    config = PromptConfig(template="bare", max_tokens=frame + 5, truth_bytes=4)
    prompts = prompts_of(config)
    contexts = [b"one ", b"uvwxy", b"o"]
    assert [live(prompts, n) for n in range(3)] == [b"<predict>" + context + b"<think>" for context in contexts]
    headed = load_template("v1")
    frame = len(TOKENIZER.encode_markup(headed.before)) + len(TOKENIZER.encode_markup(headed.after))
    cut = prompts_of(PromptConfig(max_tokens=frame + 2), template=headed)
    assert live(cut, 1) == (headed.before + "xy" + headed.after).encode()


def test_a_span_is_left_out_and_a_segment_is_cut_off():
    """Of "one two three" the "two ": behind the gap stands what follows it; the truth ends with it."""
    config, positions = PromptConfig(max_tokens=2048, truth_bytes=6), [Position(3, 4, 1.75, 4)]
    span, segment = load_template("span"), load_template("segment")
    shown = prompts_of(config, positions, span), prompts_of(config, positions, segment)
    assert live(shown[0], 0) == f"{span.before}one  [GAP] three{span.after}".encode()
    assert live(shown[1], 0) == f"{segment.before}one {segment.after}".encode()
    for prompts in shown:
        assert (
            bytes(prompts.truth_NX[0]) == b"two \0\0" and prompts.boundaries_NX[0].tolist() == [True] * 4 + [False] * 2
        )
    for template in (span, segment):
        assert "sentence or line" in template.before + template.after and template.after.endswith("<think>\n")
    with pytest.raises(InputError, match="has a gap and asks what is missing"):
        prompts_of(config, POSITIONS, span)
    with pytest.raises(InputError, match="template span: head and tail take"):
        prompts_of(PromptConfig(max_tokens=40), positions, span)


def test_no_room_for_context_names_both_numbers():
    with pytest.raises(InputError, match="template v0: head and tail take (\\d+) tokens and prompt.max_tokens=40 "):
        prompts_of(PromptConfig(template="v0", max_tokens=40))


def test_padded_length_is_a_multiple_of_32():
    config = PromptConfig(template="bare", max_tokens=64)
    longest = len(TOKENIZER.encode_markup("<predict><think>")) + 25
    assert prompts_of(config).tokens_NT.shape == (3, -(-longest // 32) * 32)
    with pytest.raises(InputError, match="position 13 of document 3 lies outside its 13 tokens"):
        prompts_of(config, positions=[Position(3, 13, 1.0)])


@pytest.mark.parametrize(
    "pieces, width, text, boundaries",
    [
        ([b"ab", b"c"], 4, b"abc\0", [1, 2]),
        ([b"\xf0\x9f", b"\x98\x80"], 4, b"\xf0\x9f\x98\x80", [1, 3]),  # a character split over two tokens
        ([b"", b"ab", b"", b"c"], 4, b"abc\0", [1, 2]),  # control tokens: no boundary at 0, none of their own
        ([b"", b""], 3, b"\0\0\0", []),
        ([], 3, b"\0\0\0", []),
        ([b"ab", b"cde"], 4, b"abcd", [1]),  # the second token is cut: its end is unknown here
        ([b"ab", b"cd", b"e"], 4, b"abcd", [1, 3]),
        ([b"abcdef"], 4, b"abcd", []),
        ([b"a", b"\0", b"b"], 4, b"a\0b\0", [0, 1, 2]),  # a zero byte of the text is not padding
    ],
)
def test_truth_and_boundaries_by_hand(pieces, width, text, boundaries):
    truth_X, boundaries_X = continuation(pieces, range(len(pieces)), width)
    assert bytes(truth_X) == text and truth_X.dtype == np.uint8
    assert np.flatnonzero(boundaries_X).tolist() == boundaries


def test_chat_markers_go_around_everything_but_the_thought():
    template = load_template("v6", chat="chatml")
    assert template.before.startswith("<|im_start|>user\nPredict")
    assert template.after == "\n```\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert 258 in prompts_of(PromptConfig(max_tokens=2048), template=template).tokens_NT[0]
    with pytest.raises(InputError, match="no token '<｜begin▁of▁sentence｜>'.*prompt.chat"):
        prompts_of(PromptConfig(max_tokens=2048), template=load_template("v6", chat="r1"))


def test_a_silent_thought_end():
    silent = byte_tokenizer(pieces=MARKUP, bytes_of_pieces=b"")
    with pytest.raises(InputError, match="</think> for a control token"):
        assemble(silent, load_template("bare"), PromptConfig(), DOCUMENTS, POSITIONS)


@pytest.mark.parametrize(
    "after_thought, answer",
    [
        (rb"\boxed{the}", b"the"),
        (rb"\boxed{ the}", b" the"),
        (rb"\boxed{the }", b"the "),
        (b"\\boxed{.\n}", b".\n"),
        (rb"\boxed{.\n}", rb".\n"),  # the two characters stay two characters
        (rb"first \boxed{a}, no, \boxed{b}.", b"b"),
        (rb"\boxed{a} and then \boxed{", None),  # the last box is the one that counts, and it never closes
        (rb"\boxed{\frac{1}{2}} is it", rb"\frac{1}{2}"),
        (rb"\boxed{{}}", b"{}"),
        (rb"\boxed{}", b""),
        (rb"\boxed{}.", b""),
        (b"\\boxed{}\n\nThe set {x}", b""),
        (rb"\boxed{} means that {x}", b""),
        (rb"\boxed{ }", b" "),
        (rb"\boxed{}}", b"}"),
        (rb"$\boxed{}}$", b"}"),
        (rb"\boxed{}} or {x}", b"}"),
        (rb"\boxed{}}}", b"}}"),
        (rb"\boxed{}{}", b"}{"),
        (rb"\boxed{}$}", b"}$"),
        (b"\\boxed{}\n}", b"}\n"),
        (rb"\boxed{{}", b"{"),
        (rb"$\boxed{{}$.", b"{"),
        (rb"\boxed{{} opens {x}", b"{"),
        (rb"\boxed{ {}", b" {"),
        (rb"\boxed{_{}", b"_{"),
        (rb"\boxed{{\}", b"{\\"),
        (rb"\boxed{a}}", b"a"),
        (rb"\boxed{a}{b}", b"a"),
        (rb"\boxed{\}", b"\\"),
        (rb"\boxed{a", None),
        (rb"\boxed", None),
        (rb"boxed{a}", None),
        (b"", None),
    ],
)
def test_answers_by_hand(after_thought, answer):
    assert parse_answer(b"let me see \\boxed{not this}</think>" + after_thought) == answer
    assert parse_answer(b"<think>a</think>b\\boxed{c}</think>" + after_thought) == answer  # the last end counts
    assert parse_answer(b"no end " + after_thought) is None


BALANCED = st.recursive(
    st.binary(max_size=4).map(lambda raw: raw.replace(b"{", b"").replace(b"}", b"")),
    lambda inner: st.one_of(inner.map(lambda part: b"{" + part + b"}"), st.tuples(inner, inner).map(b"".join)),
    max_leaves=6,
)


@given(BALANCED.filter(bool), st.binary(max_size=12), st.sampled_from([b"", b".", b" so {x}}", b"}", b"$$\n"]))
def test_balanced_bytes_come_back_from_their_box(answer, thought, rest):
    assert b"\\boxed{" not in answer and b"</think>" not in answer
    assert parse_answer(thought + b"</think>Hence \\boxed{" + answer + b"}" + rest) == answer


@given(
    st.lists(st.sampled_from([b"</think>", b"\\boxed{", b"{", b"}", b" ", b"\\", b"a", b"\xff", b"\n"])), st.binary()
)
def test_parsing_never_raises(parts, noise):
    for response in (b"".join(parts), b"".join(parts) + noise, noise):
        answer = parse_answer(response)
        assert answer is None or b"\\boxed{" + answer + b"}" in response[response.rindex(b"</think>") :]


def test_unfinished_responses_have_no_answer():
    response = TOKENIZER.encode_markup("so</think>\\boxed{é}")
    tokens_NGR = np.zeros((1, 3, len(response) + 5), np.int32)
    tokens_NGR[:, :, : len(response)] = response
    lengths_NG = np.array([[len(response), len(response), len(response) - 1]])
    answers = parse_answers(TOKENIZER, tokens_NGR, lengths_NG, np.array([[True, False, True]]))
    assert answers == [["é".encode(), None, None]]


@pytest.mark.realdata
def test_real_tokenizers_keep_the_context_and_every_byte(real_data):
    tokenizer = load_tokenizer(real_data / "tokenizers" / "qwen2")
    text = "Let $x = \\frac{1}{2}$. 😀 漢字\n\nThen"
    tokens_T = np.array(tokenizer.encode(text), np.int32)
    template = load_template("v4")
    for t in range(1, len(tokens_T)):
        prompts = assemble(tokenizer, template, PromptConfig(), {0: tokens_T}, [Position(0, t, 1.0)])
        prompt = prompts.tokens_NT[0, : prompts.lengths_N[0]].tolist()
        before, rest = tokenizer.bytes_of(tokens_T[:t].tolist()), tokenizer.bytes_of(tokens_T[t:].tolist())
        assert tokenizer.bytes_of(prompt) == template.before.encode() + before + template.after.encode()
        assert bytes(prompts.truth_NX[0, : len(rest)]) == rest
        assert prompts.boundaries_NX[0].sum() == len(tokens_T) - t
