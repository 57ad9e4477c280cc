// Curves: one small chart a figure, runs laid over each other. The legend shows the values under the pointer, a drag
// zooms all charts, arrow keys walk along the focused one.

const HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;
const MOST_TICKS = 20;
const VIEW = { axis: "step", window: 1, from: null, to: null, charts: [] };
const SHARES = /(_share|_rate|accuracy)$/;
const PANELS = [
  ["reward", "Reward", "mean over all rollouts of the update"],
  ["accuracy", "Right answers", "share of training rollouts"],
  ["format_rate", "Format rate", "share of rollouts with an answer"],
  ["zero_variance_share", "Groups that agree", "all right or all wrong: nothing to learn from"],
  ["length", "Response length", "tokens, mean"],
  ["unfinished_share", "Unfinished", "share of rollouts stopped by the token limit"],
  ["entropy", "Entropy", "nats a response token"],
  ["gradient_norm", "Gradient norm", "before clipping"],
  ["loss", "Loss", ""],
  ["kl", "KL to the starting policy", "nats"],
  ["mismatch_max", "Sampler against scorer", "largest |difference| of log-probs"],
  ["tokens_per_second", "Response tokens a second", "of the whole step"],
];

// Where an update stands on the chosen axis: its number, hours or FLOPs spent until then.
function place(run, step) {
  if (VIEW.axis === "step") return step;
  const steps = run.metrics.step || [], sums = run.sums[VIEW.axis];
  let index = -1;
  for (let low = 0, high = steps.length - 1; low <= high;) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) { index = middle; low = middle + 1; } else high = middle - 1;
  }
  return index < 0 ? 0 : sums[index];
}

function addSums() {
  for (const run of RUNS) {
    let hours = 0, flops = 0;
    run.sums = { hours: [], flops: [] };
    (run.metrics.step || []).forEach((_, i) => {
      hours += ((run.metrics.seconds || [])[i] || 0) / 3600;
      flops += ((run.metrics.flops_sample || [])[i] || 0) + ((run.metrics.flops_update || [])[i] || 0);
      run.sums.hours.push(hours);
      run.sums.flops.push(flops);
    });
  }
}

// The mean of `window` neighbours, fewer at the ends; what is no number stays none and counts for nothing.
function smooth(values, window) {
  const half = Math.floor(window / 2);
  if (!half) return values;
  const around = (i) => known(values.slice(Math.max(0, i - half), i + half + 1));
  return values.map((value, i) => isNumber(value) ? mean(around(i)) : null);
}

function ticks(low, high, count) {
  if (high - low <= 1e-12 * Math.abs(high)) return [low];  // no numbers in between that could be told apart
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const first = Math.ceil(low / step - 1e-9), found = [];
  for (let k = 0; k <= MOST_TICKS; k++) {
    const value = (first + k) * step;
    if (value <= high + step * 1e-9) found.push(Number(value.toPrecision(12)));
  }
  return found;
}

// A chart: {title, note, share, series: [{label, colour, run, steps, values, errors?, points?, dashed?}]}.
function chart(spec) {
  const plot = svg("svg", { tabindex: 0, role: "img", height: HEIGHT });
  const readout = el("div", { class: "readout" });
  const figure = el("figure", { class: "chart" },
    el("figcaption", {}, el("strong", {}, spec.title), spec.note ? el("span", {}, spec.note) : null), readout, plot);
  const state = { spec, plot, readout, at: null, drag: null };
  plot.addEventListener("pointermove", (event) => point(state, event));
  plot.addEventListener("pointerleave", () => { if (state.drag == null) look(state, null); });
  plot.addEventListener("pointerdown", (event) => press(state, event));
  plot.addEventListener("keydown", (event) => walk(state, event));
  plot.addEventListener("blur", () => look(state, null));
  new ResizeObserver(() => { if (plot.clientWidth !== state.width) draw(state); }).observe(plot);
  VIEW.charts.push(state);
  return figure;
}

