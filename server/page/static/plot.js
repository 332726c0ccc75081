// A forecast as a picture that answers: history, bands, median, and a crosshair for pointer and keyboard.

import { make } from "./base.js";

const HEIGHT = 340,
  LEFT = 56,
  RIGHT = 14,
  TOP = 12,
  BOTTOM = 28;
const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Four significant digits, as people read them. */
export function shown(value) {
  if (value === null || value === undefined) return "missing";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e9 || size < 1e-3)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 4 });
}

/** Round values that part a range in about `count`. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const marks = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step * 1e-9; mark += step)
    marks.push(Math.abs(mark) < step * 1e-9 ? 0 : mark);
  return marks;
}

/** Levels as bands that lie around a middle, from the widest, the line in the middle, and those that have no pair. */
export function arranged(result) {
  const levels = Object.entries(result.quantiles)
    .map(([key, values]) => ({ level: Number(key), values }))
    .sort((a, b) => a.level - b.level);
  const bands = [],
    edges = [];
  for (const one of levels) {
    const other = levels.find(({ level }) => Math.abs(level - (1 - one.level)) < 1e-9);
    if (one.level < 0.5 && other)
      bands.push({ name: `${percent(one.level)} to ${percent(other.level)}`, low: one.values, high: other.values });
    else if (Math.abs(one.level - 0.5) > 1e-9 && !other) edges.push({ name: percent(one.level), values: one.values });
  }
  const median = levels.find(({ level }) => Math.abs(level - 0.5) < 1e-9);
  return {
    bands,
    edges,
    middle: median ? { name: "median", values: median.values } : { name: "mean", values: result.mean },
  };
}

function percent(level) {
  return `${Number((level * 100).toFixed(4))} %`;
}

/**
 * Draws into `box`: history (numbers, null for missing), the forecast's result, a label for each of their steps.
 * Returns {resize}, for when the box has another width.
 */
