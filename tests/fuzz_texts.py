"""Targets: tokenizers of damaged files, texts of any bytes, templates, answers and rewards, with the laws of each."""

import contextlib
import functools
import json
import random
from collections.abc import Sequence

import numpy as np
import toy
from fuzz_mutate import damaged, rewritten
from fuzz_targets import Target, file_in, file_of, scratch
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer_files import byte_level_description, write_gpt2

from rpt_jax.config import PromptConfig, RewardConfig
from rpt_jax.corpus import choices, documents, pieces, prompts, segments
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.templates import load_template, require_fitting
from rpt_jax.corpus.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from rpt_jax.corpus.tokenizer_export import end_ids, export_tokenizer
from rpt_jax.learning import judge, rewards
from rpt_jax.learning.judge_worker import RIGHT, WRONG
from rpt_jax.records import InputError, Prompts

TEXTS = ("", "a 3. b", "ab<|endoftext|>ba\n\n", "one two▁ three", "é日本😀\0\r\n", "<think>x</think>\\boxed{ 7}")


def targets() -> tuple[Target, ...]:
    model = (toy.tokenizer().files["tokenizer.model"], _small_model("bpe"), _small_model("unigram"))
    description = json.dumps(_small_description()).encode()
    spaced = json.dumps(_spaced_description()).encode()
    gpt2 = write_gpt2(scratch() / "gpt2").parent
    vocab = json.loads((gpt2 / "vocab.json").read_bytes()) | {"ab": 257}
    (gpt2 / "vocab.json").write_text(json.dumps(vocab))
    config = json.dumps({"eos_token": "<end>", "added_tokens_decoder": {"258": {"content": "<end>", "special": True}}})
    models = file_of("x.model"), file_of("x.json"), file_of("x.tiktoken")
    beside = {name: file_in(gpt2, name) for name in ("tokenizer_config.json", "vocab.json", "merges.txt")}
    generation = file_in(gpt2, "generation_config.json")
    return (
        Target("sentencepiece", model, lambda content: reads(models[0](content)), _protobuf, 2),
        Target("tokenizer-json", (description, spaced), lambda content: reads(models[1](content)), rewritten, 2),
        Target("tiktoken", (b"YQ== 0\nYg== 1\n",), lambda content: reads(models[2](content)), damaged, 0.05),
        Target(
            "config-beside",
            (config.encode(),),
            lambda content: reads(beside["tokenizer_config.json"](content)),
            rewritten,
        ),
        Target(
            "vocab", ((gpt2 / "vocab.json").read_bytes(),), lambda c: reads(beside["vocab.json"](c)), rewritten, 0.5
        ),
        Target("merges", (b"#version: 0.2\na b\n",), lambda c: reads(beside["merges.txt"](c)), damaged, 0.3),
        Target("generation", (b'{"eos_token_id": [256, 1]}',), lambda c: exports(generation(c)), rewritten, 0.3),
        Target("text", tuple(text.encode() for text in TEXTS), any_text, damaged, 4),
        Target("template", (b"Text: {context}\nNext:<think>", b"a{context}b{after}c<think>\n"), template_file, damaged),
        Target("corpus-template", (rb"{problem}\n\n{solution}", b"{{{text}}}"), corpus_template, damaged),
        Target("answer", tuple(ANSWERS), answers, damaged, 6),
        Target("reward", (b" the cat|| the cat sat|1 4 8", b"7|7|1", b"{a}||{a} b|2 4"), reward, damaged, 4),
        Target("choice", (b"(B).", b"an option", b"A"), choice, damaged),
        Target("verdict", (b"1/2|0.5", b"-07|-7", b"7.|7"), verdict, damaged),
    )


def _small_model(kind: str) -> bytes:
    return train_sentencepiece(["one two three a b c"] * 20, 272, scratch() / kind, model_type=kind).files[
        "tokenizer.model"
    ]


def _small_description() -> dict:
    description = byte_level_description()
    kept = {piece: i for i, piece in enumerate(["a", "b", "c", "Ġ", "Ċ", "3", ".", "ab"])}
    return description | {"model": description["model"] | {"vocab": kept, "merges": [["a", "b"]]}}


