// What every page uses: elements, the API with its problems, copying, money. All text goes in as text, never as HTML.

export const page = document.body.dataset;
export const $ = (id) => document.getElementById(id);

/** An element: properties by name, "aria-*" and "data-*" as attributes; children are elements or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// --- The API ---

/** A refusal: the server's problem+json, or our own words for a server that does not answer. */
export class Problem extends Error {
  constructor(body) {
    super(body.detail || body.title);
    Object.assign(this, { type: "", status: 0 }, body);
    this.kind = this.type.split("/").pop();
    this.param = body.error?.param ?? null;
  }
}

/** The JSON that `path` answers; POST where there is a body. Throws Problem, or an AbortError. */
export async function api(path, { method, body, headers = {}, signal } = {}) {
  let response, data;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
    const text = await response.text();
    data = (response.headers.get("content-type") ?? "").includes("json") ? JSON.parse(text) : null;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "The server does not answer",
      detail: "Is it running, and are you connected? Nothing was charged for what did not arrive.",
    });
  }
  if (response.status === 401) signedIn(false);
  if (!response.ok)
    throw new Problem({
      title: `The server answered ${response.status}`,
      detail: "",
      status: response.status,
      ...data,
    });
  return data;
}

/** Says what went wrong, and what to do; nothing without an error. Marks the field that is to blame. */
export function showProblem(box, error = null, form = null) {
  for (const field of form?.elements ?? []) field.removeAttribute("aria-invalid");
  box.replaceChildren();
  if (!error) return;
  if (!(error instanceof Problem)) console.warn(error);
  if (error.kind === "unauthorized") {
    box.append(
      make("strong", { textContent: "Sign in first" }),
      make("p", { textContent: "This costs something here, and your wallet is your account." }),
      make("p", {}, make("a", { href: "/account", className: "button primary", textContent: "Sign in" })),
    );
    box.scrollIntoView({ block: "nearest" });
    return;
  }
  const detail = error.message && error.message !== error.title ? error.message : "";
  box.append(make("strong", { textContent: error.title ?? "That did not work" }));
  box.scrollIntoView({ block: "nearest" });
  if (error.kind === "insufficient-credit" && error.needed !== undefined) {
    box.append(make("p", {}, `It costs ${tokens(error.needed)}, and ${tokens(error.available)} are there.`));
    box.append(
      make("p", {}, make("a", { href: "/account#deposit", className: "button primary", textContent: "Add credit" })),
    );
    return;
  }
  if (detail) box.append(make("p", { textContent: detail }));
  if (error.retry_after_s) box.append(make("p", { textContent: `Try again in ${error.retry_after_s} s.` }));
  if (/^\/problems\/[a-z-]+$/.test(error.type ?? "")) {
    const about = make("p", { className: "hint" }, make("a", { href: error.type, textContent: "What this means" }));
    if (error.status >= 500 && error.instance) about.append(`, request ${error.instance}`);
    box.append(about);
  }
  const field = error.param && form?.elements.namedItem(error.param);
  if (field instanceof HTMLElement) {
    field.setAttribute("aria-invalid", "true");
    for (let at = field.closest("details"); at; at = at.parentElement.closest("details")) at.open = true;
    field.focus();
  }
}

// --- Money: whole base units, shown in tokens ---

/** "1,234.5 CUTE" of base units, which may be more than a double holds exactly: digits are moved, not divided. */
export function tokens(units, decimals = Number(page.decimals), symbol = page.symbol) {
  const digits = BigInt(units)
    .toString()
    .replace("-", "")
    .padStart(decimals + 1, "0");
  const whole = BigInt(digits.slice(0, digits.length - decimals) || "0").toLocaleString("en");
  const rest = decimals ? digits.slice(-decimals).replace(/0+$/, "") : "";
  return `${units < 0 ? "−" : ""}${whole}${rest ? "." + rest : ""} ${symbol}`.trim();
}

/** Base units of what somebody wrote, or null. */
export function units(text, decimals = Number(page.decimals)) {
  const match = /^\s*(\d*)(?:\.(\d*))?\s*$/.exec(text);
  if (!match || !(match[1] || match[2]) || (match[2] ?? "").length > decimals) return null;
  return Number(BigInt((match[1] || "0") + (match[2] ?? "").padEnd(decimals, "0")));
}

/** "$1.00, 50 CUTE" of a cost; "" where nothing costs. */
export function cost(cost) {
  return cost ? `$${dollars(cost.usd)}, ${tokens(cost.tokens)}` : "";
}

/** "1.00": at least two decimals, none lost. */
export function dollars(text) {
  return String(text).includes(".") ? String(text).replace(/\.(\d)$/, ".$10") : `${text}.00`;
}

/** Says beside a form's button what a call of `service` costs, where it costs something. */
export async function showPrice(service, element) {
  if (page.free) return;
  try {
    const found = (await api("/api/pricing")).services.find(({ name }) => name === service);
    if (!found) return;
    const now = found.tokens === null ? "" : `, ${tokens(found.tokens)} now`;
    element.textContent = `$${dollars(found.usd)} for each ${found.unit}${now}. What fails costs nothing.`;
    element.hidden = false;
  } catch {
    /* the page works without */
  }
}

// --- Who is signed in: the cookie is the server's; this only remembers that there is one, so that nobody else asks ---

export function signedIn(change) {
  try {
    if (change === true) localStorage.setItem("diffusionz", "in");
    if (change === false) localStorage.removeItem("diffusionz");
    return localStorage.getItem("diffusionz") === "in";
  } catch {
    return true; // no storage: the server will say
  }
}

export async function showChip() {
  const chip = $("chip");
  if (!chip) return;
  if (!signedIn()) {
    chip.textContent = "Sign in";
  } else {
    try {
      const balance = await api("/api/balance");
      chip.textContent = tokens(balance.available, balance.decimals, balance.symbol);
    } catch {
      chip.textContent = signedIn() ? "Account" : "Sign in";
    }
  }
  chip.hidden = false;
}

// --- Small things ---

/** Says it to a screen reader. */
export function announce(text) {
  $("announce").textContent = "";
  setTimeout(() => {
    $("announce").textContent = text;
  }, 50); // the same text twice is to be heard twice
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no permission, or plain http from elsewhere
    const area = make("textarea", { value: text, className: "hidden" });
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.textContent;
  if (label !== "Copied")
    setTimeout(() => {
      button.textContent = label;
    }, 1500);
  button.textContent = "Copied";
  announce("Copied");
}

export function facts(list, pairs) {
  list.replaceChildren(
    ...Object.entries(pairs)
      .filter(([, value]) => value)
      .map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))),
  );
}

/** Brings what happens into view, where it is below the form. */
export function reveal(element) {
  if (innerWidth >= 864) return;
  element.scrollIntoView({
    behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    block: "start",
  });
}

/** "443 ms", "2.4 s". */
export function duration(ms) {
  return ms === undefined ? "" : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** A curl call of `path` with this body, for a POSIX shell. */
export function curl(path, body, rest = "") {
  const key = page.free ? "" : ` \\\n  -H "Authorization: Bearer $DIFFUSIONZ_API_KEY"`;
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  const type = ` \\\n  -H "Content-Type: application/json"`;
  return `curl -s -f ${location.origin}${path}${key}${type} \\\n  -d '${json}'${rest}`;
}

/** An id that nobody else makes; crypto.randomUUID is there only on https. */
export function token() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = make("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

showChip();
