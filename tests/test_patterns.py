"""Claims: keywords count as whole words, once a response; shares, intervals and differences are those of the formulas,
by hand and as published; the command reads runs and files, and says what is wrong with them."""

import json
import math

import pytest
from scipy.stats import norm

from rpt_jax import cli
from rpt_jax.records import InputError
from rpt_jax.study import patterns
from rpt_jax.study.patterns import compare, contains, count, wilson


@pytest.mark.parametrize(
    ("text", "keyword", "is_there"),
    [
        ("Otherwise we stop", "otherwise", True),
        ("notherwise", "otherwise", False),
        ("otherwise_so", "otherwise", False),
        ("(otherwise)", "otherwise", True),
        ("it could be neither", "either", False),
        ("waiting for more", "wait", False),
        ("Wait, 7?", "wait", True),
        ("a, b, etc.", "etc.", True),
        ("a, b, etc.)", "etc.", True),
        ("a, b, etc and more", "etc.", False),
        ("fetc.", "etc.", False),
        ("etcX", "etc.", False),
        ("let me break this down", "break this down", True),
        ("let me break\n  this down", "break this down", True),
        ("let me break this down", "break down", False),
        ("break downs", "break down", False),
        ("SOMETHING LIKE x", "something like", True),
        ("", "wait", False),
    ],
)
def test_keywords_are_whole_words(text, keyword, is_there):
    assert contains(text, (keyword,)) is is_there


def test_groups_are_counted_once_a_response():
    texts = ["wait, wait: looking back, probably 7", "Finally 7. In conclusion 7.", "7", "alternatively, probably 8"]
    assert count(texts) == {
        "transition": 1,
        "reflection": 1,
        "breakdown": 0,
        "hypothesis": 2,
        "divergent": 0,
        "deduction": 1,
        "any": 3,
    }


def test_every_keyword_of_the_paper_is_found_in_its_group_alone():
    for group, keywords in patterns.GROUPS.items():
        for keyword in keywords:
            found = count([f"so, {keyword} it is"])
            assert {name for name, number in found.items() if number} == {group, "any"}


def test_intervals_as_published():
    """Newcombe, Statistics in Medicine 17 (1998): 81/263 by Wilson, page 857; 56/70 against 48/80 by method 10, 873."""
    assert pytest.approx(norm.ppf(0.975), abs=1e-6) == patterns.Z
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    figures = compare((56, 70), (48, 80))
    assert figures["difference"] == pytest.approx(0.2)
    assert (figures["difference_low"], figures["difference_high"]) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_comparison_by_hand():
    """9 of 10 against 3 of 10: 60 points more, three times as many; against none no relative change."""
    figures = compare((9, 10), (3, 10))
    assert (figures["share"], figures["against"], figures["responses"]) == (0.9, 0.3, 10)
    assert figures["difference"] == pytest.approx(0.6) and figures["relative_change"] == pytest.approx(2.0)
    swapped = compare((3, 10), (9, 10))
    assert swapped["difference_low"] == pytest.approx(-figures["difference_high"])
    assert swapped["difference_high"] == pytest.approx(-figures["difference_low"])
    assert compare((9, 10), (0, 10))["relative_change"] is None
    assert "against" not in compare((1, 2), None)


@pytest.mark.parametrize(("found", "there"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 50)])
def test_wilson_bounds_solve_the_score_equation(found, there):
    """Each bound q inside (0, 1) is where |p - q| = z sqrt(q (1 - q) / n)."""
    p, bounds = found / there, wilson(found, there)
    assert 0 <= bounds[0] <= p <= bounds[1] <= 1
    for q in bounds:
        assert abs(p - q) == pytest.approx(patterns.Z * math.sqrt(q * (1 - q) / there), abs=1e-9)


@pytest.fixture
def files(tmp_path):
    """A run whose thoughts say probably from step 2 on, and other responses."""
    rows = [{"step": step, "thought": "probably 7" if step > 1 else "7"} for step in (1, 1, 2, 3)]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"response": text}) + "\n" for text in ("probably", "finally", "x", "y")))
    return folder, other


def test_the_command(files, capsys):
    run, other = files
    assert cli.main(["patterns", str(run), "--against", str(other), "--against-field", "response", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == [*patterns.GROUPS, "any"]
    hypothesis = figures["hypothesis"]
    assert (hypothesis["share"], hypothesis["against"], hypothesis["relative_change"]) == (0.5, 0.25, 1.0)
    assert hypothesis["keywords"] == {"probably": 2, "something like": 0}
    assert cli.main(["patterns", str(run), "--from-step", "2", "--to-step", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hypothesis", "100.0", "(20.7", "to", "100.0)", "1"] in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no run named"),
        (("none",), "no responses in 'none'"),
        (("{run}", "--field", "response"), "rollouts.jsonl:1: a row without 'response'"),
        (("{run}", "--field", "step"), "rollouts.jsonl:1: field 'step' is int, not text"),
        (("{run}", "--from-step", "9"), "none of 4 rows lies between the steps"),
        (("{other}", "--field", "response", "--from-step", "1"), "other.jsonl:1: no `step`"),
    ],
)
def test_what_cannot_be_counted_is_said(files, capsys, words, message):
    run, other = files
    assert cli.main(["patterns", *(word.format(run=run, other=other) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_rows_is_said(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="a.jsonl has no rows"):
        patterns.read_responses(str(tmp_path / "a.jsonl"), "thought")
