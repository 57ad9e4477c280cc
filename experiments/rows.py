"""Tables of results: a CSV file, a row for each run; sweeps ask for the rows that are there and skip those."""

import csv
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows that are there; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict) -> None:
    """Adds a row and prints it."""
    change_rows(path, lambda there: [*there, row])
    print(json.dumps(row), flush=True)


def replace_rows(path: Path, rows: Sequence[dict], keys: Sequence[str]) -> None:
    """Adds rows in place of those that are there and have the values of one of them in the columns `keys`."""

    def key_of(row: dict) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in keys)

    made_anew = {key_of(row) for row in rows}
    change_rows(path, lambda there: [*(row for row in there if key_of(row) not in made_anew), *rows])


def change_rows(path: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Writes what `change` makes of the rows; columns that only some rows have are left empty in the others.

    The table is written whole or not at all, and processes side by side on one machine wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # ends with the file descriptor
        rows = change(read_rows(path))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    finally:
        os.close(folder)