function draw(state) {
  const { spec, plot } = state;
  state.width = plot.clientWidth;
  if (!state.width) return;
  const lines = spec.series.map((series) => lineOf(series));
  const xs = lines.flatMap((line) => line.xs);
  const from = VIEW.from ?? Math.min(...extent(xs)), to = VIEW.to ?? Math.max(...extent(xs));
  const inside = (line) => line.spread.filter((_, i) => line.xs[i] >= from && line.xs[i] <= to);
  const shown = lines.flatMap(inside).flat();
  let [low, high] = extent(known(shown));
  if (spec.share) [low, high] = [0, Math.max(high, 1e-6) > 0.5 ? 1 : high * 1.15 || 1];
  else if (low >= 0 && low < 0.6 * high) low = 0;
  if (low === high) [low, high] = [low - Math.abs(low) * 0.1 - 1e-12, high + Math.abs(high) * 0.1 + 1e-12];
  const X = (value) => LEFT + (to === from ? 0.5 : (value - from) / (to - from)) * (state.width - LEFT - RIGHT);
  const Y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const clip = "clip" + VIEW.charts.indexOf(state);
  const frame = { x: LEFT - 5, y: 0, width: state.width - LEFT - RIGHT + 10, height: HEIGHT };
  const across = ticks(from, to, Math.max(2, Math.floor(state.width / 110)));
  plot.replaceChildren(
    svg("clipPath", { id: clip }, svg("rect", frame)),
    svg("g", {}, ticks(low, high, 4).map((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: state.width - RIGHT, y1: Y(value), y2: Y(value) }),
      svg("text", { x: LEFT - 6, y: Y(value) + 4, "text-anchor": "end" }, tickLabel(value, spec.share))])),
    svg("g", {}, across.map((value) =>
      svg("text", { x: X(value), y: HEIGHT - 6, "text-anchor": "middle" }, tickLabel(value)))),
    svg("g", { "clip-path": `url(#${clip})` }, lines.map((line) => strokes(line, X, Y))),
    svg("g", { class: "cursor" }));
  Object.assign(state, { lines, X, Y, from, to });
  plot.setAttribute("aria-label", spoken(spec, lines));
  look(state, state.at);
}

function lineOf(series) {
  const xs = series.steps.map((step) => place(series.run, step));
  const smoothed = series.points ? series.values : smooth(series.values, VIEW.window);
  const errors = series.errors || [];
  const spread = series.values.map((value, i) =>
    isNumber(value) ? [value - (errors[i] || 0), value + (errors[i] || 0)] : []);
  return { series, xs, smoothed, spread };
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return low > high ? [0, 1] : [low, high];
}

function tickLabel(value, share) {
  if (share) return Math.round(1000 * value) / 10 + " %";
  return Math.abs(value) < 1e4 ? format(value) : Number(value.toPrecision(3)).toExponential().replace("e+", "e");
}

function path(xs, values, X, Y) {
  let out = "", pen = "M";
  values.forEach((value, i) => {
    if (!isNumber(value)) { pen = "M"; return; }
    out += pen + X(xs[i]).toFixed(1) + " " + Y(value).toFixed(1);
    pen = "L";
  });
  return out;
}

function strokes({ series, xs, smoothed }, X, Y) {
  const colour = "c" + (series.colour % 6);
  const drawn = (kind, values) => svg("path", { class: kind + " " + colour, d: path(xs, values, X, Y) });
  const made = [drawn(series.dashed ? "line dashed" : "line", smoothed)];
  if (smoothed !== series.values) made.unshift(drawn("raw", series.values));
  if (series.points) series.values.forEach((value, i) => {
    if (!isNumber(value)) return;
    const x = X(xs[i]), error = (series.errors || [])[i] || 0;
    if (error) made.push(svg("line", { class: "error " + colour, x1: x, x2: x, y1: Y(value - error), y2: Y(value + error) }));
    made.push(svg("circle", { class: "dot " + colour, cx: x, cy: Y(value), r: 3 }));
  });
  return made;
}

