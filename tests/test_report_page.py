"""Claims, in Chromium where it is installed with the extra `browser`: filters show what a plain loop over the rows
selects, curves have the values of metrics.jsonl, hostile texts are texts, and nothing runs over the edge of a phone."""

import json
import re
import shutil

import pytest
from test_report import HOSTILE, rollout, write_run

from rpt_jax.study.report import ReportConfig, write_report

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; skips the test where it, its driver or the extra `browser` is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra browser: pip install -e .[browser]")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs Chromium and its driver (on Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def show(browser, path, width):
    """Opens a page at a width in CSS pixels, waits until its script is through and the charts are drawn."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    until(browser, "document.documentElement.dataset.ready === 'yes'", True)
    undrawn = "[...document.querySelectorAll('.chart svg')].filter(plot => plot.clientWidth && !plot.firstChild)"
    until(browser, f"{undrawn}.length", 0)  # the observer of their sizes draws them with the page's first frame


def until(browser, expression, expected):
    """Waits for a value in the page: a minute, so that a busy machine is no failure."""
    code = f"return {expression}"
    for _ in range(1200):
        if (found := browser.execute_script(code)) == expected:
            return
        browser.execute_async_script("setTimeout(arguments[0], 50)")
    raise AssertionError(f"{expression} is {found!r}, not {expected!r}")


SET = """
    const [name, value] = arguments, field = document.getElementById(name);
    if (field.type !== "radio" && field.type !== "checkbox") {
        field.value = value;
        for (const event of ["input", "change"]) field.dispatchEvent(new Event(event));
    } else if (field.checked !== value) field.click();
