"""Run folders -> one HTML page to read offline: settings, curves, held-out figures, fits, and the rollouts themselves.

In: the files that a run writes (learning/run_folder.py); for a quickstart's folder also its table of controls. Out: a
file that holds all it shows, style and script included (report_page/), and fetches nothing.

What a policy says is not to be trusted: all data lie in one JSON block in which no `<` stands, the script puts text in
as text nodes only, and the page's content policy lets no other script run.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import rpt_jax
from rpt_jax.config import Config
from rpt_jax.config_dict import to_dict
from rpt_jax.json_file import parsed, read_object, write_whole
from rpt_jax.learning.run_rows import flat
from rpt_jax.records import InputError

SCRIPTS = ("base.js", "charts.js", "tables.js", "rollouts.js")
FIT = {"A", "alpha", "P_star"}  # keys by which a fit is known, in any .json of the folder
DECIMALS = 3  # of token log-probs in the page


@dataclass(frozen=True)
class ReportConfig:
    """One HTML page of one or several runs, readable offline; *.fit.json of `rpt fit` may be named beside them."""

    output: str = ""  # file to write; empty: report.html in the run's folder, of several comparison.html in the first
    rollouts: int = 5000  # at most so many in the page, evenly spread over each run; 0: all
    megabytes: float = 20.0  # of rollouts at most, evenly thinned


def write_report(given: Sequence[str], config: ReportConfig) -> dict:
    """Writes the page of run folders, and of files of fits among them, and returns what is in it.

    Raises InputError where a folder holds no run, a file no rows, or a .json file no fit.
    """
    fits = [fit for place in given if Path(place).is_file() for fit in given_fits(Path(place))]
    folders = [place for place in given if not Path(place).is_file()]
    if not folders:
        raise InputError("report: no run named: give the folder of a run, `rpt report RUN`")
    if config.rollouts < 0 or not config.megabytes > 0:
        raise InputError(f"rollouts={config.rollouts}, megabytes={config.megabytes}: use 0 or more, and more than 0")
    runs = [read_run(Path(folder)) for folder in folders]
    labels = distinct_labels([(run["config"]["name"], Path(run["folder"])) for run in runs])
    share = config.rollouts // len(runs) if config.rollouts else None
    rollouts = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        path = Path(run["folder"]) / "rollouts.jsonl"
        there, rows = read_rollouts(path, share, config.megabytes * 1e6 / len(runs))
        run |= {"label": label, "rollouts_there": there, "rollouts_here": len(rows)}
        rollouts += [row | {"run": number} for row in rows]
    title = labels[0] if len(runs) == 1 else f"Comparison of {', '.join(labels[:-1])} and {labels[-1]}"
    data = {
        "version": rpt_jax.__version__,
        "runs": runs,
        "rollouts": rollouts,
        "fits": fits,
        "defaults": flat(to_dict(Config())),
    }
    path = Path(config.output or Path(folders[0]) / ("report.html" if len(runs) == 1 else "comparison.html"))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = page(title, data)
    write_whole(path, text)
    return {
        "report": str(path),
        "runs": len(runs),
        "rollouts": len(rollouts),
        "rollouts_left_out": sum(run["rollouts_there"] for run in runs) - len(rollouts),
        "megabytes": round(len(text) / 1e6, 1),
    }


def read_run(folder: Path) -> dict:
    """What the page shows of a run, all but its rollouts; a folder of `rpt quickstart` stands for the run in it."""
    outer, folder = folder, run_in(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"no run in {str(folder)!r} (no config.json): give a folder that `rpt train` wrote")
    described = read_object(folder / "config.json", "config")
    config = described["config"]
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise InputError(f"{folder / 'config.json'}: its config has no name: it is not what `rpt train` wrote")
    results = read_object(outer / "results.json") if (outer / "results.json").is_file() else {}
    return {
        "folder": str(folder),
        "id": described.get("id"),
        "commit": described.get("commit"),
        "changed": bool(described.get("changed_since_commit")),
        "versions": described.get("versions", {}),
        "devices": described.get("devices", {}),
        "config": flat(config),
        "metrics": columns(read_rows(folder / "metrics.jsonl")),
        "evaluations": read_rows(folder / "evaluations.jsonl"),
        "comparison": comparison(results),
        "fits": [fit for place in dict.fromkeys((outer, folder)) for fit in read_fits(place)],
    }


def run_in(folder: Path) -> Path:
    """The run of a folder: itself, or of what `rpt quickstart` wrote the run inside."""
    inner = folder / "rpt"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def read_rows(path: Path) -> list[dict]:
    """All rows of a .jsonl file; see parse_rows."""
    lines = whole_lines(path)
    return parse_rows(path, lines, range(len(lines)))


def read_rollouts(path: Path, count: int | None, size: float) -> tuple[int, list[dict]]:
    """(rollouts in the file, those shown): at most `count`, and at most `size` bytes of page, evenly spread."""
    lines = whole_lines(path)
    chosen = evenly(len(lines), count)
    rows = [_compact(path, i, row) for i, row in zip(chosen, parse_rows(path, lines, chosen), strict=True)]
    sizes = [len(embedded(row)) for row in rows]
    kept = range(len(rows))
    while sum(sizes[i] for i in kept) > size:
        kept = evenly(len(rows), int(len(kept) * 0.95))
    return len(lines), [rows[i] for i in kept]


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file, without a last one that a crash cut short; none where there is no file.

    A last one without a line break that is whole JSON is kept: other programs end a file so.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    try:
        parsed(last)
    except ValueError:
        return lines
    return [*lines, last]


def parse_rows(path: Path, lines: Sequence[bytes], chosen: Iterable[int], needs: str = "step") -> list[dict]:
    """The rows that stand on some lines; raises InputError naming the line that is none, or lacks what a row needs."""
    rows = []
    for i in chosen:
        try:
            row = parsed(lines[i])
        except ValueError as error:  # no JSON, or no UTF-8
            raise InputError(f"{path}:{i + 1}: not a row of JSON ({error}): mend or delete this line") from error
        if not isinstance(row, dict) or needs not in row:
            raise InputError(f"{path}:{i + 1}: a row without {needs!r}: mend or delete this line, or name another file")
        rows.append(row)
    return rows


def evenly(there: int, count: int | None) -> list[int]:
    """`count` of range(there), evenly spread with both ends; all where there are no more, or count is None."""
    if count is None or there <= count:
        return list(range(there))
    return np.linspace(0, there - 1, count).round().astype(int).tolist()


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """name -> its value in each row, None where a row has none; names of numbers only, nested ones joined by "/"."""
    flats = [flat(row) for row in rows]
    names = dict.fromkeys(name for row in flats for name, value in row.items() if isinstance(value, (int, float)))
    return {name: [row.get(name) for row in flats] for name in names}


def distinct_labels(named: Sequence[tuple[str, Path]]) -> list[str]:
    """A label for each (name, folder): the name, or where others have it too as much of the folder as tells apart."""
    labels = []
    for name, folder in named:
        rivals = [other.resolve().parts for each, other in named if each == name]
        parts, length = folder.resolve().parts, 1
        while length < len(parts) and [rival[-length:] for rival in rivals].count(parts[-length:]) > 1:
            length += 1
        labels.append(name if len(rivals) == 1 else f"{name} ({'/'.join(parts[-length:])})")
    return labels


def comparison(results: Mapping) -> dict | None:
    """The table of a quickstart's results.json: {"splits": [(name, positions)], "rows": [(name, values, main)]}."""

    def mapping(value) -> Mapping:
        return value if isinstance(value, Mapping) else {}

    if "argmax_base" not in mapping(results.get("hard")):
        return None
    splits = {name: mapping(results[name]) for name in ("hard", "medium") if name in results}
    parts = mapping(results.get("parts_of_hard"))
    splits |= {name: mapping(of) for name, of in parts.items() if not name[-1:].isdigit()}
    rows = (
        ("base, arg-max", ("argmax_base",)),
        ("base, reasoning", ("reasoning_before",)),
        ("base, made to be careful", ("forced_careful_base",)),
        ("RPT, reasoning", ("reasoning_after",)),
        ("RPT, arg-max", ("argmax_after",)),
        ("control: next tokens, arg-max", ("control_next_token", "argmax")),
        ("control: next tokens, reasoning", ("control_next_token", "reasoning")),
        ("control: SFT, arg-max", ("control_sft", "argmax")),
        ("control: SFT, box without thought", ("control_sft", "reasoning")),
    )

    def value(split, keys):
        for key in keys:
            split = split.get(key) if isinstance(split, Mapping) else None
        return split

    return {
        "splits": [(name, of.get("positions")) for name, of in splits.items()],
        "rows": [
            (name, [value(of, keys) for of in splits.values()], keys == ("reasoning_after",)) for name, keys in rows
        ],
    }


