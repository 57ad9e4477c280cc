"""A CSV table of results -> its rows, with what is wrong with it said in words."""

import csv
from pathlib import Path

from rpt_jax.records import InputError


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows by the names of the first line; raises InputError for what is no table, or a row of another length."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (ValueError, csv.Error) as error:  # no UTF-8, zero bytes, a field of megabytes
        raise InputError(f"{path} is no table ({error}): give the csv file that `rpt sweep` has written") from error
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two columns have one name: give the csv file that `rpt sweep` has written")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path}:{number}: a row with more or fewer than {len(names)} columns: mend or delete it")
    return rows
