"""Inputs -> inputs that are a little wrong: bytes at random, and JSON by its structure."""

import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
)
VALUES = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "\0",
        "\ud83d",
        "\U0001f600",
        "é",
        "a\nb",
        "$\\frac{$",
        "../x",
        "x" * 300,
        "nan",
        "1",
    ),
    *(
        0,
        1,
        -1,
        2,
        3.5,
        -0.0,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
        2**31,
        2**63,
        -(2**63),
        10**30,
        10**400,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, "a"],
        {"type": "Sequence"},
        {"id": -1, "content": ""},
        [0, 0],
        [2**62, 2**62],
    ),
)
TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xe2\x96\x81",
        b" ",
    ),
    *(
        b"</think>",
        b"<think>",
        b"\\boxed{",
        b"{context}",
        b"{after}",
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 40,
    ),
    *(
        b"\\ud83d",
        b"\xed\xa0\xbd",
        b"\xf0\x9f\x98\x80",
        b"\xc3",
        b"[" * 2000,
        b'{"a":' * 200,
        b"<0x41>",
        b"<|endoftext|>",
        b"####",
    ),
)
LONGEST = 1 << 16  # bytes of an input


def damaged(random: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes of bytes."""
    content = bytearray(content)
    for _ in range(1 + int(random.expovariate(1.2))):
        at, end = sorted((random.randrange(len(content) + 1), random.randrange(len(content) + 1)))
        way = random.randrange(10)
        if way == 0 and content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        elif way == 1 and content:
            content[random.randrange(len(content))] = random.randrange(256)
        elif way == 2:
            content[at:at] = random.choice(TOKENS)
        elif way == 3:
            del content[at : min(end, at + 1 + int(random.expovariate(0.1)))]
        elif way == 4:
            content[at:at] = content[at : min(end, at + 64)]
        elif way == 5:
            other = random.choice(others)
            cut = random.randrange(len(other) + 1)
            content[at:end] = other[cut : cut + end - at + random.randrange(-2, 3)]
        elif way == 6:
            del content[at:]
        elif way == 7:
            number = random.choice(NUMBERS)
            kind = random.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
            packed = struct.pack(kind, number % 2 ** (8 * struct.calcsize(kind)))
            content[at : at + len(packed)] = packed
        elif way == 8:
            content[at:end] = str(random.choice((1, -1)) * random.choice(NUMBERS)).encode()
        else:
            content[at:at] = random.randbytes(random.randrange(1, 9))
    return bytes(content[:LONGEST])


def rewritten(random: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """JSON with one to three values changed, dropped, moved or said twice; bytes at random one time in four."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(random, content, others)
    if random.random() < 0.25:
        return damaged(random, content, others)
    try:
        for _ in range(1 + int(random.expovariate(1.5))):
            value = _changed(random, value)
        return json.dumps(value, ensure_ascii=random.random() < 0.8).encode("utf-8", "surrogatepass")[:LONGEST]
    except RecursionError:
        return content


def _changed(random: random.Random, value):
    """A copy of the value with a change somewhere in it; deeper places are as likely as shallow ones."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        way = random.randrange(8)
        if way == 0:
            return {name: each for name, each in value.items() if name != key}
        if way == 1:
            return value | {random.choice(("", "extra", "type", key + "s")): random.choice(VALUES)}
        if way == 2:
            return value | {key: value[random.choice(list(value))]}
        return value | {key: _changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        way = random.randrange(6)
        if way == 0:
            return value[:at] + value[at + 1 :]
        if way == 1:
            return value[:at] + [random.choice(VALUES)] + value[at:]
        if way == 2:
            return value + value[at : at + 1] * random.randrange(1, 4)
        return value[:at] + [_changed(random, value[at])] + value[at + 1 :]
    if type(value) is int and random.random() < 0.5:
        return random.choice((1, -1)) * random.choice(NUMBERS) + random.randrange(-1, 2)
    if isinstance(value, str) and random.random() < 0.4:
        return damaged(random, value.encode("utf-8", "surrogatepass"), [b"abc"]).decode("utf-8", "replace")
    return random.choice(VALUES)


def lines_rewritten(random: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """JSON lines with one of them rewritten."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = rewritten(random, lines[at], others)
    return b"\n".join(lines)[:LONGEST]


def unpacked(mutate: Callable) -> Callable:
    """The same on what a gzip file holds, half of the times."""

    def mutated(random: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
        try:
            inner = gzip.decompress(content) if random.random() < 0.5 else None
        except (OSError, EOFError, zlib.error):
            inner = None
        if inner is None:
            return damaged(random, content, others)
        return gzip.compress(mutate(random, inner, [inner]), 1)

    return mutated


def words_rewritten(random: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Words of a command line, one each line, with some changed, dropped or taken from others."""
    words, pool = content.split(b"\n"), b"\n".join(others).split(b"\n")
    for _ in range(1 + int(random.expovariate(1.0))):
        at, way = random.randrange(len(words) + 1), random.randrange(5)
        if way == 0:
            words[at : at + 1] = []
        elif way == 1:
            words[at:at] = [random.choice(pool)]
        elif way == 2:
            words[at : at + 1] = [str(random.choice(VALUES)).encode("utf-8", "surrogatepass")]
        elif way == 3:
            words[at : at + 1] = [str(random.choice((1, -1)) * random.choice(NUMBERS)).encode()]
        elif at < len(words):
            words[at] = damaged(random, words[at], [b"--"])
    return b"\n".join(words)[:4096]
