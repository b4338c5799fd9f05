// The noise level over the timesteps, and where on it the steps are.

import { el } from "../dom.js";
import { percent } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 150, 42, 10, 10, 26];

function draw(tag, attributes, text = "") {
  const found = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  if (text) found.textContent = text;
  return found;
}

export class Curve {
  // onSelect(step) is called when a point is pressed.
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.element = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "inside-curve", role: "img" });
    this.points = [];
  }

  // plan: what the run says of itself at its begin. Time runs from the left, noise, to the right, clean.
  set(plan) {
    const last = Math.max(...plan.curve.map(([t]) => t), 1);
    this.x = (t) => LEFT + (1 - Math.max(t, 0) / last) * (WIDTH - LEFT - RIGHT);
    this.y = (noise) => TOP + (1 - noise) * (HEIGHT - TOP - BOTTOM);
    this.levels = plan.levels;
    const line = plan.curve.map(([t, alpha]) => `${this.x(t).toFixed(1)},${this.y(1 - alpha).toFixed(1)}`);
    const area = [`${this.x(last)},${this.y(0)}`, ...line.toReversed(), `${this.x(0)},${this.y(0)}`];
    this.cursor = draw("line", { class: "inside-cursor", y1: TOP, y2: HEIGHT - BOTTOM });
    this.points = plan.levels.slice(0, plan.steps).map((level, i) => {
      const place = { cx: this.x(level.t), cy: this.y(1 - level.alpha_bar) };
      const point = draw("circle", { ...place, r: plan.steps > 40 ? 2.5 : 3.5 });
      point.addEventListener("click", () => this.onSelect(i));
      return point;
    });
    this.element.replaceChildren(
      ...[0, 0.5, 1].flatMap((share) => [
        draw("line", { class: "inside-grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(share), y2: this.y(share) }),
        draw("text", { x: LEFT - 6, y: this.y(share) + 3.5, "text-anchor": "end" }, `${100 * share} %`),
      ]),
      draw("polygon", { class: "inside-area", points: area.join(" ") }),
      draw("polyline", { class: "inside-line", points: line.join(" ") }),
      this.cursor,
      ...this.points,
      draw("text", { x: LEFT, y: HEIGHT - 8 }, `t = ${last}, noise`),
      draw("text", { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, "t = 0, clean"),
    );
  }

  // Mark a step; the number of steps is the end.
  mark(step) {
    const level = this.levels?.[step];
    if (!level) return;
    const x = this.x(level.t);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.points.forEach((point, i) => {
      point.setAttribute("class", i < step ? "inside-past" : i === step ? "inside-now" : "");
    });
    const where = step < this.points.length ? `Step ${step + 1} of ${this.points.length}` : "The end";
    this.element.setAttribute("aria-label", `Noise level. ${where}: ${percent(1 - level.alpha_bar)} noise`);
  }
}

// A list of numbers, each with its name.
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null);
  const rows = known.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  return el("dl", { className: "inside-facts" }, ...rows);
}
