"use strict";
// One validation at a time, chosen with the slider; without this script all of them stand below each other.
const slider = document.querySelector(".slider input");
if (slider) {
  const grids = [...document.querySelectorAll(".grid")];
  const says = document.querySelector(".slider output");
  const show = () => {
    const { label, best, score } = grids[slider.value].dataset;
    grids.forEach((grid, place) => { grid.hidden = place !== Number(slider.value); });
    says.textContent = label + (best ? " ★ " + best : "") + (score ? ": " + score : "");
  };
  document.querySelectorAll(".grid figcaption").forEach((caption) => { caption.hidden = true; });
  slider.hidden = grids.length < 2;
  slider.addEventListener("input", show);
  // A star below the best ones, which takes there; half a thumb of the slider is left free at both its ends.
  grids.forEach((grid, place) => {
    if (!grid.dataset.best || grids.length < 2) return;
    const star = document.createElement("button");
    star.type = "button";
    star.textContent = "★";
    star.title = grid.dataset.label + ": " + grid.dataset.best;
    star.style.left = `calc(8px + (100% - 16px) * ${place / (grids.length - 1)})`;
    star.addEventListener("click", () => { slider.value = place; show(); });
    slider.after(star);
  });
  show();
}
// The values under the pointer, as they stand in the run's files.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines).filter((line) => line.points.length);
  const [first, last] = JSON.parse(svg.dataset.x);
  const [low, high] = JSON.parse(svg.dataset.y);
  const [left, right, top, bottom] = JSON.parse(svg.dataset.frame);
  const scale = svg.dataset.log === "1" ? Math.log : (value) => value;
  const dots = lines.map(({ number }) => {
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    dot.setAttribute("class", "dot run" + number);
    dot.setAttribute("r", "4");
    dot.setAttribute("visibility", "hidden");
    svg.append(dot);
    return dot;
  });
  const placeX = (step) => left + (step - first) / (last - first) * (right - left);
  const placeY = (value) => {
    const inside = Math.min(Math.max(value, low), high);
    return bottom - (scale(inside) - scale(low)) / (scale(high) - scale(low)) * (bottom - top);
  };
  const nearest = (points, at) => {
    let from = 0, to = points.length - 1;
    while (from < to) {
      const middle = (from + to) >> 1;
      if (placeX(points[middle][0]) < at) from = middle + 1; else to = middle;
    }
    if (from > 0 && at - placeX(points[from - 1][0]) < placeX(points[from][0]) - at) from -= 1;
    return points[from];
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    tip.textContent = lines.map(({ label, points }, place) => {
      const [step, value] = nearest(points, at);
      dots[place].setAttribute("cx", placeX(step));
      dots[place].setAttribute("cy", placeY(value));
      dots[place].setAttribute("visibility", "visible");
      return (label ? label + ", " : "") + "step " + step.toLocaleString("en") + ": " + Number(value.toPrecision(5));
    }).join("\n");
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, room)) + "px";
    tip.style.top = event.clientY - 14 - tip.offsetHeight + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    dots.forEach((dot) => dot.setAttribute("visibility", "hidden"));
  });
}