export function plot(box, { history, result, labels, name }) {
  const { bands, edges, middle } = arranged(result);
  const past = history.length,
    ahead = middle.values.length,
    all = past + ahead;
  const lines = [
    history,
    middle.values,
    ...bands.flatMap(({ low, high }) => [low, high]),
    ...edges.map(({ values }) => values),
  ];
  let low = Infinity,
    high = -Infinity;
  for (const line of lines)
    for (const value of line)
      if (value !== null) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - margin, high + margin];

  const legend = make("ul", { className: "legend" });
  const stage = make("div", {
    className: "crosshair",
    tabIndex: 0,
    role: "slider",
    "aria-label": `${name}: history and forecast, step by step`,
    "aria-valuemin": 1,
    "aria-valuemax": all,
    "aria-orientation": "horizontal",
  });
  box.className = "plot";
  box.replaceChildren(legend, stage);
  let at = past; // the first step that is forecast
  let x, y, cross, dots;

  /** A line's path; gaps where values are missing. */
  function path(values, from) {
    let d = "",
      pen = false;
    values.forEach((value, i) => {
      if (value === null) {
        pen = false;
        return;
      }
      d += `${pen ? "L" : "M"}${x(from + i).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
    });
    return d;
  }

  /** Values that stand alone between missing ones: a line does not show them. */
  function alone(values) {
    return values
      .map((value, i) =>
        value !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null
          ? `M${x(i).toFixed(1)} ${y(value).toFixed(1)}h0`
          : "",
      )
      .join("");
  }

  function draw() {
    const width = Math.max(280, stage.clientWidth || 280);
    x = (i) => LEFT + ((i + 0.5) * (width - LEFT - RIGHT)) / all;
    y = (value) => TOP + ((high - value) * (HEIGHT - TOP - BOTTOM)) / (high - low);
    const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" });
    for (const mark of ticks(low, high, 5)) {
      svg.append(shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(mark), y2: y(mark) }));
      svg.append(shape("text", { x: LEFT - 8, y: y(mark) + 4, "text-anchor": "end" }, shown(mark)));
    }
    const marks = Math.max(2, Math.min(all, Math.floor(width / 110)));
    for (let i = 0; i < marks; i++) {
      const step = Math.round((i * (all - 1)) / (marks - 1));
      svg.append(
        shape(
          "text",
          { x: x(step), y: HEIGHT - 8, "text-anchor": i === 0 ? "start" : i === marks - 1 ? "end" : "middle" },
          labels[step],
        ),
      );
    }
    // A band begins at the last known value, so that it opens from there.
    const known = history.findLastIndex((value) => value !== null);
    const joined = (values) => (known < 0 ? "" : `M${x(known).toFixed(1)} ${y(history[known]).toFixed(1)}L`);
    for (const band of bands) {
      const back = band.low
        .map((value, i) => `L${x(past + i).toFixed(1)} ${y(value).toFixed(1)}`)
        .reverse()
        .join("");
      svg.append(
        shape("path", { class: "band", d: `${joined()}${path(band.high, past).slice(known < 0 ? 0 : 1)}${back}Z` }),
      );
    }
    for (const edge of edges) svg.append(shape("path", { class: "edge", d: path(edge.values, past) }));
    svg.append(
      shape("line", {
        class: "now",
        x1: (x(past - 1) + x(past)) / 2,
        x2: (x(past - 1) + x(past)) / 2,
        y1: TOP,
        y2: HEIGHT - BOTTOM,
      }),
    );
    svg.append(
      shape("path", { class: "history", d: path(history, 0) }),
      shape("path", { class: "dots", d: alone(history) }),
    );
    svg.append(
      shape("path", { class: "median", d: `${joined()}${path(middle.values, past).slice(known < 0 ? 0 : 1)}` }),
    );
    cross = shape("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM });
    dots = shape("circle", { class: "dot", r: 5 });
    svg.append(cross, dots);
    stage.replaceChildren(svg);
    move(at);
  }

  /** What is at a step: [[class, name, value], ...]. */
  function values(step) {
    if (step < past) return [["history", name, shown(history[step])]];
    const i = step - past;
    return [
      ["median", middle.name, shown(middle.values[i])],
      ...bands.map((band, order) => [
        `band ${order === 0 && bands.length > 1 ? "outer" : ""}`,
        band.name,
        `${shown(band.low[i])} to ${shown(band.high[i])}`,
      ]),
      ...edges.map((edge) => ["edge", edge.name, shown(edge.values[i])]),
    ];
  }

  function move(step) {
    at = Math.max(0, Math.min(all - 1, step));
    const here = values(at);
    cross.setAttribute("x1", x(at));
    cross.setAttribute("x2", x(at));
    const value = at < past ? history[at] : middle.values[at - past];
    dots.style.display = value === null ? "none" : "";
    if (value !== null) {
      dots.setAttribute("cx", x(at));
      dots.setAttribute("cy", y(value));
    }
    legend.replaceChildren(
      make("li", {}, make("b", { textContent: labels[at] })),
      ...here.map(([kind, label, text]) =>
        make(
          "li",
          { className: kind },
          make("i", { "aria-hidden": "true" }),
          `${label} `,
          make("b", { textContent: text }),
        ),
      ),
    );
    stage.setAttribute("aria-valuenow", at + 1);
    stage.setAttribute(
      "aria-valuetext",
      `${labels[at]}: ${here.map(([, label, text]) => `${label} ${text}`).join(", ")}`,
    );
  }

  stage.addEventListener("pointermove", follow);
  stage.addEventListener("pointerdown", follow);
  function follow(event) {
    const { left, width } = stage.getBoundingClientRect();
    const across = ((event.clientX - left) / width) * Math.max(280, stage.clientWidth);
    move(Math.round(((across - LEFT) / (Math.max(280, stage.clientWidth) - LEFT - RIGHT)) * all - 0.5));
  }
  stage.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.round(all / 10));
    const to = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      PageDown: at - page,
      PageUp: at + page,
      Home: 0,
      End: all - 1,
    }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(to);
  });
  draw();
  return { resize: draw };
}
