"""Tables of results: a CSV file, a row for each run; sweeps ask for the rows that are there and skip those."""

import csv
import json
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows that are there; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict) -> None:
    """Adds a row and prints it; columns that only some rows have are left empty in the others."""
    rows = [*read_rows(path), row]
    columns = list(dict.fromkeys(name for each in rows for name in each))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(row), flush=True)
