// Numbers as people have them: pasted lists, spreadsheets' columns, CSV files of any dialect.

const MISSING = new Set(["", "nan", "na", "n/a", "null", "none", "nil", "-", ".", "?"]);

/** A number, null for a missing one, undefined for what is neither. */
export function number(text, decimalComma = false) {
  let cleaned = text
    .trim()
    .replace(/^["']|["']$/g, "")
    .replace(/^[$€£]\s*/, "");
  if (MISSING.has(cleaned.toLowerCase())) return null;
  if (decimalComma) cleaned = cleaned.replace(/\.(?=\d{3})/g, "").replace(",", ".");
  return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(cleaned) ? Number(cleaned) : undefined;
}

/** The fields of a line, quotes respected. */
export function split(line, delimiter) {
  if (!line.includes('"')) return line.split(delimiter).map((field) => field.trim());
  const fields = [];
  let field = "",
    quoted = false;
  for (let i = 0; i < line.length; i++) {
    const c = line[i];
    if (quoted && c === '"' && line[i + 1] === '"') {
      field += c;
      i++;
    } else if (c === '"') quoted = !quoted;
    else if (c === delimiter && !quoted) {
      fields.push(field.trim());
      field = "";
    } else field += c;
  }
  fields.push(field.trim());
  return fields;
}

/**
 * The columns of numbers in a text: {columns: [{name, values}], labels: [date, ...] or null}.
 * A text is a table when its lines have one count of fields and a head or dates, or when it is `file`'s; else it is
 * one series, whatever separates its numbers. Throws an Error that says which word is no number.
 */
export function parse(text, { file = false } = {}) {
  const lines = text
    .replace(/^\ufeff/, "")
    .split(/\r\n?|\n/)
    .filter((line) => line.trim() && !line.trim().startsWith("#"));
  const table = asTable(lines, file);
  if (table) return table;
  const flat = lines.join("\n").replace(/[[\](){}]/g, " ");
  const comma = /;/.test(flat) && /\d,\d/.test(flat) && !/\d\.\d/.test(flat);
  // "1,,3" has a missing value between, "1, 3" has none.
  let words =
    flat.includes(",") && !comma
      ? flat
          .trim()
          .replace(/\s*[;,]\s*/g, ",")
          .split(/[,\s|]/)
      : flat.trim().split(/\s*;\s*|[\s|]+/);
  words = words.filter((word, i) => word !== "" || (i > 0 && i < words.length - 1));
  let name = "value";
  if (words.length > 1 && number(words[0], comma) === undefined && lines.length > 1) name = words.shift();
  const values = words.map((word, i) => {
    const value = number(word, comma);
    if (value === undefined) throw new Error(`“${word.slice(0, 30)}” is not a number (value ${i + 1})`);
    return value;
  });
  return { columns: values.length ? [{ name, values }] : [], labels: null };
}

function asTable(lines, file) {
  if (lines.length < 2) return null;
  for (const delimiter of ["\t", ";", ","]) {
    const rows = lines.map((line) => split(line, delimiter));
    const width = rows[0].length;
    if (width < 2 || rows.some((row) => row.length !== width)) continue;
    const comma = delimiter !== "," && rows.slice(1).some((row) => row.some((field) => /^-?[\d.]*\d,\d+$/.test(field)));
    const head = rows[0].every((field) => number(field, comma) === undefined || field === "");
    const body = head ? rows.slice(1) : rows;
    const dates = Array.from({ length: width }, (_, i) => i).find((i) => body.every((row) => isDate(row[i])));
    if (!head && dates === undefined && !file) continue;
    const columns = [];
    for (let i = 0; i < width; i++) {
      if (i === dates) continue;
      const values = body.map((row) => number(row[i], comma));
      if (values.every((value) => value !== undefined) && values.some((value) => value !== null)) {
        columns.push({ name: (head && rows[0][i]) || `column ${i + 1}`, values });
      }
    }
    if (!columns.length) throw new Error("No column of this table has numbers alone");
    return { columns, labels: dates === undefined ? null : body.map((row) => row[dates]) };
  }
  return null;
}

function isDate(text) {
  return /\d{4}/.test(text) && /[-/: ]/.test(text) && number(text) === undefined && !Number.isNaN(Date.parse(text));
}

/** The labels of `count` steps after these: dates go on as they went, else numbers count on. */
export function continued(labels, count) {
  if (!labels || labels.length < 2) return Array.from({ length: count }, (_, i) => `+${i + 1}`);
  const times = labels.slice(-2).map((label) => new Date(label));
  const local = !/^\d{4}-\d\d(-\d\d)?$/.test(labels[0]); // those alone are read as UTC
  const step = times[1] - times[0];
  const DAY = 864e5;
  const months = step >= 28 * DAY && step % DAY === 0 ? Math.round(step / (30.44 * DAY)) : 0;
  const time = /:/.test(labels[labels.length - 1]);
  return Array.from({ length: count }, (_, i) => {
    const at = new Date(times[1]);
    if (!months) at.setTime(at.getTime() + step * (i + 1));
    else if (local) at.setMonth(at.getMonth() + months * (i + 1));
    else at.setUTCMonth(at.getUTCMonth() + months * (i + 1));
    if (local) at.setMinutes(at.getMinutes() - at.getTimezoneOffset());
    const iso = at.toISOString();
    return time ? iso.slice(0, 16).replace("T", " ") : iso.slice(0, Math.max(7, Math.min(10, labels[0].length)));
  });
}
