// The browser of rollouts: what the policy thought, predicted and was told, to be filtered, searched and read.

const PAGE = 40;
const LEVELS = [["any", "any difficulty", () => true], ["easy", "easy (above 0.5 nats)", (e) => e > 0.5],
  ["medium", "medium (above 1.0)", (e) => e > 1.0], ["hard", "hard (above 1.5)", (e) => e > 1.5],
  ["below", "below easy (0.5 or less)", (e) => isNumber(e) && e <= 0.5]];
const ORDERS = [["latest", "latest first", (a, b) => b.step - a.step], ["earliest", "earliest first", (a, b) => a.step - b.step],
  ["entropy", "highest entropy first", (a, b) => (b.entropy || 0) - (a.entropy || 0)],
  ["longest", "longest first", (a, b) => (b.tokens || 0) - (a.tokens || 0)],
  ["surprising", "least likely first", (a, b) => likelihood(a) - likelihood(b)]];
const OUTCOMES = { right: "right", wrong: "wrong", none: "no answer" };
const SIGNS = { right: "✓", wrong: "✗", none: "∅" };
const FILTER = { outcome: "all", level: "any", run: "all", order: "latest", from: -Infinity, to: Infinity, text: "",
  coloured: true, shown: PAGE };

const outcome = (row) => row.prediction == null ? "none" : (row.right ?? row.reward === 1) ? "right" : "wrong";
const likelihood = (row) => mean((row.pieces || []).map((piece) => piece[1] || 0)) ?? 0;
const hayOf = (row) => row.hay ??=
  [row.context, row.thought, row.prediction, row.continuation].filter(Boolean).join("\n").toLowerCase();

function passes(row) {
  const level = LEVELS.find(([name]) => name === FILTER.level)[2];
  return (FILTER.run === "all" || row.run === Number(FILTER.run)) && row.step >= FILTER.from && row.step <= FILTER.to
    && level(row.entropy) && (!FILTER.text || hayOf(row).includes(FILTER.text));
}

// Spaces and line breaks count in a prediction, so they are shown.
function exact(text) {
  return text.split(/([ \n\t])/).filter(Boolean).map((part) => {
    const sign = { " ": "␣", "\n": "⏎", "\t": "⇥" }[part];
    const name = { " ": "space", "\n": "line break", "\t": "tab" }[part];
    return sign ? el("span", { class: "space", title: name }, sign) : part;
  });
}

function marked(text) {
  if (!FILTER.text || !text) return text || "";
  const low = text.toLowerCase(), made = [];
  if (low.length !== text.length) return text;
  let start = 0;
  for (let at = low.indexOf(FILTER.text); at >= 0; at = low.indexOf(FILTER.text, start)) {
    made.push(text.slice(start, at), el("mark", {}, text.slice(at, at + FILTER.text.length)));
    start = at + FILTER.text.length;
  }
  return [...made, text.slice(start)];
}

// Six shades: a token that was sure stays plain, one at a chance of 1 in 150 or less is deepest.
const shade = (logprob) => Math.min(5, Math.floor(Math.max(0, -logprob)));

function piecesOf(row) {
  const title = (logprob) => `log-prob ${logprob.toFixed(2)}, chance ${percent(Math.exp(logprob))}`;
  return row.pieces.map(([text, logprob]) => !isNumber(logprob) ? text
    : el("span", { class: "piece shade" + shade(logprob), title: title(logprob) }, text));
}

function card(row) {
  const result = outcome(row), coloured = Boolean(row.pieces && FILTER.coloured);
  const run = RUNS.length > 1 ? [swatch(row.run), RUNS[row.run].label + " · "] : null;
  const place = row.document == null ? "" : `document ${row.document}, position ${row.index}`;
  const facts = ["update " + format(row.step), isNumber(row.entropy) ? "entropy " + row.entropy.toFixed(2) : "",
    isNumber(row.tokens) ? several(row.tokens, "token") : "", row.finished === false ? "stopped by the limit" : "",
    place && place + (row.member == null ? "" : `, member ${row.member}`)];
  const truth = row.truth || "", more = row.continuation || "";
  const rest = more.startsWith(truth) ? more.slice(truth.length) : "";
  const quiet = (text) => el("span", { class: "quiet" }, text);
  const part = (name, ...content) => el("div", { class: "part" }, el("h3", {}, name), content);
  return el("article", { class: "rollout " + result },
    el("header", {}, el("b", { class: "badge" }, SIGNS[result] + " " + OUTCOMES[result]), " reward ", format(row.reward),
      el("span", { class: "quiet" }, run, facts.filter(Boolean).join(" · "))),
    part("Text", el("pre", {}, marked(row.context), el("u", { class: "truth" }, truth), quiet(marked(rest)))),
    part(coloured ? "Response" : "Thought",
      el("pre", { class: "thought" }, coloured ? piecesOf(row) : row.thought ? marked(row.thought) : quiet("(empty)"))),
    el("div", { class: "answers" },
      el("div", {}, el("h3", {}, "Prediction"),
        el("pre", {}, row.prediction == null ? quiet("no answer") : exact(row.prediction))),
      el("div", {}, el("h3", {}, "Truth"), el("pre", {}, exact(truth)))));
}