// What is read under the pointer: the value of each line nearest to it, or the last ones.
function look(state, at) {
  state.at = at;
  if (!state.lines) return;
  const { spec, lines, X, Y, plot, readout } = state;
  const cursor = plot.querySelector(".cursor");
  const show = spec.share ? (value) => percent(value) : format;
  const found = lines.map((line) => nearest(line, at));
  cursor.replaceChildren();
  if (at != null) {
    cursor.append(svg("line", { x1: X(at), x2: X(at), y1: TOP, y2: HEIGHT - BOTTOM }));
    lines.forEach((line, i) => {
      const value = found[i] < 0 ? null : line.smoothed[found[i]];
      if (!isNumber(value)) return;
      const dot = { class: "dot c" + (line.series.colour % 6), r: 4, cx: X(line.xs[found[i]]), cy: Y(value) };
      cursor.append(svg("circle", dot));
    });
  }
  const steps = distinct(lines.map((line, i) => line.series.steps[found[i]]).filter((step) => step != null));
  const values = lines.map((line, i) => {
    const raw = line.series.values[found[i]], smoothed = line.smoothed[found[i]];
    const error = (line.series.errors || [])[found[i]];
    if (line.series.dashed) return null;
    return el("span", {}, swatch(line.series.colour), line.series.label ? line.series.label + " " : "",
      el("b", {}, show(raw)), error ? " ± " + show(error) : "",
      smoothed !== raw && isNumber(smoothed) ? " (mean " + show(smoothed) + ")" : "");
  });
  const where = steps.length ? "update " + steps.map(format).join(", ") : "";
  readout.replaceChildren(...values.filter(Boolean), el("span", { class: "quiet" }, where));
}

function nearest(line, at) {
  let best = -1, distance = Infinity;
  line.series.values.forEach((value, i) => {
    if (!isNumber(value)) return;
    const far = at == null ? -i : Math.abs(line.xs[i] - at);
    if (far < distance) { best = i; distance = far; }
  });
  return best;
}

function under(state, event) {
  const box = state.plot.getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / Math.max(1, state.width - LEFT - RIGHT);
  return state.from + Math.min(1, Math.max(0, share)) * (state.to - state.from);
}

function point(state, event) {
  if (!state.lines) return;
  const at = under(state, event);
  look(state, at);
  if (state.drag != null) {
    const [a, b] = [state.X(state.drag), state.X(at)].sort((p, q) => p - q);
    const area = { class: "drag", x: a, width: b - a, y: TOP, height: HEIGHT - TOP - BOTTOM };
    state.plot.querySelector(".cursor").append(svg("rect", area));
  }
}

function press(state, event) {
  if (!state.lines) return;
  if (event.pointerType !== "mouse") { point(state, event); return; }
  state.drag = under(state, event);
  state.plot.setPointerCapture(event.pointerId);
  const ended = new AbortController(), listening = { signal: ended.signal };
  const drop = () => {
    ended.abort();
    state.drag = null;
    look(state, state.at);
  };
  state.plot.addEventListener("pointerup", (up) => {
    const [from, to] = [state.drag, under(state, up)].sort((a, b) => a - b);
    drop();
    if (Math.abs(state.X(to) - state.X(from)) > 6) zoom(from, to);
  }, listening);
  for (const name of ["pointercancel", "lostpointercapture"]) state.plot.addEventListener(name, drop, listening);
}

function walk(state, event) {
  const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!move || !state.lines) return;
  event.preventDefault();
  const inside = state.lines.flatMap((line) => line.xs).filter((x) => x >= state.from && x <= state.to);
  const xs = distinct(inside).sort((a, b) => a - b);
  const here = state.at == null ? xs.length : xs.findIndex((x) => x >= state.at);
  look(state, xs[Math.min(xs.length - 1, Math.max(0, here + move))]);
  state.plot.setAttribute("aria-label", state.spec.title + ": " + state.readout.textContent);
}

function spoken(spec, lines) {
  const show = spec.share ? (value) => percent(value) : format;
  return spec.title + ". " + lines.map(({ series }) => {
    const values = known(series.values);
    const name = series.label ? series.label + (series.dashed ? " arg-max: " : ": ") : "";
    return name + (values.length ? `from ${show(values[0])} to ${show(last(values))}` : "no values");
  }).join("; ");
}

function zoom(from, to) {
  Object.assign(VIEW, { from, to });
  VIEW.charts.forEach((state) => { state.at = null; });
  document.getElementById("unzoom").hidden = from == null;
  VIEW.charts.forEach(draw);
}

