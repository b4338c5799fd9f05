// The large image with one map laid over it, and the numbers of that map.

import { el } from "../dom.js";
import { clear, drawHeat, drawRamp } from "./heat.js";

const SIDE = 512; // pixels of the longer side of the canvas

export class Stage {
  // onPlace(x, y) is called with the place that is pointed at, as fractions of the sides, and with null when none is.
  constructor({ onPlace, label }) {
    this.image = el("img", { alt: "", draggable: false });
    this.canvas = el("canvas", { className: "inside-heat", width: SIDE, height: SIDE, role: "img" });
    this.mark = el("span", { className: "inside-mark", hidden: true });
    this.title = el("strong", {}, "");
    this.about = el("span", { className: "hint" }, "");
    this.here = el("span", { className: "inside-here" }, "");
    this.low = el("span", {}, "");
    this.high = el("span", {}, "");
    const ramp = el("canvas", { width: 128, height: 1, className: "inside-ramp", "aria-hidden": "true" });
    drawRamp(ramp);
    this.legend = el("figcaption", { className: "inside-legend" },
      el("div", { className: "inside-legend-top" }, this.title, this.about, this.here),
      el("div", { className: "inside-scale" }, this.low, ramp, this.high),
    );
    this.frame = el("div", { className: "inside-frame" }, this.image, this.canvas, this.mark);
    this.element = el("figure", { className: "inside-figure", "aria-label": label }, this.frame, this.legend);
    this.heat = null;
    this.frame.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      onPlace(x >= 0 && x < 1 && y >= 0 && y < 1 ? { x, y } : null);
    });
    this.frame.addEventListener("pointerleave", () => onPlace(null));
  }

  // Show an image: its address, its size (as shown, for the shape) and what it is.
  show(source, width, height, alt) {
    if (source) {
      if (this.image.getAttribute("src") !== source) this.image.src = source;
    } else this.image.removeAttribute("src");
    this.image.hidden = !source;
    this.image.alt = alt;
    const scale = SIDE / Math.max(width, height);
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, { width: w, height: h });
    this.element.style.setProperty("--shape", String(width / height));
  }

  // Lay a map over it: {heat, title, about, opacity, low, high, write}, with write(value) for a value as text.
  // Null: none.
  overlay(map) {
    this.heat = map?.heat ?? null;
    this.write = map?.write;
    this.legend.classList.toggle("inside-empty", !this.heat);
    this.title.textContent = map?.title ?? "";
    this.about.textContent = map?.about ?? "Point at a word, or press it, to see where the image looks at it.";
    if (!this.heat) {
      clear(this.canvas);
      this.low.textContent = this.high.textContent = this.here.textContent = "";
      this.canvas.setAttribute("aria-label", "No map");
      return;
    }
    const { low = this.heat.low, high = this.heat.high } = map;
    drawHeat(this.canvas, this.heat, map.opacity, low, high);
    this.low.textContent = map.write(low);
    this.high.textContent = map.write(high);
    const range = `${map.write(low)} to ${map.write(high)}`;
    this.canvas.setAttribute("aria-label", `Map of ${map.title}: ${range}. ${map.about}`);
  }

  // Mark a place, which is pointed at on this stage or on the one beside it; null: none.
  point(place) {
    this.mark.hidden = !place || !this.heat;
    if (this.mark.hidden) {
      this.here.textContent = "";
      return;
    }
    this.mark.style.left = `${100 * place.x}%`;
    this.mark.style.top = `${100 * place.y}%`;
    this.here.textContent = `here ${this.write(this.heat.at(place.x, place.y))}`;
  }
}
