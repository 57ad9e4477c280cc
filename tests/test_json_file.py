"""Claims: what cannot be used of JSON is a ValueError, whatever json.loads would make of it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rpt_jax.json_file import DEEPEST, parsed, parsed_text, read_object, write_json, write_whole
from rpt_jax.records import InputError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_values_are_those_of_json(encoding):
    value = {"a": [1, 2.5, None, True, "zwei \U0001f600 ]]]["], "b": {"c": '\\"['}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parsed(text.encode(encoding)) == parsed_text(text.encode(encoding)) == value
    assert parsed(json.dumps(value)) == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"9" * 5000, "nul", b"\xef\xbb\xbf"])
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        parsed(content)


@pytest.mark.parametrize("way", [bytes, lambda text: text.decode()])
def test_brackets_nest_so_deep_and_no_deeper(way):
    """Far below where Python itself gives up; those in texts count not."""
    for opening, closing, depth in ((b"[", b"]", 1), (b'{"a":', b"}", 1), (b'[{"b":', b"}]", 2)):
        deep = DEEPEST // depth
        parsed(way(opening * deep + b"1" + closing * deep))
        for more in (deep + 1, 100_000):
            with pytest.raises(ValueError, match=f"deeper than {DEEPEST}"):
                parsed(way(opening * more + b"1" + closing * more))
    assert parsed(way(b"[" + b",".join([b"[]"] * 500) + b"]")) == [[]] * 500
    assert parsed(way(b'"' + b"[" * 500 + b'"')) == "[" * 500
    assert parsed(way(b'["' + b'\\"' + b"[" * 500 + b'"]')) == ['"' + "[" * 500]


def test_halves_of_pairs_are_refused_where_texts_are_written_on():
    assert parsed(b'"\\ud83d"') == "\ud83d" and parsed_text(b'"\\ud83d\\ude00"') == "\U0001f600"
    for content in (b'"\\ud83d"', b'{"\\uDE00": 1}', '["\\ud83dx"]'.encode("utf-16")):
        with pytest.raises(ValueError, match="surrogates"):
            parsed_text(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .*a.json: copy it"),
        (b"{", "a.json is no JSON .*: copy it"),
        (b'{"a": "\\ud83d"}', "a.json is no JSON .*surrogates.*: copy it"),
        (b"[1]", "a.json: expected a JSON object, found list: copy it"),
        (b'{"a": 1}', "a.json has no 'b': it is not what this program wrote, copy it"),
    ],
)
def test_a_file_is_an_object_with_the_keys_or_the_message_names_it(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_object(path, "a", "b", remedy="copy it")
    path.write_bytes(b'{"a": 1, "b": null}')
    assert read_object(path, "a", "b") == {"a": 1, "b": None}


def test_an_object_comes_back_and_one_that_is_none_leaves_the_old(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"a": [1, "\u2028 é"]})
    for content in ({"a": object()}, {"a": "\ud83d" * 2, "b": {1, 2}}):
        with pytest.raises(TypeError):
            write_json(path, content)
    assert read_object(path) == {"a": [1, "\u2028 é"]} and [each.name for each in path.parent.iterdir()] == ["a.json"]


def test_many_writers_of_one_file_get_in_nobodys_way(tmp_path):
    path, texts = tmp_path / "a.json", [str(number) * 10_000 for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write_whole, path, text) for _ in range(100) for text in texts]:
            done.result()
    assert path.read_text() in texts and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_links_are_followed_and_devices_stay(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "link.json").symlink_to("a.json")
    write_whole(tmp_path / "link.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and (tmp_path / "link.json").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_whole(tmp_path / "pipe", "piped")
        assert read.result() == "piped" and (tmp_path / "pipe").is_fifo()