"""


def choose(browser, **fields):
    """Sets form fields by id, with the events of a person doing so."""
    for name, value in fields.items():
        browser.execute_script(SET, name.replace("_", "-"), value)


def counted(count, there=5000):
    words = f"{count:,} rollout{'s' * (count != 1)} of {there:,}"
    return words + (", the first 40 below" if count > 40 else "")


COUNTS = "document.getElementById('counts').textContent"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_of_five_thousand_rollouts(browser, tmp_path, width):
    """Each filter, and all together, show what a loop over the rows selects."""
    rows = [rollout(i) for i in range(5000)]
    write_report([str(write_run(tmp_path / "run", rows))], ReportConfig())
    show(browser, tmp_path / "run" / "report.html", width)
    until(browser, COUNTS, counted(5000))
    outcomes = {
        "right": lambda row: row["reward"] == 1,
        "wrong": lambda row: row["reward"] != 1 and row["prediction"] is not None,
        "none": lambda row: row["prediction"] is None,
    }
    for name, is_so in outcomes.items():
        choose(browser, **{f"outcome_{name}": True})
        until(browser, COUNTS, counted(sum(map(is_so, rows))))
        assert browser.execute_script("return document.querySelectorAll('.rollout').length") == 40
        assert browser.execute_script(f"return document.querySelectorAll('.rollout.{name}').length") == 40
    choose(browser, outcome_all=True)
    for level, above in (("easy", 0.5), ("medium", 1.0), ("hard", 1.5)):
        choose(browser, level=level)
        until(browser, COUNTS, counted(sum(row["entropy"] > above for row in rows)))
    choose(browser, level="any", search="EPSILON")
    until(browser, COUNTS, counted(1000))
    choose(browser, **{"from": "10", "to": "12"}, outcome_right=True, level="hard", search="delta")
    selected = [
        row
        for row in rows
        if 10 <= row["step"] <= 12 and row["entropy"] > 1.5 and row["reward"] == 1 and "delta" in str(row).lower()
    ]
    assert 0 < len(selected) < 40
    until(browser, COUNTS, counted(len(selected)))
    headers = browser.execute_script("return [...document.querySelectorAll('.rollout header')].map(e => e.textContent)")
    shown = [int(re.search(r"document (\d+)", header)[1]) for header in headers]
    assert sorted(shown) == [row["document"] for row in selected]
    marks = browser.execute_script("return [...document.querySelectorAll('.rollout mark')].map(e => e.textContent)")
    assert marks and {mark.lower() for mark in marks} == {"delta"}
    choose(browser, search="nowhere to be found")
    until(browser, COUNTS, counted(0))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_rollouts_are_text(browser, tmp_path, width):
    """They show as they are, run nothing, fetch nothing, and long words do not widen the page."""
    texts = [*HOSTILE, "x" * 3000]
    rows = [
        rollout(i, context=text, thought=text, prediction=text, truth=text, continuation=text)
        for i, text in enumerate(texts)
    ]
    write_report([str(write_run(tmp_path / "run", rows, name="<b>x</b>"))], ReportConfig())
    show(browser, tmp_path / "run" / "report.html", width)
    choose(browser, order="earliest", all_settings=True)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('pre.thought')].map(e => e.textContent.toWellFormed())"
    )
    assert shown == [text.replace("\ud83d", "\ufffd") for text in texts]
    assert browser.execute_script("return [window.broken, document.images.length, document.scripts.length]") == [
        None,
        0,
        2,
    ]
    assert browser.execute_script("return document.querySelector('h1').textContent") == "<b>x</b>"
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_curves_and_tables_show_the_runs_numbers(browser, tmp_path):
    """A line has a point a row; arrow keys walk along it; the tables hold the evaluation and what differs."""
    pieces = [["sure ", -0.01], ["unsure", -2.5], [" lost", -9.0], [" end", None]]
    runs = [
        write_run(tmp_path / "a", [rollout(0, pieces=pieces)]),
        write_run(tmp_path / "b", [rollout(1)], steps=20, learning_rate=2e-4),
    ]
    write_report([str(run) for run in runs], ReportConfig())
    show(browser, tmp_path / "a" / "comparison.html", 1280)
    chart = (
        "[...document.querySelectorAll('.chart')].find(e => e.querySelector('strong').textContent === 'Right answers')"
    )
    until(browser, f"{chart}.querySelectorAll('path.line').length", 2)
    points = browser.execute_script(
        f"return [...{chart}.querySelectorAll('path.line')].map(e => e.getAttribute('d').match(/[ML]/g).length)"
    )
    assert points == [30, 20]
    assert (
        browser.execute_script(f"return {chart}.querySelector('.readout').textContent")
        == "toy (a) 30.0 %toy (b) 20.0 %update 30, 20"
    )
    for key in ("Home", "ArrowRight", "ArrowRight"):
        browser.execute_script(
            f"{chart}.querySelector('svg').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))"
        )
    assert (
        browser.execute_script(f"return {chart}.querySelector('.readout').textContent")
        == "toy (a) 3.0 %toy (b) 3.0 %update 3"
    )
    texts = "[...t.rows].map(r => [...r.cells].map(c => c.textContent))"
    choose(browser, axis="hours", window="3")  # the readout starts anew, and is beside the mean of three updates
    assert browser.execute_script(f"return {chart}.querySelector('.readout').textContent") == (
        "toy (a) 30.0 % (mean 29.5 %)toy (b) 20.0 % (mean 19.5 %)update 30, 20"
    )
    tables = dict(
        browser.execute_script(
            f"return [...document.querySelectorAll('table')].map(t => [t.caption.textContent, {texts}])"
        )
    )
    assert ["update.learning_rate", "1e-4", "2e-4"] in tables["Settings that differ between the runs"]
    assert not any(row[0] == "update.beta1" for row in tables["Settings that differ between the runs"])
    hard = [row for row in tables["Next-token accuracy on held-out positions"] if "16" in row][2:]
    assert len(hard) == 2 and all(
        row[2:] == ["16", "–", "50.0 %", "37.8 – 62.3", "6.25", "50.0 %", "75.0 %", "9.5", "64"] for row in hard
    )
    shades = browser.execute_script(
        "return [...document.querySelectorAll('.thought .piece')].map(e => [e.textContent, e.className])"
    )
    assert shades == [["sure ", "piece shade0"], ["unsure", "piece shade2"], [" lost", "piece shade5"]]


@pytest.mark.browser
def test_ticks_end_wherever_numbers_lie(browser, tmp_path):
    """One update at 1e16 FLOPs: the next whole number cannot be told apart from it; nor can others of one place."""
    run = write_run(tmp_path / "run", [], steps=1)
    (run / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5, "flops_sample": 1e16, "flops_update": 0}\n')
    write_report([str(run)], ReportConfig())
    show(browser, run / "report.html", 1280)
    browser.set_script_timeout(20)
    ends = ((3, 3 + 4.4e-16, 4), (1e16, 1e16, 4), (0, 0, 4), (-1, 1, 4), (0, 1e16, 4))
    assert [browser.execute_script("return ticks(...arguments)", *each) for each in ends] == [
        *([3], [1e16], [0], [-1, -0.5, 0, 0.5, 1]),
        [0, 5e15, 1e16],
    ]
    choose(browser, axis="flops")
    assert browser.execute_script("return document.querySelectorAll('.chart path.line').length") > 0


@pytest.mark.browser
def test_a_drag_that_is_broken_off_is_over(browser, tmp_path):
    """One that begins at update 0 is a drag, too, until the pointer is lost; only one that is let go zooms."""
    write_report([str(write_run(tmp_path / "run", []))], ReportConfig())
    show(browser, tmp_path / "run" / "report.html", 1280)
    drag = """
        const plot = document.querySelector(".chart svg"), box = plot.getBoundingClientRect();
        plot.setPointerCapture = () => {};
        const areas = [];
        for (const [kind, x] of arguments[0]) {
            const clientX = x < 0 ? box.left : box.right - 40;
            plot.dispatchEvent(new PointerEvent(kind, { clientX, pointerType: "mouse", pointerId: 1 }));
            areas.push(plot.querySelectorAll(".drag").length);
        }
        return [areas, document.getElementById("unzoom").hidden];
    """
    begun = [["pointerdown", -1], ["pointermove", 1], ["pointerleave", 1]]
    for lost in ("pointercancel", "lostpointercapture"):
        events = [*begun, [lost, 1], ["pointermove", 1], ["pointerup", 1]]
        assert browser.execute_script(drag, events) == [[0, 1, 1, 0, 0, 0], True]
    assert browser.execute_script(drag, [*begun, ["pointerup", 1]])[1] is False


@pytest.mark.browser
def test_a_rollout_without_entropy_is_of_no_difficulty(browser, tmp_path):
    rows = [rollout(0, entropy=None), rollout(1, entropy=0.25), rollout(2, entropy=0.75)]
    write_report([str(write_run(tmp_path / "run", rows))], ReportConfig())
    show(browser, tmp_path / "run" / "report.html", 1280)
    for level, count in (("any", 3), ("below", 1), ("easy", 1)):
        choose(browser, level=level)
        until(browser, COUNTS, counted(count, 3))


@pytest.mark.browser
def test_fits_of_runs_and_of_files_are_one_table(browser, tmp_path):
    """Those of a run have its label where there are several, those of a file their place in it."""
    runs = [write_run(tmp_path / name, []) for name in "ab"]
    fit = {"A": -2.0, "alpha": 0.25, "P_star": 0.75, "r2": 0.5, "verdict": "law"}
    for path, content in ((runs[1] / "own.json", fit), (tmp_path / "x.fit.json", {"s": {"hard": fit}})):
        path.write_text(json.dumps(content))
    write_report([*map(str, runs), str(tmp_path / "x.fit.json")], ReportConfig())
    show(browser, runs[0] / "comparison.html", 1280)
    cells = "[...document.querySelectorAll('#fits tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    figures = ["-2", "0.25", "0.75", "0.5", "law"]
    assert browser.execute_script(f"return {cells}") == [["s, hard", *figures], ["toy (b): own", *figures]]


@pytest.mark.browser
def test_a_run_that_has_only_begun(browser, tmp_path):
    """Nothing but settings, as right after the start: the page says so and shows them."""
    run = write_run(tmp_path / "run", [], steps=0)
    for stream in ("metrics", "rollouts", "evaluations"):
        (run / f"{stream}.jsonl").unlink()
    write_report([str(run)], ReportConfig())
    show(browser, run / "report.html", 390)
    text = browser.execute_script("return document.body.innerText")
    assert "metrics.jsonl has no rows yet" in text and "rollouts.jsonl holds none" in text and "none yet" in text
    headings = browser.execute_script("return [...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert headings == ["Overview", "Curves", "Rollouts", "Configuration"]
    settings = browser.execute_script("return document.querySelector('#configuration table').textContent")
    assert "batch_size8256" in settings  # the toy's beside the default
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
