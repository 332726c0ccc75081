// The second page: numbers become a forecast, and the forecast a plot.

import {
  $,
  Problem,
  announce,
  api,
  copy,
  cost,
  curl,
  duration,
  facts,
  make,
  reveal,
  save,
  showChip,
  showPrice,
  showProblem,
} from "./base.js";
import { continued, parse } from "./series.js";
import { plot } from "./plot.js";

const form = $("forecast");
const fields = form.elements;
const RECENT = 300; // steps of history that the plot shows at first
const SHOWN_BYTES = 2e6; // of a file that the field still shows

let data = { columns: [], labels: null };
let fromFile = false;
let aborter = null;
let last = null; // {body, result, history, labels, name}
let drawn = null;

// --- What is forecast ---

const HINT = $("found").textContent;
function read() {
  showProblem($("problem"), null, form);
  try {
    data = parse(fields.values.value, { file: fromFile });
  } catch (error) {
    data = { columns: [], labels: null };
    $("found").textContent = error.message;
    fields.values.setAttribute("aria-invalid", "true");
    $("choose").hidden = true;
    return;
  }
  const before = fields.column.value;
  fields.column.replaceChildren(...data.columns.map(({ name }, i) => make("option", { value: i, textContent: name })));
  $("choose").hidden = data.columns.length < 2;
  fields.column.value = before && before < data.columns.length ? before : data.columns.length - 1;
  count();
}

function count() {
  const column = chosen();
  if (!column) {
    $("found").textContent = HINT;
    return;
  }
  const missing = column.values.filter((value) => value === null).length;
  const dates = data.labels ? `, ${data.labels[0]} to ${data.labels[data.labels.length - 1]}` : "";
  $("found").textContent = `${column.values.length} values${missing ? `, ${missing} of them missing` : ""}${dates}.`;
}

const chosen = () => data.columns[fields.column.value || 0];

let waiting;
fields.values.addEventListener("input", () => {
  fromFile = false;
  clearTimeout(waiting);
  waiting = setTimeout(read, 200);
});
fields.column.addEventListener("change", count);

async function load(text, file) {
  fields.values.value = text;
  fromFile = file;
  read();
}
$("example").addEventListener("click", async () => {
  await load(await (await fetch(form.dataset.example)).text(), true);
  fields.horizon.value = 24;
  $("go").focus();
});
async function upload(file) {
  if (file.size > SHOWN_BYTES) {
    showProblem(
      $("problem"),
      new Problem({
        title: "This file is too large for the page",
        detail: "Up to 2 MB are read here. Send more to the API.",
      }),
    );
    return;
  }
  await load(await file.text(), true);
}
$("upload").addEventListener("change", async () => {
  if ($("upload").files[0]) await upload($("upload").files[0]);
  $("upload").value = ""; // the same file again is a change too
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  if (!event.dataTransfer.files[0]) return;
  event.preventDefault();
  upload(event.dataTransfer.files[0]);
});

// --- The call ---

/** Throws a Problem that names the field. */
function request() {
  const refuse = (param, detail) => {
    throw new Problem({ title: "This cannot be forecast", detail, error: { param } });
  };
  clearTimeout(waiting);
  read();
  const column = chosen();
  if (!column)
    refuse("values", $("found").textContent === HINT ? "Write or load some numbers first." : $("found").textContent);
  const levels = fields.levels.value
    .split(/[\s,;]+/)
    .filter(Boolean)
    .map(Number);
  if (!levels.length || levels.some((level) => !(level > 0 && level < 1)))
    refuse("levels", "Quantiles are over 0 and under 1, such as 0.1, 0.5, 0.9.");
  const body = {
    values: column.values,
    prediction_length: Number(fields.horizon.value),
    quantile_levels: [...new Set(levels)].sort((a, b) => a - b),
  };
  if (fields.trend.checked) body.trend = true;
  if (fields.model?.selectedIndex > 0) body.model = fields.model.value;
  return body;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (aborter) return;
  aborter = new AbortController();
  showProblem($("problem"), null, form);
  try {
    const body = request();
    $("busy").hidden = false;
    $("go").disabled = true;
    $("status").textContent = "Forecasting";
    reveal($("stage"));
    const done = await api("/api/service", { body: { service: "chronos2", ...body }, signal: aborter.signal });
    const column = chosen();
    const labels = data.labels ?? column.values.map((_, i) => `${i + 1}`);
    const all = [...labels, ...continued(data.labels, body.prediction_length)];
    const monthly = all.every((label) => /^\d{4}-\d\d-01$/.test(label)); // then the day says nothing
    last = {
      body,
      result: done.result,
      history: column.values,
      name: column.name,
      labels: monthly ? all.map((label) => label.slice(0, 7)) : all,
    };
    show(done);
  } catch (error) {
    if (error.name === "AbortError") announce("Cancelled. It costs nothing.");
    else {
      // The API has other names for two of the fields.
      error.param = { prediction_length: "horizon", quantile_levels: "levels" }[error.param] ?? error.param;
      showProblem($("problem"), error, form);
    }
  } finally {
    aborter = null;
    $("busy").hidden = true;
    $("go").disabled = false;
    showChip();
  }
});
$("cancel").addEventListener("click", () => aborter?.abort());

// --- What came of it ---

function show(done) {
  const { result, history } = last;
  $("empty").hidden = true;
  $("result").hidden = false;
  $("summary").textContent = result.summary ?? "";
  $("far").hidden = history.length <= RECENT;
  draw();
  facts($("facts"), {
    Trend: result.trend,
    Time: duration(done.timings_ms?.run ?? done.timings_ms?.total),
    Cost: cost(done.cost),
  });
  table();
}

function draw() {
  const { history, result, labels, name } = last;
  const from = $("whole").checked ? 0 : Math.max(0, history.length - RECENT);
  drawn = plot($("plot"), { history: history.slice(from), result, labels: labels.slice(from), name });
}
$("whole").addEventListener("change", draw);
let width = innerWidth;
addEventListener("resize", () => {
  if (drawn && width !== (width = innerWidth)) drawn.resize();
});

/** [head, rows] of the forecast. */
function rows() {
  const { result, labels, history } = last;
  const levels = Object.keys(result.quantiles).sort((a, b) => a - b);
  return [
    ["step", "mean", ...levels],
    result.mean.map((mean, i) => [
      labels[history.length + i],
      mean,
      ...levels.map((level) => result.quantiles[level][i]),
    ]),
  ];
}

function table() {
  const [head, body] = rows();
  const digits = (value) =>
    typeof value === "number"
      ? Number(value.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 })
      : value;
  $("table").replaceChildren(
    make("caption", { className: "hidden", textContent: `Forecast of ${last.name}` }),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...head.map((text, i) => make("th", { scope: "col", className: i ? "number" : "", textContent: text })),
      ),
    ),
    make(
      "tbody",
      {},
      ...body.map(([step, ...values]) =>
        make(
          "tr",
          {},
          make("th", { scope: "row", textContent: step }),
          ...values.map((value) => make("td", { className: "number", textContent: digits(value) })),
        ),
      ),
    ),
  );
}

$("save").addEventListener("click", () => {
  const [head, body] = rows();
  save(new Blob([[head, ...body].map((row) => row.join(",")).join("\n") + "\n"], { type: "text/csv" }), "forecast.csv");
});
$("curl").addEventListener("click", () => copy(curl("/forecast", last.body), $("curl")));

read();
showPrice("chronos2", $("price"));
