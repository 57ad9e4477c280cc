"""The rows that a run has written, a JSON object a line, back from disk."""

from pathlib import Path
from typing import Any

from rpt_jax.json_file import parsed
from rpt_jax.records import InputError


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file; a last line that a crash cut short is left out.

    Raises InputError, naming the line, for another one that is no row of a step.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # what follows the last line break is no whole row
    return [_row(f"{path}:{number}", line) for number, line in enumerate(lines[:-1], 1) if line]


def _row(where: str, line: bytes) -> dict:
    try:
        row = parsed(line)
    except ValueError as error:
        raise InputError(f"{where}: not a row of JSON ({error}): mend or delete this line") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise InputError(f"{where}: a row without the number of its step: mend or delete this line")
    return row


def flops_spent(folder: Path, step: int) -> float:
    """What a run has spent up to `step` by its rows, for checkpoints that do not say it; 0 where there are no rows."""
    path = Path(folder) / "metrics.jsonl"
    try:
        spent = [row["flops_sample"] + row["flops_update"] for row in read_rows(path) if row["step"] <= step]
        return float(sum(spent))
    except (ArithmeticError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a row does not say what it has spent ({error!r}): mend or delete it") from error


def flat(row: dict, prefix: str = "", joint: str = "/") -> dict[str, Any]:
    """Nested names joined by `joint`."""
    out = {}
    for name, value in row.items():
        inner = isinstance(value, dict)
        out |= flat(value, f"{prefix}{name}{joint}", joint) if inner else {f"{prefix}{name}": value}
    return out
