"""Claims: the page holds the run's own numbers and texts, whatever these contain; no text gets to be markup or script;
nothing is fetched; files that are damaged or missing are named. test_report_page.py opens pages in a browser."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
import toy

from rpt_jax import cli
from rpt_jax.config_dict import to_dict
from rpt_jax.records import InputError
from rpt_jax.study import report
from rpt_jax.study.report import ReportConfig, write_report

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.broken = 1'>",
    "\"'`${window.broken = 1}\\\u2028\u2029\x00\x1b",
    "\ud83d lone, {{data}} {{script}} &lt;b&gt; ]]>",
]
WORDS = ("alpha", "beta", "gamma", "delta")


def rollout(i: int, **more) -> dict:
    """A rollout whose outcome, entropy, step and words follow from its number."""
    right, answered = i % 3 == 0, i % 3 != 2
    row = {
        "step": i // 40 + 1,
        "document": i,
        "index": 7,
        "entropy": (i % 41) / 20,
        "member": i % 8,
        "context": f"context {i} of {WORDS[i % 4]} " * 4,
        "thought": f"a thought of {WORDS[i % 4].upper() if i % 5 else 'epsilon'} that goes on for a while " * 6,
        "prediction": (" 7" if right else " 8\n") if answered else None,
        "truth": " 7",
        "continuation": " 7 and so on",
        "reward": 1.0 if right else 0.0,
        "finished": answered,
        "tokens": 10 + i % 9,
    }
    return row | more


def write_run(folder, rollouts, *, steps=30, learning_rate=1e-4, name="toy"):
    folder.mkdir(parents=True)
    config = to_dict(toy.config(folder, name=name, update=toy.UpdateConfig(learning_rate=learning_rate)))
    described = {"config": config, "id": "1a2b", "commit": "c0ffee" * 6, "devices": {"kind": "cpu", "count": 2}}
    (folder / "config.json").write_text(json.dumps(described))
    metrics = [
        {"step": s, "reward": s / 99, "accuracy": s / 100, "format_rate": 0.5, "loss": float("nan"), "seconds": 2.0}
        for s in range(1, steps + 1)
    ]
    figures = {"argmax": 0.125, "reasoning": 0.25, "pass_at_k": 0.5, "format_rate": 0.75, "response_length": 9.5}
    figures |= {"positions": 64, "standard_error": 0.0625, "standard_errors": {"reasoning": 0.0625}}
    evaluations = [
        {"step": s, "easy": figures, "hard": figures | {"reasoning": 0.25 + s / 64, "argmax": None}} for s in (0, 16)
    ]
    for stream, rows in (("metrics", metrics), ("evaluations", evaluations), ("rollouts", rollouts)):
        (folder / f"{stream}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Elements(html.parser.HTMLParser):
    """(tag, attributes, text) of every element that has text of its own, as a browser reads it."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.policy = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]

        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, text):
        if self.found and self.is_open:
            self.found[-1][2] += text

    def texts(self, tag):
        return [text for name, _, text in self.found if name == tag]


def test_no_text_gets_out_of_its_block(tmp_path):
    """Hostile texts arrive whole, and the only scripts are the data and the page's own."""
    rows = [
        rollout(i, context=text, thought=text, prediction=text, pieces=[[text, -1]]) for i, text in enumerate(HOSTILE)
    ]
    run = write_run(tmp_path / "run", rows, name="</title><script>window.broken = 1</script>")
    figures = write_report([str(run)], ReportConfig())
    text = (run / "report.html").read_text()
    elements = Elements(text)
    block, script = elements.texts("script")
    data = json.loads(block)
    assert [row["thought"] for row in data["rollouts"]] == HOSTILE
    assert [row["pieces"] for row in data["rollouts"]] == [[[hostile, -1]] for hostile in HOSTILE]
    assert block.isascii() and not set("<>&") & set(block)
    assert "broken" not in script and elements.texts("title")[0] == "</title><script>window.broken = 1</script>"
    assert figures == {
        "report": str(run / "report.html"),
        "runs": 1,
        "rollouts": 5,
        "rollouts_left_out": 0,
        "megabytes": round(len(text) / 1e6, 1),
    }


def test_the_policy_allows_this_script_and_style_alone(tmp_path):
    """Of the content policy's digests each is that of the element, and there is no other permission."""
    run = write_run(tmp_path / "run", [rollout(0)])
    write_report([str(run)], ReportConfig())
    elements = Elements((run / "report.html").read_text())
    digests = [
        base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for content in (elements.texts("script")[1], elements.texts("style")[0])
    ]
    script, style = digests
    assert elements.policy == (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; "
        "form-action 'none'"
    )


