"""Tables of results: a CSV file, a row for each run; sweeps ask for the rows that are there and skip those."""

import csv
import fcntl
import json
import os
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows that are there; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict) -> None:
    """Adds a row and prints it; columns that only some rows have are left empty in the others.

    The table is written whole or not at all, and processes side by side on one machine wait for each other.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # ends with the file descriptor
        rows = [*read_rows(path), row]
        columns = list(dict.fromkeys(name for each in rows for name in each))
        part = path.with_name(f".{path.name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)
    finally:
        os.close(folder)
    print(json.dumps(row), flush=True)
