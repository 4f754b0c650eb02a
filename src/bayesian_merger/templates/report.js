"use strict";
const slider = document.getElementById("slider");
const [left, right] = [new Image(), new Image()];
slider.querySelector(".over").prepend(left, right);
const [onLeft, onRight] = slider.querySelectorAll("select");
const place = slider.querySelector("input");
let row;
function slide() {
  const [one, other] = [onLeft, onRight].map((chosen) => row[chosen.selectedIndex]);
  [left.src, left.alt, right.src, right.alt] = [one.src, one.alt, other.src, other.alt];
  for (const image of [left, right]) image.classList.toggle("tiny", one.classList.contains("tiny"));
  left.style.clipPath = `inset(0 ${100 - place.value}% 0 0)`;
  slider.querySelector(".over span").style.left = `${place.value}%`;
}
const close = slider.querySelector("button");
close.hidden = false;
close.addEventListener("click", () => slider.close());
for (const changed of [onLeft, onRight, place]) changed.addEventListener("input", slide);
for (const button of document.querySelectorAll(".slides")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const item = button.closest("li");
    row = [...item.querySelectorAll("figure img")];
    const names = [...item.querySelectorAll("figure .name")].map((name) => name.textContent);
    onLeft.replaceChildren(...names.map((name) => new Option(name)));
    onRight.replaceChildren(...names.map((name) => new Option(name)));
    // The even merge beside the best, where both are there.
    [onLeft.selectedIndex, onRight.selectedIndex] = [Math.max(names.length - 2, 0), names.length - 1];
    slider.querySelector(".prompt").textContent = item.querySelector(".prompt").textContent;
    slide();
    slider.showModal();
    place.focus();
  });
}
for (const button of document.querySelectorAll("[data-copies]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    getSelection().selectAllChildren(source);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
{% if refresh_s %}
// Not while somebody looks closely: a picture enlarged, two beside each other, text selected.
setInterval(() => {
  const busy = slider.open || document.querySelector("figure:target, details[open]") || !getSelection().isCollapsed
    || document.activeElement !== document.body;
  if (!busy && !document.hidden) location.reload();
}, {{ refresh_s * 1000 }});
{% endif %}
addEventListener("keydown", (event) => {
  const shown = document.querySelector("figure:target");
  if (!shown) return;
  const links = [...shown.querySelectorAll("nav a:not(.close)")];
  const here = links.findIndex((link) => link.hasAttribute("aria-current"));
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const row = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "Escape") shown.querySelector(".close").click();
  else if (step) links[(here + step + links.length) % links.length].click();
  else if (row) {
    // The same model on the prompt before or after, in the order of the page.
    const name = shown.id.split("-").pop();
    const same = [...document.querySelectorAll(`figure[id^="picture-"][id$="-${name}"]`)];
    const next = same[same.indexOf(shown) + row];
    if (next) location.hash = next.id;
    event.preventDefault();
  }
});
