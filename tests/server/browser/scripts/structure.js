// What is wrong with a page's structure, for those who do not see it: a list of complaints.
const said = [];
const shown = (e) => e.checkVisibility();
const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) said.push(`two are called #${id}`);
for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for]")) {
  const names = [e.getAttribute("aria-labelledby"), e.getAttribute("aria-describedby"), e.htmlFor];
  for (const id of names.join(" ").split(/\s+/).filter(Boolean))
    if (!document.getElementById(id)) said.push(`nothing is called #${id}`);
}
const headings = [...document.querySelectorAll("h1, h2, h3, h4")].filter(shown).map((e) => Number(e.tagName[1]));
if (headings.filter((level) => level === 1).length !== 1) said.push(`${headings} are the headings`);
headings.forEach((level, i) => {
  if (i && level > headings[i - 1] + 1) said.push(`a heading ${level} follows ${headings[i - 1]}`);
});
for (const tag of ["header", "main", "footer", "nav[aria-label]"])
  if (!document.querySelector(tag)) said.push(`no ${tag}`);
if (document.documentElement.lang !== "en") said.push("no language");
if (!document.title.includes("diffusionz")) said.push("no title");
for (const e of document.querySelectorAll("img:not([alt])")) said.push(`no alt: ${e.src}`);
for (const e of document.querySelectorAll("[tabindex]")) if (e.tabIndex > 0) said.push("an order of its own");
for (const e of document.querySelectorAll("table"))
  if (shown(e) && !e.querySelector("th")) said.push("a table without heads");
for (const e of document.querySelectorAll("[onclick], [style*=expression], script:not([src]), style"))
  said.push(`inline: ${e.outerHTML.slice(0, 80)}`);
for (const e of document.querySelectorAll("a, button, input, select, textarea, summary")) {
  if (e.closest("[aria-hidden=true]")) said.push(`hidden, but can be focused: ${e.outerHTML.slice(0, 80)}`);
}
for (const e of document.querySelectorAll("a[target=_blank]:not([rel~=noopener])"))
  said.push(`opens without noopener: ${e.href}`);
if (document.querySelectorAll("[role=status], [role=alert], [aria-live]").length < 1) said.push("nothing is announced");
return said;
