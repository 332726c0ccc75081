// The account: signing in, credit that arrives, keys, and what was spent.

import {
  $,
  Problem,
  announce,
  api,
  copy,
  dollars,
  make,
  page,
  showChip,
  showProblem,
  signedIn,
  tokens,
  units,
} from "./base.js";
import { signIn, watchWallets } from "./wallet.js";

const POLL_MS = page.dev ? 500 : 2500; // on a dev chain what arrives is final after two seconds
const PAGE = 50; // lines of history at once

let before = null; // the oldest line that is shown
let available = null;
let timer = null;

const failed = (error) => {
  showProblem($("problem"), error);
  if (error.kind === "unauthorized") show(false);
};

// --- Signed out ---

let listed = "";
watchWallets((wallets) => {
  // Drawn anew only when another comes or goes: who is on a button with the keyboard is to stay there.
  const names = wallets.map((wallet) => `${wallet.name} ${"provider" in wallet}`).join("\n");
  if (names && names === listed) return;
  listed = names;
  $("wallets").replaceChildren(
    ...wallets.map((wallet) => {
      const button = make("button", { type: "button" });
      if (wallet.icon) button.append(make("img", { src: wallet.icon, alt: "" }));
      button.append(wallet.name);
      button.addEventListener("click", () => enter(wallet));
      return make("li", {}, button);
    }),
  );
  if (!$("waiting").dataset.busy)
    $("waiting").textContent = wallets.length
      ? ""
      : "No wallet was found in this browser. Install one, then load this page again.";
});

async function enter(wallet) {
  showProblem($("problem"));
  const buttons = $("wallets").querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  $("waiting").dataset.busy = "1";
  try {
    const done = await signIn(wallet, (text) => {
      $("waiting").textContent = text;
    });
    signedIn(true);
    await show(true);
    if (done.api_key) showSecret(done.api_key);
    else document.querySelector("#in h1").focus();
    announce("You are signed in");
  } catch (error) {
    failed(error);
  } finally {
    $("waiting").textContent = "";
    delete $("waiting").dataset.busy;
    for (const button of buttons) button.disabled = false;
  }
}

$("sign-out").addEventListener("click", async () => {
  try {
    await api("/api/sign-out", { method: "POST" });
    signedIn(false);
    await show(false);
    document.querySelector("#out h1").focus();
    announce("You are signed out");
  } catch (error) {
    failed(error);
  }
});

// --- Signed in ---

async function show(inside) {
  clearTimeout(timer);
  if (inside) {
    try {
      const account = await api("/api/account");
      $("who").textContent = (account.wallets ?? []).join(", ");
      available = null;
      await Promise.all([balance(), deposit(), keys(), history()]);
      if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
    } catch (error) {
      inside = false;
      if (error.kind !== "unauthorized") showProblem($("problem"), error);
    }
  }
  $("secret").hidden = true;
  $("secret-value").value = "";
  $("in").hidden = !inside;
  $("out").hidden = inside;
  showChip();
  if (inside) timer = setTimeout(poll, POLL_MS);
}

/** The balance, again and again while somebody looks. */
async function poll() {
  try {
    if (!document.hidden) await balance();
  } catch (error) {
    if (error.kind === "unauthorized") return failed(error);
  }
  timer = setTimeout(poll, POLL_MS);
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !$("in").hidden) {
    clearTimeout(timer);
    poll();
  }
});

async function balance() {
  const now = await api("/api/balance");
  const { decimals, symbol } = now;
  const [number, unit] = split(tokens(now.available, decimals, symbol));
  $("balance").replaceChildren(number, make("small", { textContent: ` ${unit}` }));
  const held = now.held > 0 ? `${tokens(now.held, decimals, symbol)} held for work in progress. ` : "";
  $("held").textContent = held + (now.usd ? `Worth $${dollars(now.usd)} here.` : "");
  $("held").hidden = !$("held").textContent;
  const coming = [
    ...(now.arriving ?? []).map((one) => `${amount(one)} on the way, until the chain is final`),
    ...(now.waiting ?? []).map((one) => `${amount(one)} arrived; credited later: ${one.reason}`),
  ];
  if ([...$("arriving").children].map(({ textContent }) => textContent).join() !== coming.join()) {
    $("arriving").replaceChildren(...coming.map((text) => make("li", { textContent: text })));
  }
  if (available !== null && now.available !== available) {
    if (now.available > available) announce(`Credit arrived: ${tokens(now.available - available, decimals, symbol)}`);
    history(); // something happened, so there is a line of it
    deposit(); // the address is another once a deposit to it is final
    showChip();
  }
  available = now.available;
}

const split = (text) => {
  const at = text.lastIndexOf(" ");
  return [text.slice(0, at), text.slice(at + 1)];
};
const amount = ({ amount, decimals, currency }) => tokens(amount, decimals, currency);

// --- Deposits ---

