// What stands in tables: the run at a glance, the final evaluation, fits, settings and where all of it came from.

const splitsOf = (runs) => distinct(runs.flatMap((run) => run.evaluations.flatMap((row) =>
  Object.keys(row).filter((name) => row[name] && typeof row[name] === "object"))));
const interval = (value, error) => !isNumber(value) || !isNumber(error) ? "–"
  : (100 * Math.max(0, value - 1.96 * error)).toFixed(1) + " – " + (100 * Math.min(1, value + 1.96 * error)).toFixed(1);

function runLabel(run) {
  return RUNS.length > 1 ? el("span", {}, swatch(RUNS.indexOf(run)), run.label) : run.label;
}

function heading() {
  const one = RUNS[0];
  document.getElementById("about").textContent = RUNS.length > 1
    ? several(RUNS.length, "run") + " side by side: " + RUNS.map((run) => run.label).join(", ")
    : [one.folder, one.devices.kind ? one.devices.count + " × " + one.devices.kind : "", "seed " + one.config.seed]
      .filter(Boolean).join(" · ");
  document.getElementById("footer").append(
    "Made by rpt report (rpt_jax " + DATA.version + ") from config.json, metrics.jsonl, evaluations.jsonl, ",
    "rollouts.jsonl and results.json of the run. This file holds all it shows and fetches nothing.");
}

// What a run came to, as [name, value, what it was before and how sure it is].
function glance(run) {
  const metrics = run.metrics, steps = metrics.step || [];
  const training = (name, key, show) => {
    const values = known(metrics[key] || []);
    return values.length ? [name, show(mean(values.slice(-10))), "from " + show(values[0])] : [name, "–", ""];
  };
  const rates = known(metrics.tokens_per_second || []);
  const heldOut = splitsOf([run]).reverse().flatMap((split) => {
    const there = run.evaluations.filter((row) => row[split] && isNumber(row[split].reasoning));
    if (!there.length) return [];
    const figures = last(there)[split];
    const more = [there.length > 1 ? "from " + percent(there[0][split].reasoning) : "",
      isNumber(figures.standard_error) ? "± " + (100 * figures.standard_error).toFixed(1) : ""];
    return [["held out, " + split, percent(figures.reasoning), more.filter(Boolean).join(", ")]];
  });
  return [
    ...heldOut,
    ...(same("reward", "accuracy") ? [] : [training("reward in training", "reward", format)]),
    training("right in training", "accuracy", percent),
    training("format rate in training", "format_rate", percent),
    training("response length", "length", (value) => value.toFixed(0) + " tokens"),
    ["updates", steps.length ? format(last(steps)) : "none yet", "of " + format(run.config.steps)],
    ["time in updates", duration(metrics.seconds ? known(metrics.seconds).reduce((sum, each) => sum + each, 0) : null), ""],
    ["response tokens a second", format(mean(rates.slice(1))), "mean, of the whole step"],
  ];
}

function overview() {
  const found = RUNS.map(glance);
  const names = distinct(found.flatMap((rows) => rows.map(([name]) => name)));
  const shown = ([, value, more]) => [value, more ? el("small", {}, more) : null];
  const explain = el("p", { class: "quiet" }, "Held out: share of right predictions after reasoning, first and last evaluation, " +
    "± one standard error. In training: the first update, and the mean of the last ten.");
  if (RUNS.length === 1) {
    section("overview", "Overview", el("dl", { class: "tiles" }, found[0].map((row) =>
      el("div", {}, el("dt", {}, row[0]), el("dd", {}, shown(row))))), explain);
  } else {
    section("overview", "Overview", table("Runs at a glance", ["", ...RUNS.map(runLabel)], names.map((name) =>
      [name, ...found.map((rows) => shown(rows.find((row) => row[0] === name) || [name, "–", ""]))])), explain);
  }
}

function evaluation() {
  const made = [];
  const rows = splitsOf(RUNS).flatMap((split) => RUNS.flatMap((run) => {
    const there = run.evaluations.filter((row) => row[split]);
    if (!there.length) return [];
    return distinct([there[0], last(there)]).map((row, i) => {
      const figures = row[split];
      const cells = [i ? "" : split, RUNS.length > 1 ? runLabel(run) : null, format(row.step),
        percent(figures.argmax), el("b", {}, percent(figures.reasoning)), interval(figures.reasoning, figures.standard_error),
        isNumber(figures.standard_error) ? (100 * figures.standard_error).toFixed(2) : "–",
        percent(figures.pass_at_k), figures.greedy === undefined ? null : percent(figures.greedy),
        percent(figures.format_rate), isNumber(figures.response_length) ? figures.response_length.toFixed(1) : "–",
        format(figures.positions)];
      return { class: i ? "" : "first", cells };
    });
  }));
  if (rows.length) {
    const head = ["split", "run", "update", "arg-max", "reasoning", "95 % interval", "standard error", "Pass@k",
      "greedy", "format rate", "length", "positions"];
    const used = head.map((_, i) => rows.some((row) => row.cells[i] != null));
    rows.forEach((row) => { row.cells = row.cells.filter((_, i) => used[i]).map((cell) => cell ?? "–"); });
    made.push(table("Next-token accuracy on held-out positions", head.filter((_, i) => used[i]), rows, { names: RUNS.length > 1 ? 2 : 1 }),
      el("p", { class: "quiet" }, "Standard errors are of means over positions, in points of per cent; the interval is " +
        "1.96 of them to each side. Splits by the proxy's entropy are nested: easy holds medium, medium holds hard."));
  }
  RUNS.forEach((run) => { if (run.comparison) made.push(comparison(run)); });
  if (made.length) section("evaluation", "Evaluation", made);
}

