"""Thoughts -> how many of them show each pattern of reasoning, by keywords [RPT, arXiv 2506.08007, section 4.5].

In: rollouts.jsonl of a run and, to compare with, another .jsonl of responses: the paper sets thoughts about the next
token against the same policy's ordinary problem solving. Out: the share of responses with a keyword of each group,
with intervals, their difference and the change by which the paper reports it.

The paper lists keywords and does not say how they are matched. Here: whole words in any case (so `wait` is not found in
`waiting`, nor `either` in `neither`), white space of any kind between the words of one, and the full stop of `etc.`
has to be there. A keyword is not understood: `conclusion` counts wherever it stands.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpt_jax.records import InputError
from rpt_jax.study.report import parse_rows, run_in, whole_lines

GROUPS = {  # the paper's, in its order
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent": ("etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring", "options"),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}
Z = 1.959964  # standard normal quantile of 97.5 %


@dataclass(frozen=True)
class PatternsRun:
    """Shares of responses that show a pattern of reasoning, by keywords, with 95 % intervals."""

    against: str = ""  # .jsonl of other responses, or a run folder, to compare with; empty: none
    field: str = "thought"  # of a row of RUN: the response
    against_field: str = "thought"  # of a row of `against`
    from_step: int = 0  # rollouts of RUN from this update on
    to_step: int = 0  # and up to this one; 0: the last


def run(place: str, config: PatternsRun) -> dict[str, dict]:
    """Figures of each group and of `any` of them: see compare; raises InputError where there is nothing to count."""
    if not place:
        raise InputError("patterns: no run named: give the folder of a run or a .jsonl file, `rpt patterns RUN`")
    ours = read_responses(place, config.field, config.from_step, config.to_step or math.inf)
    others = read_responses(config.against, config.against_field) if config.against else None
    found, found_others = count(ours), None if others is None else count(others)
    figures = {}
    for group in (*GROUPS, "any"):
        other = None if others is None else (found_others[group], len(others))
        figures[group] = compare((found[group], len(ours)), other)
    for group, keywords in GROUPS.items():
        figures[group]["keywords"] = {word: sum(contains(text, (word,)) for text in ours) for word in keywords}
    return figures


def read_responses(place: str, name: str, first: float = 0, last: float = math.inf) -> list[str]:
    """The field of all rows of a .jsonl file, or of the rollouts.jsonl of a run, in which it is a string.

    With first or last given, of rows whose `step` lies there. Raises InputError naming file, line and field.
    """
    path = Path(place)
    path = run_in(path) / "rollouts.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no responses in {str(path)!r}: give the folder of a run that logs rollouts or a .jsonl file")
    lines = whole_lines(path)
    bounded = first > 0 or last < math.inf
    rows = parse_rows(path, lines, range(len(lines)), needs=name)
    if not rows:
        raise InputError(f"{path} has no rows: give a run that logs rollouts (rollouts_logged), or another file")
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row[name], str):
            raise InputError(f"{path}:{number}: field {name!r} is {type(row[name]).__name__}, not text: name another")
        if bounded and not isinstance(row.get("step"), (int, float)):
            raise InputError(f"{path}:{number}: no `step`, so from_step and to_step mean nothing: leave them out")
        if not bounded or first <= row["step"] <= last:
            texts.append(row[name])
    if not texts:
        raise InputError(f"{path}: none of {len(rows)} rows lies between the steps asked for: choose others")
    return texts


def contains(text: str, keywords: Sequence[str]) -> bool:
    """Whether one of the keywords stands in the text, as whole words in any case."""
    return any(_pattern(keyword).search(text) for keyword in keywords)


def count(texts: Sequence[str]) -> dict[str, int]:
    """How many texts show each group; `any`: how many show one at least."""
    shows = [{group for group, keywords in GROUPS.items() if contains(text, keywords)} for text in texts]
    return {group: sum(group in each for each in shows) for group in GROUPS} | {"any": sum(map(bool, shows))}


def compare(ours: tuple[int, int], others: tuple[int, int] | None) -> dict:
    """Share and interval of (found, responses), and beside another pair the difference and the relative change.

    Intervals are 95 % ones for independent responses: Wilson's of a share, Newcombe's of a difference [Statistics in
    Medicine 17 (1998), 873-890, method 10]. Rollouts of one position are not quite independent: true ones are wider.
    The relative change, (ours - theirs) / theirs, is what the paper reports; None where theirs is 0.
    """
    (low, high), share = wilson(*ours), ours[0] / ours[1]
    figures = {"share": share, "low": low, "high": high, "responses": ours[1]}
    if others is None:
        return figures
    (other_low, other_high), other = wilson(*others), others[0] / others[1]
    difference = share - other
    return figures | {
        "against": other,
        "against_low": other_low,
        "against_high": other_high,
        "against_responses": others[1],
        "difference": difference,
        "difference_low": difference - math.hypot(share - low, other_high - other),
        "difference_high": difference + math.hypot(high - share, other - other_low),
        "relative_change": difference / other if other else None,
    }


def wilson(found: int, there: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, scale = found / there, 1 + Z * Z / there
    middle = (p + Z * Z / (2 * there)) / scale
    reach = Z * math.sqrt(p * (1 - p) / there + Z * Z / (4 * there * there)) / scale
    return min(p, max(0.0, middle - reach)), max(p, min(1.0, middle + reach))  # rounding must not exclude p


def shown(figures: Mapping[str, Mapping]) -> dict[str, dict]:
    """The figures as a table for people: shares in per cent, with their intervals."""
    rows = {}
    for group, of in figures.items():
        rows[group] = {"share, %": _share(of, "share", "low", "high"), "responses": of["responses"]}
        if "against" in of:
            change = of["relative_change"]
            rows[group] |= {
                "against, %": _share(of, "against", "against_low", "against_high"),
                "its responses": of["against_responses"],
                "difference, points": _share(of, "difference", "difference_low", "difference_high", sign="+"),
                "relative": "-" if change is None else f"{100 * change:+.1f} %",
            }
    return rows


def _share(of: Mapping, name: str, low: str, high: str, sign: str = "") -> str:
    value, start, end = (f"{100 * of[key]:{sign}.1f}" for key in (name, low, high))
    return f"{value}  ({start} to {end})"


def _pattern(keyword: str) -> re.Pattern:
    words = r"\s+".join(re.escape(word) for word in keyword.split())
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)  # re keeps the compiled ones
