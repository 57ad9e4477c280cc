"use strict";
// Elements, numbers and names that every part of the page uses. All text goes in as text nodes, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child != null && child !== false) element.append(child);
  return element;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function section(id, heading, ...children) {
  document.getElementById("nav").append(el("a", { href: "#" + id }, heading));
  const made = el("section", { id, "aria-labelledby": id + "-heading" },
    el("h2", { id: id + "-heading" }, heading), ...children);
  document.getElementById("main").append(made);
  return made;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function format(value) {
  if (value == null) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (!isNumber(value)) return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-3) {
    const [digits, power] = value.toExponential(2).split("e");
    return Number(digits) + "e" + Number(power);
  }
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Number(value.toPrecision(size < 100 ? 3 : 4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

const percent = (value, digits = 1) => (isNumber(value) ? (100 * value).toFixed(digits) + " %" : "–");

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return format(Number(seconds.toPrecision(2))) + " s";
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? minutes + " min" : Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
}

const words = (name) => name.replaceAll("_", " ").replaceAll("/", ", ");
const last = (list) => list[list.length - 1];
const known = (list) => list.filter(isNumber);
const mean = (list) => (list.length ? list.reduce((sum, value) => sum + value, 0) / list.length : null);
const several = (count, one, many) => count.toLocaleString("en-US") + " " + (count === 1 ? one : many || one + "s");
const distinct = (list) => [...new Set(list)];

// A table that scrolls inside its own frame; cells are text, or elements.
function table(caption, head, rows, options = {}) {
  const numeric = (index) => (index >= (options.names || 1) && !options.plain ? "number" : null);
  return el("div", { class: "frame", tabindex: 0, role: "region", "aria-label": caption },
    el("table", { class: options.class },
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((name, i) => el("th", { scope: "col", class: numeric(i) }, name)))),
      el("tbody", {}, rows.map((row) => el("tr", { class: row.class },
        (row.cells || row).map((cell, i) => i
          ? el("td", { class: numeric(i) }, cell)
          : el("th", { scope: "row" }, cell)))))));
}

const swatch = (colour) => el("i", { class: "swatch c" + (colour % 6), "aria-hidden": "true" });
