"""Claims: a table comes back by its columns, and what is none is said."""

import pytest

from rpt_jax.records import InputError
from rpt_jax.scaling.table import read_rows


def test_rows_by_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,"x\ny"\r\n2,\r\n')
    assert read_rows(tmp_path / "a.csv") == [{"a": "1", "b": "x\ny"}, {"a": "2", "b": ""}]
    (tmp_path / "a.csv").write_bytes(b"")
    assert read_rows(tmp_path / "a.csv") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\xff\n", "a.csv is no table"),
        (b"a,b\n1," + b"x" * 200_000 + b"\n", "a.csv is no table .*field larger"),
        (b"a,b\n1\n", "a.csv:2: a row with more or fewer than 2 columns"),
        (b"a,b\n1,2\n1,2,3\n", "a.csv:3: a row with more or fewer than 2 columns"),
        (b"a,a\n1,2\n", "two columns have one name"),
    ],
)
def test_what_is_no_table_is_said(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "a.csv")
