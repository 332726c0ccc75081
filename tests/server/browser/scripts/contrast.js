// Texts, fields and lines that stand out too little from what is behind them, and how many were looked at.
const parse = (text) => {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return text.startsWith("color(srgb") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const ground = (e) => {
  const layers = [];
  for (let at = e; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
};
const opacity = (e) => {
  let all = 1;
  for (let at = e; at; at = at.parentElement) all *= Number(getComputedStyle(at).opacity);
  return all;
};
const said = [];
let count = 0;
const check = (e, color, least, what) => {
  const below = ground(what === "border" ? e.parentElement : e);
  const top = parse(color);
  top[3] *= opacity(e);
  const found = ratio(over(top, below), below);
  count++;
  const who = `${e.tagName}#${e.id} "${(e.textContent ?? "").trim().slice(0, 40)}"`;
  if (found < least) said.push(`${found.toFixed(2)} < ${least}: ${what} of ${who}`);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const done = new Set();
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (
    !walker.currentNode.data.trim() ||
    done.has(e) ||
    !e.checkVisibility({ visibilityProperty: true, opacityProperty: true })
  )
    continue;
  done.add(e);
  const style = getComputedStyle(e);
  if (e.closest("noscript, option, .hidden, :disabled") || e.getBoundingClientRect().width <= 1) continue;
  const size = parseFloat(style.fontSize),
    bold = Number(style.fontWeight) >= 700;
  check(
    e,
    e.namespaceURI.endsWith("svg") ? style.fill : style.color,
    size >= 24 || (bold && size >= 18.66) ? 3 : 4.5,
    "text",
  );
}
for (const e of document.querySelectorAll("input, select, textarea")) {
  if (!e.checkVisibility() || ["range", "checkbox", "radio", "file"].includes(e.type)) continue;
  check(e, getComputedStyle(e).color, 4.5, "text");
  check(e, getComputedStyle(e).borderTopColor, 3, "border");
  if (e.placeholder) check(e, getComputedStyle(e, "::placeholder").color, 4.5, "placeholder");
}
for (const e of document.querySelectorAll(".plot .history, .plot path.median"))
  check(e, getComputedStyle(e).stroke, 3, "line");
return [said, count];
