"use strict";
// One validation at a time, chosen with the slider; without this script all of them stand below each other.
const slider = document.querySelector(".slider input");
if (slider) {
  const grids = [...document.querySelectorAll(".grid")];
  const says = document.querySelector(".slider output");
  const show = () => {
    grids.forEach((grid, place) => { grid.hidden = place !== Number(slider.value); });
    says.textContent = "Step " + Number(grids[slider.value].dataset.step).toLocaleString("en");
  };
  document.querySelectorAll(".grid figcaption").forEach((caption) => { caption.hidden = true; });
  slider.hidden = grids.length < 2;
  slider.addEventListener("input", show);
  show();
}
// The value under the pointer, as it stands in metrics.jsonl.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points);
  const [first, last] = JSON.parse(svg.dataset.x);
  const [low, high] = JSON.parse(svg.dataset.y);
  const [left, right, top, bottom] = JSON.parse(svg.dataset.frame);
  const scale = svg.dataset.log === "1" ? Math.log : (value) => value;
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  dot.setAttribute("class", "dot");
  dot.setAttribute("r", "4");
  dot.setAttribute("visibility", "hidden");
  svg.append(dot);
  const placeX = (step) => left + (step - first) / (last - first) * (right - left);
  const placeY = (value) => {
    const inside = Math.min(Math.max(value, low), high);
    return bottom - (scale(inside) - scale(low)) / (scale(high) - scale(low)) * (bottom - top);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    let from = 0, to = points.length - 1;
    while (from < to) {
      const middle = (from + to) >> 1;
      if (placeX(points[middle][0]) < at) from = middle + 1; else to = middle;
    }
    if (from > 0 && at - placeX(points[from - 1][0]) < placeX(points[from][0]) - at) from -= 1;
    const [step, value] = points[from];
    dot.setAttribute("cx", placeX(step));
    dot.setAttribute("cy", placeY(value));
    dot.setAttribute("visibility", "visible");
    tip.textContent = "step " + step.toLocaleString("en") + ": " + Number(value.toPrecision(5));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, room)) + "px";
    tip.style.top = event.clientY - 34 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; dot.setAttribute("visibility", "hidden"); });
}