// The table of a quickstart: ways to predict by split.
function comparison(run) {
  const { splits, rows } = run.comparison;
  const title = "Held-out accuracy, %, before and after, with controls that spend the same FLOPs";
  return table(RUNS.length > 1 ? run.label + ": " + title : title,
    ["", ...splits.map(([name, positions]) => el("span", {}, words(name), el("small", {}, several(positions, "position"))))],
    rows.map(([name, values, strong]) => ({ class: strong ? "strong" : "",
      cells: [name, ...values.map((value) => isNumber(value) ? (100 * value).toFixed(1) : "–")] })));
}

function shownFit(value) {
  if (Array.isArray(value)) return value.map(shownFit).join(value.length === 2 && value.every(isNumber) ? " – " : ", ");
  if (!value || typeof value !== "object") return format(value);
  return Object.entries(value).map(([name, each]) => words(name) + ": " + shownFit(each)).join("; ");
}

function fits() {
  const rows = [...DATA.fits, ...RUNS.flatMap((run) => run.fits.map((fit) => ({ run, ...fit })))];
  if (!rows.length) return;
  const first = ["A", "alpha", "P_star", "r2", "verdict"];
  const others = distinct(rows.flatMap((row) => Object.keys(row.values))).filter((name) => !first.includes(name));
  const names = [...first, ...others];
  section("fits", "Scaling fits", table("P(C) = A / C^alpha + P*, C in FLOPs",
    ["fit", ...names.map((name) => ({ P_star: "P*", r2: "R²" })[name] || words(name))],
    rows.map((row) => [(row.run && RUNS.length > 1 ? row.run.label + ": " : "") + words(row.name),
      ...names.map((name) => shownFit(row.values[name]))])));
}

function configuration() {
  const shownSetting = (value) => {
    if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
    return value === "" ? "“”" : format(value);
  };
  const names = distinct(RUNS.flatMap((run) => Object.keys(run.config)));
  const text = (run, name) => name in run.config ? shownSetting(run.config[name]) : "–";
  const differs = RUNS.length > 1
    ? (name) => distinct(RUNS.map((run) => JSON.stringify(run.config[name]))).length > 1
    : (name) => JSON.stringify(RUNS[0].config[name]) !== JSON.stringify(DATA.defaults[name]);
  const body = el("div", {});
  const defaultOf = (name) => name in DATA.defaults ? shownSetting(DATA.defaults[name]) : "–";
  const [different, alike, head] = RUNS.length > 1
    ? ["Settings that differ between the runs", "The runs have the same settings.", RUNS.map(runLabel)]
    : ["Settings that are not the defaults", "All settings are the defaults.", ["this run", "default"]];
  const look = { plain: true, class: "settings" };
  const breakable = (name) => name.replaceAll("/", ".").split(/(?<=[._])/).map((part) => [part, el("wbr")]);
  const fillIn = (all) => {
    const rows = names.filter((name) => all || differs(name)).map((name) => ({
      class: all && differs(name) ? "strong" : "",
      cells: [breakable(name), ...RUNS.map((run) => text(run, name)), ...(RUNS.length > 1 ? [] : [defaultOf(name)])],
    }));
    const heads = ["setting", ...head.map((name) => name.cloneNode ? name.cloneNode(true) : name)];
    body.replaceChildren(rows.length ? table(all ? "All settings" : different, heads, rows, look)
      : el("p", { class: "note" }, alike));
  };
  fillIn(false);
  const origin = [["folder", (run) => run.folder], ["run id", (run) => run.id],
    ["commit", (run) => run.commit ? run.commit.slice(0, 12) + (run.changed ? ", with changes" : "") : "–"],
    ["devices", (run) => run.devices.kind ? run.devices.count + " × " + run.devices.kind : "–"],
    ["versions", (run) => Object.entries(run.versions).map((pair) => pair.join(" ")).join(", ")]];
  const box = { type: "checkbox", id: "all-settings", onchange: (event) => fillIn(event.target.checked) };
  section("configuration", "Configuration",
    el("label", { class: "controls" }, el("input", box), " all settings"), body,
    table("Where it comes from", ["", ...RUNS.map(runLabel)],
      origin.map(([name, get]) => [name, ...RUNS.map((run) => get(run) || "–")]), look));
}
