// The documentation: curl or Python, buttons that copy, prices of the moment, and which key is whose.

import { $, api, copy, make, page, signedIn, tokens } from "./base.js";

const switcher = $("language");
function choose(language) {
  document.body.dataset.show = language;
  switcher.querySelector(`[value="${language}"]`).checked = true;
  try {
    localStorage.setItem("diffusionz-samples", language);
  } catch {
    /* not kept then */
  }
}
let kept = null;
try {
  kept = localStorage.getItem("diffusionz-samples");
} catch {
  /* nothing kept */
}
choose(kept === "python" ? "python" : "curl");
switcher.hidden = false;
switcher.addEventListener("change", (event) => choose(event.target.value));

for (const block of document.querySelectorAll(".code")) {
  const button = make("button", { type: "button", textContent: "Copy" });
  button.addEventListener("click", () => copy(block.querySelector("code").textContent, button));
  block.append(button);
}

async function prices() {
  const { services } = await api("/api/pricing");
  for (const { name, tokens: units } of services) {
    const cell = document.querySelector(`tr[data-service="${CSS.escape(name)}"]`)?.children[2];
    if (cell) cell.textContent = units === null ? "no rate now" : tokens(units, Number(page.decimals), "");
  }
}

async function key() {
  const answer = await api("/api/keys");
  const there = (answer.keys ?? answer).filter(({ revoked_at: revoked }) => !revoked);
  if (there.length)
    $("key-hint").textContent =
      `yours begin with ${there.map(({ id }) => `cutedsl_${id}`).join(", ")}; the rest was shown when they were made.`;
}

if (!page.free) {
  prices().catch(() => {});
  if (signedIn()) key().catch(() => {});
}
