// The tools: the brush, undo, and what is done to all of the mask, above the canvas; the zoom, below it.

import { button, el, segments, slider } from "./dom.js";

export class Toolbar {
  /** tools   undo(), redo(), fill(), invert(), empty(), zoomBy(direction); painter: the brush */
  constructor(painter, tools) {
    const brush = painter.brush;
    this.painter = painter;
    this.kind = segments({
      label: "Tool",
      options: [["paint", "Brush"], ["erase", "Eraser"]],
      titles: { paint: "Paint (X changes)", erase: "Erase (X changes)" },
      value: "paint",
      change: (value) => {
        brush.erase = value === "erase";
        painter.show();
      },
    });
    // a slider with even steps would have no fine sizes, so its position is the square root of the size
    this.size = slider({
      label: "Size",
      title: "Diameter in pixels of the image ([ and ])",
      min: 1,
      max: 16,
      step: 0.01,
      value: Math.sqrt(brush.size),
      show: (root) => `${Math.round(root * root)} px`,
      change: (root) => {
        brush.size = Math.max(1, Math.round(root * root));
        painter.show();
      },
    });
    this.softness = slider({
      label: "Softness",
      min: 0,
      max: 1,
      step: 0.05,
      value: brush.softness,
      show: (value) => `${Math.round(100 * value)} %`,
      change: (value) => {
        brush.softness = value;
        painter.show();
      },
    });
    this.undo = button("Undo", tools.undo, { keys: "Ctrl+Z" });
    this.redo = button("Redo", tools.redo, { keys: "Ctrl+Shift+Z" });
    this.fill = button("Fill", tools.fill, { title: "Mask everything" });
    this.invert = button("Invert", tools.invert, { title: "Swap what is masked and what is not" });
    this.empty = button("Clear", tools.empty, { title: "Paint nothing" });
    this.whole = el("div", { class: "ed-group" }, this.fill, this.invert, this.empty);
    const history = el("div", { class: "ed-group" }, this.undo, this.redo);
    this.zoom = el(
      "div",
      { class: "ed-group ed-zoom", role: "group", "aria-label": "Zoom" },
      button("−", () => tools.zoomBy(-1), { title: "Zoom out", keys: "-", "aria-label": "Zoom out" }),
      button("Fit", () => tools.zoomBy(0), { title: "Show all", keys: "0" }),
      button("+", () => tools.zoomBy(1), { title: "Zoom in", keys: "+", "aria-label": "Zoom in" }),
    );
    this.brush = [this.kind.root, this.size.root, this.softness.root];
    const parts = [this.kind.root, history, this.size.root, this.softness.root, this.whole];
    this.root = el("div", { class: "ed-bar", role: "group", "aria-label": "Tools" }, ...parts);
  }

  /** Show the tools that do something in this scene. */
  show(scene) {
    const { brush, largest } = this.painter;
    this.kind.set(brush.erase ? "erase" : "paint");
    this.size.input.max = Math.sqrt(largest ?? 256);
    this.size.set(Math.sqrt(brush.size));
    this.softness.set(brush.softness);
    for (const part of [...this.brush, this.whole]) part.hidden = !scene?.surface;
    // not `disabled`, which would take the focus away from a button that was just pressed, and the keys with it
    this.undo.setAttribute("aria-disabled", String(!scene?.history.canUndo));
    this.redo.setAttribute("aria-disabled", String(!scene?.history.canRedo));
  }
}
