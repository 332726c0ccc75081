// What has the focus, whether one sees that, and where it is.
let e = document.activeElement;
if (e === document.body) return null;
const focused = e;
// A field that is not seen shows its focus on its label.
if (e.matches(".filepick input")) e = e.nextElementSibling;
const style = getComputedStyle(e),
  box = e.getBoundingClientRect();
return {
  name: `${focused.tagName}#${focused.id} ${(focused.textContent || focused.value || "").trim().slice(0, 20)}`,
  seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && box.width > 0 && box.height > 0,
  inside: box.bottom > 0 && box.top < innerHeight,
  order: [...document.querySelectorAll("*")].indexOf(focused),
};