def test_nothing_is_fetched(tmp_path):
    run = write_run(tmp_path / "run", [rollout(0)])
    write_report([str(run)], ReportConfig())
    text = (run / "report.html").read_text()
    assert set(re.findall(r"\w+://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\((?!#)|<link|\bsrc\s*=|fetch\(|XMLHttpRequest", text)


def test_numbers_are_those_of_the_files(tmp_path):
    """Columns with None where a row lacks a figure or it is not finite; evaluations and settings as they are."""
    run = write_run(tmp_path / "run", [], steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kl": 0.5, "more": {"depth": 2}}\n{"step": 5, "acc')  # the last line: a crash
    data = json.loads(report.embedded(report.read_run(run)))
    assert data["metrics"]["step"] == [1, 2, 3, 4] and data["metrics"]["accuracy"] == [0.01, 0.02, 0.03, None]
    assert data["metrics"]["loss"] == [None] * 4 and data["metrics"]["more/depth"] == [None, None, None, 2]
    assert [row["hard"]["reasoning"] for row in data["evaluations"]] == [0.25, 0.5]
    assert data["config"]["update/learning_rate"] == 1e-4 and data["config"]["prompt/template"] == "bare"
    assert data["devices"] == {"kind": "cpu", "count": 2} and data["comparison"] is None and data["fits"] == []


def test_rollouts_are_thinned_evenly(tmp_path):
    assert report.evenly(10, 4) == [0, 3, 6, 9] and report.evenly(3, 5) == [0, 1, 2] == report.evenly(3, None)
    run = write_run(tmp_path / "run", [rollout(i) for i in range(100)])
    there, rows = report.read_rollouts(run / "rollouts.jsonl", 5, 1e9)
    assert there == 100 and [row["document"] for row in rows] == [0, 25, 50, 74, 99]
    size = len(report.embedded(rows[0]))
    there, rows = report.read_rollouts(run / "rollouts.jsonl", None, 20 * size)
    numbers = [row["document"] for row in rows]
    assert there == 100 and 15 <= len(rows) <= 20 and (numbers[0], numbers[-1]) == (0, 99)
    gaps = [b - a for a, b in zip(numbers, numbers[1:], strict=False)]
    assert max(gaps) <= 3 * min(gaps)
    assert sum(len(report.embedded(row)) for row in rows) <= 20 * size


def test_labels_tell_runs_apart(tmp_path):
    named = [("a", tmp_path / "x" / "rpt"), ("b", tmp_path / "y"), ("a", tmp_path / "z" / "rpt")]
    assert report.distinct_labels(named) == ["a (x/rpt)", "b", "a (z/rpt)"]


def test_a_quickstart_brings_its_controls(tmp_path):
    """Its folder stands for the run inside; the table has the numbers of its results.json."""
    table = {"argmax_base": 0.1, "reasoning_before": 0.2, "reasoning_after": 0.9, "positions": 50}
    table["control_sft"] = {"argmax": 0.15, "reasoning": 0.05}
    results = {"hard": table, "medium": table | {"positions": 70}, "parts_of_hard": {"chain": table, "chain_2": table}}
    write_run(tmp_path / "quick" / "rpt", [rollout(0)])
    (tmp_path / "quick" / "results.json").write_text(json.dumps(results))
    shown = report.read_run(tmp_path / "quick")["comparison"]
    assert shown["splits"] == [("hard", 50), ("medium", 70), ("chain", 50)]
    rows = {name: values for name, values, _ in shown["rows"]}
    assert rows["RPT, reasoning"] == [0.9] * 3 and rows["control: SFT, box without thought"] == [0.05] * 3
    assert rows["base, made to be careful"] == [None] * 3
    write_report([str(tmp_path / "quick")], ReportConfig())
    assert (tmp_path / "quick" / "report.html").is_file()


def test_fits_are_found_by_their_keys(tmp_path):
    run = write_run(tmp_path / "run", [])
    fit = {"A": -2.0, "alpha": 0.3, "P_star": 0.8, "r2": 0.99, "verdict": "holds"}
    (run / "fit.json").write_text(json.dumps({"small": {"hard": fit, "easy": {"A": 1}}, "rows": [1, 2]}))
    (run / "whole.json").write_text(json.dumps(fit))
    small, whole = {"name": "small/hard", "values": fit}, {"name": "whole", "values": fit}
    assert report.read_run(run)["fits"] == [small, whole]


def test_what_rpt_fit_writes_can_be_given(tmp_path, capsys):
    """Beside a run, as the table's owner would: the page has its laws; a file without any is named."""
    run = write_run(tmp_path / "run", [])
    columns = "size,seed,steps,flops_sample,flops_update,hard.reasoning,hard.positions"
    rows = [f"s,{seed},{steps},{steps}e9,{steps}e9,0.5,400" for steps in (1, 4, 16, 64) for seed in (0, 1)]
    (tmp_path / "a.csv").write_text("\n".join([columns, *rows]) + "\n")
    assert cli.main(["fit", str(tmp_path / "a.csv"), "--sets", "100", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "a.fit.json").read_text()) == figures
    assert cli.main(["report", "--rollouts", "9", str(run), str(tmp_path / "a.fit.json")]) == 0
    data = json.loads(Elements((run / "report.html").read_text()).texts("script")[0])
    assert data["fits"] == [{"name": "s/hard", "values": figures["s"]["hard"]}] and len(data["runs"]) == 1
    capsys.readouterr()
    assert (
        cli.main(["report", str(run), str(tmp_path / "a.csv")]) == 2 and "a.csv has no fit" in capsys.readouterr().err
    )
    assert cli.main(["report", str(tmp_path / "a.fit.json")]) == 2 and "no run named" in capsys.readouterr().err


def test_a_last_row_without_line_break_counts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2}')
    (tmp_path / "b.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert [len(report.read_rows(tmp_path / f"{name}.jsonl")) for name in "ab"] == [2, 1]


@pytest.mark.parametrize(
    ("stream", "line", "message"),
    [
        ("metrics", "{nan", r"metrics.jsonl:31: not a row of JSON"),
        ("evaluations", "[1]", r"evaluations.jsonl:3: a row without 'step'"),
        ("rollouts", '{"thought": ""}', r"rollouts.jsonl:2: a row without 'step'"),
        ("rollouts", '{"step": 1, "pieces": [["a", "b"]]}', r"rollouts.jsonl:2: `pieces` is no list"),
        ("rollouts", '{"step": 1, "pieces": [["a"]]}', r"rollouts.jsonl:2: `pieces` is no list"),
        ("rollouts", '{"step": 1, "pieces": 7}', r"rollouts.jsonl:2: `pieces` is no list"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, stream, line, message):
    run = write_run(tmp_path / "run", [rollout(0)])
    with (run / f"{stream}.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        write_report([str(run)], ReportConfig())
    assert not (run / "report.html").exists()


def test_what_cannot_be_reported_is_said(tmp_path, capsys):
    for words, message in (
        ([], "no run named"),
        ([tmp_path], "no run in"),
        ([tmp_path, "--megabytes", "0"], "use 0 or more, and more than 0"),
    ):
        assert cli.main(["report", *map(str, words)]) == 2
        assert message in capsys.readouterr().err


def test_folders_may_stand_behind_flags(tmp_path):
    """Anywhere; the value of a flag is none of them."""
    runs = [str(write_run(tmp_path / name, [rollout(0)])) for name in "ab"]
    page = str(tmp_path / "x.html")
    for words in (["--output", page, *runs], [runs[0], f"--output={page}", runs[1]], [*runs, "--output", page]):
        assert cli.main(["report", *words]) == 0 and (tmp_path / "x.html").is_file()
        data = json.loads(Elements((tmp_path / "x.html").read_text()).texts("script")[0])
        assert [run["folder"] for run in data["runs"]] == runs
        (tmp_path / "x.html").unlink()


def test_the_command_compares_runs(tmp_path, capsys):
    """Several runs share the page and its rollouts; the report of the first alone is not written over."""
    runs = [
        write_run(tmp_path / name, [rollout(i) for i in range(20)], learning_rate=lr)
        for name, lr in (("a", 1e-4), ("b", 2e-4))
    ]
    assert cli.main(["report", *map(str, runs), "--rollouts", "10", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["runs"], figures["rollouts"], figures["rollouts_left_out"]) == (2, 10, 30)
    assert (
        figures["report"] == str(tmp_path / "a" / "comparison.html") and not (tmp_path / "a" / "report.html").exists()
    )
    data = json.loads(Elements((tmp_path / "a" / "comparison.html").read_text()).texts("script")[0])
    assert [run["label"] for run in data["runs"]] == ["toy (a)", "toy (b)"]
    assert [row["run"] for row in data["rollouts"]] == [0] * 5 + [1] * 5


@pytest.mark.parametrize("config", [[], {}, {"name": 7}, None])
def test_a_config_without_a_name_is_said(tmp_path, config):
    run = write_run(tmp_path / "run", [rollout(0)])
    (run / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(InputError, match="its config has no name"):
        write_report([str(run)], ReportConfig())


@pytest.mark.parametrize(
    "results",
    [
        {"hard": 7},
        {"hard": ["argmax_base"]},
        {"hard": {"argmax_base": 1}, "medium": 3, "parts_of_hard": {"": 1, "a": []}},
    ],
)
def test_results_of_any_shape_are_shown_or_passed_over(tmp_path, results):
    run = write_run(tmp_path / "run", [rollout(0)])
    (run / "results.json").write_text(json.dumps(results))
    assert write_report([str(run)], ReportConfig())["runs"] == 1


def test_values_nested_too_deep_are_said(tmp_path):
    run = write_run(tmp_path / "run", [rollout(0)])
    for name in ("metrics.jsonl", "extra.json"):
        (run / name).write_text('{"step": ' + '{"a": ' * 300 + "1" + "}" * 301 + "\n")
        with pytest.raises(InputError, match=f"{name}.*brackets nest deeper"):
            write_report([str(run)], ReportConfig())
        (run / name).unlink()
