// Notes down, in `seen`, what a visitor to the first page sees come by.
window.seen = { pictures: [], status: [], steps: [] };
new MutationObserver(() => {
  const picture = document.querySelector("#frame img");
  if (picture && seen.pictures.at(-1) !== picture.src) seen.pictures.push(picture.src);
  const status = document.querySelector("#status").textContent;
  if (status && seen.status.at(-1) !== status) seen.status.push(status);
  const bar = document.querySelector("#bar");
  if (bar.hasAttribute("value") && seen.steps.at(-1) !== bar.value) seen.steps.push(bar.value);
}).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