function listRollouts(list, counts, more) {
  const matching = DATA.rollouts.filter(passes);
  const by = { right: [], wrong: [], none: [] };
  matching.forEach((row) => by[outcome(row)].push(row));
  const chosen = FILTER.outcome === "all" ? matching : by[FILTER.outcome];
  const sorted = [...chosen].sort(ORDERS.find(([name]) => name === FILTER.order)[2]);
  for (const name of ["all", ...Object.keys(by)]) {
    document.getElementById("count-" + name).textContent = (name === "all" ? matching : by[name]).length.toLocaleString("en-US");
  }
  list.replaceChildren(...sorted.slice(0, FILTER.shown).map(card));
  counts.textContent = several(chosen.length, "rollout") + " of " + DATA.rollouts.length.toLocaleString("en-US")
    + (chosen.length > FILTER.shown ? `, the first ${FILTER.shown} below` : "");
  more.hidden = chosen.length <= FILTER.shown;
}

// The form above the list; `again` takes what a field changes in FILTER.
function filters(again) {
  const rows = DATA.rollouts, hasPieces = rows.some((row) => row.pieces);
  const [first, final] = extent(rows.map((row) => row.step));
  const labelled = (label, field, options = {}) => el("label", options, el("span", {}, label), field);
  const choice = (id, label, options) => labelled(label,
    el("select", { id, onchange: (event) => again({ [id]: event.target.value }) },
      options.map(([value, text]) => el("option", { value, selected: FILTER[id] === value }, text))));
  const number = (id, label, placeholder, none) => labelled(label,
    el("input", { id, type: "number", inputmode: "numeric", min: 0, placeholder,
      oninput: (event) => again({ [id]: event.target.value === "" ? none : Number(event.target.value) }) }));
  const outcomes = Object.entries({ all: "all", ...OUTCOMES }).map(([value, text]) =>
    el("label", { class: value },
      el("input", { type: "radio", name: "outcome", value, id: "outcome-" + value, checked: value === "all",
        onchange: () => again({ outcome: value }) }),
      el("span", {}, SIGNS[value] ? SIGNS[value] + " " : "", text, " ", el("small", { id: "count-" + value }))));
  let wait = 0;
  const search = el("input", { id: "search", type: "search", placeholder: "in text, thought and prediction",
    oninput: (event) => {
      clearTimeout(wait);
      wait = setTimeout(() => again({ text: event.target.value.toLowerCase() }), 120);
    } });
  const scale = [0, 1, 2, 3, 4, 5].map((i) =>
    el("span", { class: "piece shade" + i }, i === 0 ? "0" : i < 5 ? "−" + i : "−5 or less"));
  const coloured = el("label", { class: "wide" },
    el("input", { type: "checkbox", id: "coloured", checked: true,
      onchange: (event) => again({ coloured: event.target.checked }) }),
    " colour tokens by log-prob ", el("span", { class: "scale" }, scale));
  return el("form", { class: "filters", "aria-label": "Filters of the rollouts", onsubmit: (event) => event.preventDefault() },
    el("fieldset", { class: "outcomes" }, el("legend", {}, "outcome"), outcomes),
    labelled("search", search, { class: "search" }),
    choice("level", "difficulty", LEVELS),
    RUNS.length > 1 ? choice("run", "run", [["all", "all runs"], ...RUNS.map((run, i) => [String(i), run.label])]) : null,
    number("from", "from update", format(first), -Infinity),
    number("to", "to update", format(final), Infinity),
    choice("order", "order", ORDERS.filter(([name]) => name !== "surprising" || hasPieces)),
    hasPieces ? coloured : null);
}

function rollouts() {
  if (!DATA.rollouts.length) {
    const why = "rollouts.jsonl holds none (the setting rollouts_logged says how many a step).";
    section("rollouts", "Rollouts", el("p", { class: "note" }, why));
    return;
  }
  const list = el("div", { class: "rollouts", id: "list" }), counts = el("p", { id: "counts", role: "status" });
  const more = el("button", { type: "button", id: "more", class: "more" }, `show ${PAGE} more`);
  const again = (change) => {
    Object.assign(FILTER, { shown: PAGE }, change);
    listRollouts(list, counts, more);
  };
  more.addEventListener("click", () => again({ shown: FILTER.shown + PAGE }));
  const left = RUNS.filter((run) => run.rollouts_there > run.rollouts_here).map((run) =>
    (RUNS.length > 1 ? run.label + ": " : "") + format(run.rollouts_here) + " of " + format(run.rollouts_there)
      + " logged rollouts are in this page, evenly spread over the run (rpt report --rollouts, --megabytes).");
  section("rollouts", "Rollouts", filters(again), left.map((text) => el("p", { class: "quiet" }, text)), counts, list, more);
  again({});
}

heading();
overview();
curves();
evaluation();
fits();
rollouts();
configuration();
document.documentElement.dataset.ready = "yes";