async function deposit() {
  const there = await api("/api/deposit");
  if ($("address").textContent === there.address) return;
  $("address").textContent = there.address;
  $("symbol").textContent = (there.currencies ?? [{ currency: there.symbol }])
    .map(({ currency }) => currency)
    .join(" or ");
  $("qr").src = `/api/deposit/qr.svg?address=${encodeURIComponent(there.address)}`; // another address, another picture
  $("qr").hidden = false;
  const mint = there.mint ? ` The token's mint is ${there.mint}.` : "";
  $("arrives").textContent =
    `What you send is credited when the chain is final, after some 15 seconds.${page.dev ? "" : mint}`;
  $("arrives").classList.add("wrap");
}
$("address-copy").addEventListener("click", () => copy($("address").textContent, $("address-copy")));

$("faucet")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  showProblem($("problem"));
  const button = event.target.querySelector("button");
  button.disabled = true;
  try {
    await api("/api/dev/faucet", {
      body: { address: $("address").textContent, tokens: Number($("faucet-tokens").value) },
    });
    announce("They are on their way");
    await balance();
  } catch (error) {
    failed(error);
  } finally {
    button.disabled = false;
  }
});

// --- Keys ---

async function keys() {
  const answer = await api("/api/keys");
  const there = (answer.keys ?? answer).filter(({ revoked_at: revoked }) => !revoked);
  $("keys").replaceChildren(
    ...there.map((key) => {
      const button = make("button", {
        type: "button",
        className: "danger",
        textContent: "Revoke",
        "aria-label": `Revoke ${key.name}`,
      });
      button.addEventListener("click", () => revoke(key));
      return make(
        "tr",
        {},
        make("th", { scope: "row", textContent: key.name }),
        make("td", { className: "mono", textContent: key.shown ?? `cutedsl_${key.id}…` }),
        make("td", {
          textContent: key.daily_limit === null || key.daily_limit === undefined ? "none" : tokens(key.daily_limit),
        }),
        make("td", { className: "wide-only", textContent: key.used_at ? when(key.used_at) : "never" }),
        make("td", { className: "number" }, button),
      );
    }),
  );
  if (!there.length)
    $("keys").append(make("tr", {}, make("td", { colSpan: 5, className: "hint", textContent: "No keys yet." })));
}

$("new-key").addEventListener("submit", async (event) => {
  event.preventDefault();
  showProblem($("problem"));
  const written = $("key-limit").value.trim();
  const limit = written ? units(written) : null;
  try {
    if (written && limit === null)
      throw new Problem({ title: "This is no limit", detail: `A number with at most ${page.decimals} decimals.` });
    const made = await api("/api/keys", { body: { name: $("key-name").value.trim(), daily_limit: limit } });
    event.target.reset();
    await keys();
    showSecret(made.secret ?? made.api_key);
  } catch (error) {
    failed(error);
  }
});

async function revoke(key) {
  $("confirm-text").textContent =
    `Programs that use “${key.name}” (cutedsl_${key.id}…) are refused from then on. It cannot be undone.`;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
  await new Promise((done) => $("confirm").addEventListener("close", done, { once: true }));
  if ($("confirm").returnValue !== "yes") return;
  try {
    await api(`/api/keys/${encodeURIComponent(key.id)}`, { method: "DELETE" });
    await keys();
    $("keys-title").focus(); // the button that had it is gone
    announce(`${key.name} is revoked`);
  } catch (error) {
    failed(error);
  }
}

/** Shows a secret, this once. */
function showSecret(secret) {
  $("secret-value").value = secret;
  $("secret").hidden = false;
  $("secret-title").focus();
  $("secret").scrollIntoView({ block: "nearest" });
}
$("secret-copy").addEventListener("click", () => copy($("secret-value").value, $("secret-copy")));
$("secret-done").addEventListener("click", () => {
  $("secret-value").value = "";
  $("secret").hidden = true;
  $("keys-title").focus();
});

// --- History ---

/** The newest lines; `older`: those before the last that is shown. */
async function history(older = false) {
  const query = older && before !== null ? `&before=${before}` : "";
  const answer = await api(`/api/billing-history?limit=${PAGE}${query}`);
  const lines = answer.history ?? answer.lines ?? answer;
  // A call is held and then charged; what was held only is in the balance.
  const rows = lines
    .filter(({ posted }) => posted !== 0)
    .map((line) =>
      make(
        "tr",
        {},
        make("td", { textContent: when(line.created_at) }),
        make("td", { textContent: line.kind === "refund" ? `${line.code}, given back` : line.code }),
        make("td", { className: "number", textContent: `${line.posted > 0 ? "+" : ""}${tokens(line.posted)}` }),
        make("td", { className: "mono wrap wide-only", textContent: line.note || line.id }),
      ),
    );
  if (older) $("history").append(...rows);
  else $("history").replaceChildren(...rows);
  if (!$("history").children.length)
    $("history").append(make("tr", {}, make("td", { colSpan: 4, className: "hint", textContent: "Nothing yet." })));
  before = lines.length ? lines[lines.length - 1].seq : before;
  $("older").hidden = lines.length < PAGE;
}
$("older").addEventListener("click", () => history(true).catch(failed));

function when(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

show(signedIn());