function metricSeries(name) {
  const label = (run) => RUNS.length > 1 ? run.label : "";
  const all = RUNS.map((run, i) =>
    ({ run, colour: i, label: label(run), steps: run.metrics.step || [], values: run.metrics[name] || [] }));
  return all.filter((series) => known(series.values).length);
}

// Held-out accuracy: with one run a chart with a line a split, with several a chart a split with a line a run.
function heldOutCharts() {
  const splits = splitsOf(RUNS), charts = [];
  const line = (run, split, figure, options) => {
    const rows = run.evaluations.filter((row) => row[split] && isNumber(row[split][figure]));
    return { run, steps: rows.map((row) => row.step), values: rows.map((row) => row[split][figure]), points: true,
      errors: rows.map((row) => (row[split].standard_errors || {})[figure]), ...options };
  };
  const note = "by reasoning, ± one standard error; dashed: arg-max";
  const both = (run, split, colour, label) => [line(run, split, "reasoning", { colour, label }),
    line(run, split, "argmax", { colour, label, dashed: true })];
  const groups = RUNS.length === 1
    ? [["Held-out accuracy", splits.flatMap((split, i) => both(RUNS[0], split, i, split))]]
    : splits.map((split) => ["Held-out accuracy, " + split, RUNS.flatMap((run, i) => both(run, split, i, run.label))]);
  for (const [title, series] of groups) {
    const there = series.filter((each) => each.values.length);
    if (there.length) charts.push(chart({ title, note, share: true, series: there }));
  }
  return charts;
}

function chartOf([name, title, note]) {
  const series = metricSeries(name);
  return series.length ? chart({ title, note, share: SHARES.test(name), series }) : null;
}

function same(first, second) {
  return RUNS.every((run) => JSON.stringify(run.metrics[first]) === JSON.stringify(run.metrics[second]));
}

function curves() {
  addSums();
  const steps = Math.max(...RUNS.map((run) => (run.metrics.step || []).length));
  VIEW.window = Math.min(51, 2 * Math.floor(steps / 40) + 1);
  const panels = PANELS.filter(([name]) => !(name === "reward" && same("reward", "accuracy")));
  const made = [...heldOutCharts(), ...panels.map(chartOf)].filter(Boolean);
  const named = [...panels.map(([name]) => name), "step", "reward"];
  const everything = distinct(RUNS.flatMap((run) => Object.keys(run.metrics)));
  const names = everything.filter((name) => !named.includes(name) && metricSeries(name).length).sort();
  const rest = el("div", { class: "charts" });
  const fillRest = () => {
    if (!rest.firstChild) rest.append(...names.map((name) => chartOf([name, words(name), ""])));
  };
  const more = el("details", { ontoggle: fillRest },
    el("summary", {}, several(names.length, "more figure") + " of metrics.jsonl"), rest);
  if (!made.length) {
    section("curves", "Curves", el("p", { class: "note" }, "metrics.jsonl has no rows yet."));
    return;
  }
  section("curves", "Curves", curveControls(), el("div", { class: "charts" }, made), names.length ? more : null);
}

function curveControls() {
  const shown = el("output", {}, String(VIEW.window));
  const setAxis = (event) => {
    VIEW.axis = event.target.value;
    zoom(null, null);
  };
  const setWindow = (event) => {
    VIEW.window = Number(event.target.value);
    shown.textContent = VIEW.window;
    VIEW.charts.forEach(draw);
  };
  const range = { type: "range", id: "window", min: 1, max: 101, step: 2, value: VIEW.window, oninput: setWindow };
  const axes = [["step", "updates"], ["hours", "hours"], ["flops", "FLOPs"]];
  return el("div", { class: "controls" },
    el("label", {}, "over ", el("select", { id: "axis", onchange: setAxis },
      axes.map(([value, text]) => el("option", { value }, text)))),
    el("label", {}, "mean over ", el("input", range), shown, " updates"),
    el("button", { type: "button", id: "unzoom", hidden: true, onclick: () => zoom(null, null) }, "whole run"),
    el("span", { class: "quiet wide" }, "Drag across a chart to zoom."));
}