def read_fits(folder: Path) -> list[dict]:
    """Fits in the folder's .json files; see fits_in."""
    paths = (path for path in sorted(folder.glob("*.json")) if path.name != "config.json")
    return [fit for path in paths for fit in fits_in(path)]


def fits_in(path: Path) -> list[dict]:
    """Fits of a .json file: whatever has A, alpha and P_star, [{"name": where it stands in the file, "values": it}].

    Such are those that `rpt fit` writes. What is a fit as a whole has the file's name.
    """
    found = []

    def look(name: str, content) -> None:
        if isinstance(content, Mapping) and content.keys() >= FIT:
            found.append({"name": name or path.stem, "values": dict(content)})
        elif isinstance(content, Mapping):
            for key, inside in content.items():
                look(f"{name}/{key}" if name else str(key), inside)

    look("", _json(path))
    return found


def given_fits(path: Path) -> list[dict]:
    """Fits of a file that was named; raises InputError where it has none."""
    if path.suffix != ".json" or not (found := fits_in(path)):
        raise InputError(f"{path} has no fit: give run folders, and of files those that `rpt fit` writes, *.fit.json")
    return found


def _json(path: Path):
    try:
        return parsed(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): make it again or leave it out") from error


def page(title: str, data: Mapping) -> str:
    """The HTML of the page, with everything inside."""
    folder = resources.files("rpt_jax.study") / "report_page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": embedded(data),
    }
    frame = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def embedded(data) -> str:
    """JSON that can stand inside a script element: ASCII alone, no `<`, `>` or `&`; what is not finite becomes null."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inside) for inside in value]
    return value


def _compact(path: Path, i: int, row: dict) -> dict:
    """The row of line i with what the page does not need of its numbers rounded away."""
    if row.get("pieces") is None:
        return row
    try:
        return row | {"pieces": [(text, None if p is None else round(p, DECIMALS)) for text, p in row["pieces"]]}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}:{i + 1}: `pieces` is no list of [text, log-prob] ({error}): mend or delete this line"
        ) from error


def _digest(content: str) -> str:
    """What a content policy calls an inline element by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
