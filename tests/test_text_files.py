"""Every kind of file gives the same records, at random and in order; unreadable ones are named."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from rpt_jax.corpus.text_files import fetch, fields_of, matching_files, open_file, scan
from rpt_jax.records import InputError

RECORDS = [{"text": f"document {i}\n日本 😀" * (i + 1), "n": str(i)} for i in range(5)]


def write_records(path, records=RECORDS):
    """Writes records as the suffix says."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines.splitlines():
            writer.write(line)
        writer.close()
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrayrecord", "a.array_record"])
def test_kinds_agree(tmp_path, name):
    file = open_file(write_records(tmp_path / name), ("n", "text"))
    found = list(scan(file))
    assert [number for number, _, _ in found] == [1, 2, 3, 4, 5]
    assert [fields_of(file, raw, ("n", "text")) for _, _, raw in found] == RECORDS
    for _, place, raw in reversed(found):
        assert fields_of(file, fetch(file, place), ("text",))["text"] == fields_of(file, raw, ("text",))["text"]


def test_text_file_is_one_record(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n日".encode())
    file = open_file(str(tmp_path / "a.txt"), ("text",))
    assert [fields_of(file, raw, ("text",)) for _, _, raw in scan(file)] == [{"text": "one\r\ntwo\n日"}]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    file = open_file(str(tmp_path / "a.txt"), ("text",))
    assert [fields_of(file, raw, ("text",)) for _, _, raw in scan(file)] == [{"text": "one"}]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_as_others_write_them(tmp_path, pack):
    """A byte-order mark, CRLF, blank lines and no newline at the end are no fault; numbers count every line."""
    path = tmp_path / ("a.jsonl" if pack is bytes else "a.jsonl.gz")
    path.write_bytes(pack(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\n\n{"text": "c"}'))
    file = open_file(str(path), ("text",))
    found = list(scan(file))
    assert [number for number, _, _ in found] == [1, 4, 6]
    for access in (lambda place, raw: raw, lambda place, raw: fetch(file, place)):
        assert [fields_of(file, access(place, raw), ("text",))["text"] for _, place, raw in found] == ["a", "b", "c"]


def test_patterns_keep_their_order_and_name_no_file_twice(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b, c, d = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c[1].jsonl", "deep/d.jsonl"))
    assert matching_files((b, str(tmp_path / "*.jsonl"))) == [b, a, c]
    assert matching_files((c, str(tmp_path / "**" / "d.jsonl"))) == [c, d]
    (tmp_path / "link.jsonl").symlink_to(a)
    assert matching_files((a, str(tmp_path / "deep" / ".." / "a.jsonl"), str(tmp_path / "link.jsonl"), b)) == [a, b]


def test_patterns_without_files(tmp_path):
    with pytest.raises(InputError, match="corpus.files is empty: give paths or globs"):
        matching_files(())
    with pytest.raises(InputError, match=r"no file matches '.*/\*\.jsonl' \(looked from /"):
        matching_files((str(tmp_path / "*.jsonl"),))
    with pytest.raises(InputError, match=r"is a folder; name the files in it, for example .*/\*\.jsonl"):
        matching_files((str(tmp_path),))


@pytest.mark.parametrize("content", [b"", b"hello " * 20])
@pytest.mark.parametrize("suffix", [".parquet", ".arrayrecord"])
def test_files_that_are_not_what_they_say(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=rf"a{suffix}: not a readable {suffix} file .*; write it again, or name it"):
        open_file(str(tmp_path / f"a{suffix}"), ("text",))


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_records(path)
    whole = path.read_bytes()
    for content in (b"hello", whole[:-9], whole[:10] + b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a.jsonl.gz: not a readable .jsonl.gz file"):
            open_file(str(path), ("text",))


def test_unknown_suffix_and_missing_column(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv: unknown suffix; corpus files end in \.jsonl, \.jsonl\.gz"):
        open_file(str(tmp_path / "a.csv"), ("text",))
    path = write_records(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no field 'body', .*; there are 'text', 'n'"):
        open_file(path, ("text", "body"))


def test_columns_of_one_name(tmp_path):
    column = pyarrow.array(["a"])
    twice = pyarrow.Table.from_arrays([column, column, column], names=["text", "text", "n"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: 2 columns are called 'text': rename all but one"):
        open_file(str(tmp_path / "a.parquet"), ("text",))
    assert fields_of(open_file(str(tmp_path / "a.parquet"), ("n",)), 0, ("n",)) == {"n": "a"}


@pytest.mark.parametrize("kind", [pyarrow.date32(), pyarrow.timestamp("us")])
def test_values_that_python_has_no_like_of(tmp_path, kind):
    """Years beyond 9999 and the like: a ValueError, which readers put into words."""
    numbers = pyarrow.array([2**31 - 1 if kind == pyarrow.date32() else 2**62])
    if kind == pyarrow.date32():
        numbers = numbers.cast(pyarrow.int32())
    pyarrow.parquet.write_table(pyarrow.table({"text": numbers.view(kind)}), tmp_path / "a.parquet")
    with pytest.raises(ValueError):
        fields_of(open_file(str(tmp_path / "a.parquet"), ("text",)), 0, ("text",))


def test_records_nested_too_deep(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    file = open_file(str(tmp_path / "a.jsonl"), ("text",))
    with pytest.raises(ValueError, match="nest deeper"):
        fields_of(file, next(scan(file))[2], ("text",))


def test_what_libraries_say_is_one_line(tmp_path):
    path = write_records(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-60] + bytes(52) + whole[-8:])
    with pytest.raises(InputError, match="not a readable .parquet file") as raised:
        open_file(path, ("text",))
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"no file matches 'a\\x00b'"):
        matching_files(("a\0b",))