def _spaced_description() -> dict:
    vocab = {
        piece: i
        for i, piece in enumerate(["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in b"bc.\n\xe2\x96\x81")])
    }
    model = {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "byte_fallback": True, "unk_token": "<unk>"}
    normal = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    split = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {"version": "1.0", "added_tokens": [], "normalizer": normal, "pre_tokenizer": split, "model": model}


def _protobuf(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A SentencePiece model with fields of a piece or of a spec changed; bytes at random half of the times."""
    proto = sentencepiece_model_pb2.ModelProto()
    with contextlib.suppress(Exception):
        proto.ParseFromString(content)
    if chance.random() < 0.5 or not proto.pieces:
        return damaged(chance, content, others)
    piece, way = chance.choice(proto.pieces), chance.randrange(7)
    if way == 0:
        piece.piece = chance.choice(("", "▁", "<0x41>", "<0xZZ>", "</s>", "a" * 500, proto.pieces[0].piece, "\0", "é"))
    elif way == 1:
        piece.type = chance.randrange(1, 7)
    elif way == 2:
        piece.score = chance.choice((0.0, -1e30, 1e30, float("nan"), float("inf"), -1.5))
    elif way == 3:
        del proto.pieces[chance.randrange(len(proto.pieces)) :]
    elif way == 4:
        proto.trainer_spec.model_type = chance.randrange(1, 5)
    elif way == 5:
        for name in ("escape_whitespaces", "add_dummy_prefix"):
            setattr(proto.normalizer_spec, name, chance.random() < 0.5)
        proto.normalizer_spec.precompiled_charsmap = chance.randbytes(chance.randrange(40))
        proto.denormalizer_spec.precompiled_charsmap = chance.randbytes(chance.randrange(40))
    else:
        for name in ("unk_id", "eos_id", "bos_id", "pad_id", "vocab_size"):
            setattr(proto.trainer_spec, name, chance.choice((-1, 0, 1, 7, 2**31 - 1, -(2**31))))
        proto.trainer_spec.unk_piece, proto.trainer_spec.byte_fallback = (
            chance.choice(("<unk>", "", "a")),
            chance.random() < 0.5,
        )
    return proto.SerializeToString()


def reads(place) -> None:
    """A tokenizer, if it is one, keeps the law of bytes for every text that it takes."""
    tokenizer = load_tokenizer(place)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size > max(tokenizer.pieces.values())
    for text in TEXTS:
        with contextlib.suppress(InputError):
            keeps_the_law(tokenizer, text)


def exports(place) -> None:
    tokenizer = load_tokenizer(place)
    ends = end_ids(tokenizer)
    assert ends is None or all(type(each) is int for each in (ends if isinstance(ends, list) else [ends]))
    export_tokenizer(tokenizer, scratch() / "exported")


def keeps_the_law(tokenizer: Tokenizer, text: str) -> list[int]:
    """bytes_of(encode(text)) is the text, token by token, and ids are of the vocabulary."""
    ids = tokenizer.encode(text)
    assert tokenizer.bytes_of(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())
    plain = tokenizer.encode_markup(text)
    assert len(tokenizer.bytes_of(plain)) <= len(text.encode())
    return ids


def any_text(content: bytes) -> None:
    """Bytes as text, halves of pairs included, through tokenizers of each kind, and their segments."""
    try:
        text = content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for tokenizer in _good():
        try:
            ids = keeps_the_law(tokenizer, text)
        except InputError:
            assert not tokenizer.represents_all or not _has_utf8(text)
            continue
        parts = [tokenizer.token_bytes[i] for i in ids]
        bounds = segments.segments(parts) if parts else np.zeros((0, 2), int)
        assert bounds[:, 0].tolist() == [0, *bounds[:-1, 1]][: len(bounds)] and (bounds[:, 0] < bounds[:, 1]).all()
        shown = pieces.readable_pieces(parts, [1.0] * len(parts))
        assert "".join(piece for piece, _ in shown) == text and sum(number for _, number in shown) == len(parts)


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@functools.cache
def _good() -> tuple[Tokenizer, ...]:
    """Tokenizers of each kind: of characters, of bytes, and SentencePiece's BPE."""
    full = file_of("good.json")(json.dumps(byte_level_description()).encode())
    return toy.tokenizer(), load_tokenizer(full), load_tokenizer(scratch() / "bpe")


def template_file(content: bytes) -> None:
    """A template, if it is one, frames the text without a change to its bytes."""
    template = load_template(str(file_of("template.txt")(content)), ("none", "chatml", "r1")[len(content) % 3])
    target = "masked_span" if template.gap is not None else "next_token"
    require_fitting(template, target)
    tokenizer = _good()[2]
    tokens_T = np.array(tokenizer.encode("one two three. a b"), np.int32)
    positions = [Position(0, index, 1.0, 2 if template.gap is not None else 0) for index in (1, 5)]
    made = prompts.assemble(tokenizer, template, PromptConfig(max_tokens=4096, truth_bytes=8), [tokens_T], positions)
    shown = prompts.contexts_of(tokenizer, template, made)
    for each, position in zip(shown, positions, strict=True):
        assert each.startswith(tokenizer.bytes_of(tokens_T[: position.index].tolist()))


def corpus_template(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    template = documents.parse_template(text)
    filled = template.fill(dict.fromkeys(template.fields, "\\n{x}"))
    assert template.fields and filled.count("\\n{x}") >= len(template.fields)


ANSWERS = (
    b"<think> so</think>\\boxed{ 9}",
    b"</think>\\boxed{\\frac{1}{2}}. </think> \\boxed{}}",
    b"\\boxed{x}</think>",
    b"</think>\\boxed{{}",
    b"</think>\\boxed{_{} \\boxed{a",
)


def answers(content: bytes) -> None:
    """An answer is a part of the response behind the last </think>, up to a brace; reading it never raises."""
    answer, start = prompts.parse_answer(content), prompts.answer_start(content)
    assert (answer is None) or (start is not None and content[start:].startswith(answer + b"}"))
    assert start is None or content[:start].endswith(prompts.BOX) and prompts.THOUGHT_END not in content[start:]
    if answer is not None:
        assert prompts.parse_answer(content + b"<|endoftext|>") is not None
        text = judge.readable(answer)
        assert text is None or text.encode() in answer
    tokens = np.frombuffer(content[:64], np.uint8).astype(np.int32)
    with_ids = _good()[1]
    parsed = prompts.parse_answers(with_ids, tokens[None, None], np.array([[len(tokens)]]), np.array([[True]]))
    assert parsed == [[prompts.parse_answer(with_ids.bytes_of(tokens.tolist()))]]
    found = rewards.answer_logprobs(
        with_ids.bytes_of, tokens[None, None], np.array([[len(tokens)]]), -np.ones((1, 1, 64))
    )
    assert found.shape == (1, 1) and found[0, 0] in (-1, -np.inf)


def reward(content: bytes) -> None:
    """answer||truth|ends: each kind of reward in its range, and as the others say."""
    answer, _, rest = content.partition(b"||")
    truth, _, ends = rest.partition(b"|")
    width = 16
    boundaries_X = np.zeros(width, bool)
    boundaries_X[[int(end) - 1 for end in ends.split() if end.isdigit() and len(end) < 4 and 0 < int(end) <= width]] = (
        True
    )
    truth_X = np.frombuffer(truth[:width].ljust(width, b"\0"), np.uint8)
    zero_N = np.zeros(1, np.int32)
    made = Prompts(
        np.zeros((1, 1), np.int32), zero_N, np.zeros((1, 2), np.uint32), truth_X[None], boundaries_X[None], zero_N
    )
    predictions = [[answer, None, b"", truth[: int(boundaries_X.argmax()) + 1]]]
    logprobs_NG = -np.ones((1, 4), np.float32)
    outcomes = rewards.Outcomes(predictions, made, first_logprobs_NG=logprobs_NG)
    found = {
        kind: rewards.reward(RewardConfig(kind=kind), outcomes)[0]
        for kind in ("prefix", "first_token", "exact", "dense", "conditional_dense")
    }
    for kind in ("prefix", "first_token", "exact"):
        assert set(found[kind].tolist()) <= {0.0, 1.0} and found[kind][1] == found[kind][2] == 0, kind
    assert all(((found[kind] >= 0) & (found[kind] <= 1)).all() for kind in found)
    expected = 0 < len(answer) <= width and truth_X.tobytes().startswith(answer) and boundaries_X[len(answer) - 1]
    assert found["prefix"][0] == expected and (found["first_token"] >= found["prefix"]).all()
    assert (found["prefix"] >= found["exact"]).all() and (found["dense"] >= found["prefix"]).all()
    whole = rewards.exact(rewards.Outcomes(predictions, made, whole=True))
    assert set(whole.ravel().tolist()) <= {0.0, 1.0} and whole[0, 1] == whole[0, 2] == 0


def choice(content: bytes) -> None:
    options = ("an option", "A", content.decode("utf-8", "replace"))
    found = choices.parse_choice(content, options)
    assert found is None or 0 <= found < 3
    assert choices.parse_choice(b"(B).", options) in (None, 1)


def verdict(content: bytes) -> None:
    reference, _, answer = content.partition(b"|")
    reference = reference.decode("utf-8", "replace").strip()
    found = judge.at_once(reference, judge.readable(answer))
    assert found in (None, RIGHT, WRONG)
    assert judge.at_once(reference, reference) == RIGHT or not reference
