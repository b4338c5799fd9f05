// The hints for control networks: each a sketch or a picture, with what a request asks of the network.

import { readPicture } from "./pictures.js";
import { HintScene } from "./scenes.js";
import { button, check, choice, el, fileButton, segments, slider } from "./dom.js";

const MOST = 20; // of a request
const ANNOTATORS = [
  ["none", "the hint itself"],
  ["canny", "a picture, whose edges are the hint"],
  ["invert", "black lines on white"],
];
const percent = (value) => `${Math.round(100 * value)} %`;

class Hint {
  constructor(name, width, height) {
    Object.assign(this, { name, scale: 1, start: 0, end: 1, annotate: null, low: 100, high: 200 });
    this.scene = new HintScene(width, height);
  }

  /** What a picture is: as chosen, or as is usual for the network of this name. */
  get annotator() {
    return this.annotate ?? (/canny|edge/i.test(this.name) ? "canny" : "none");
  }

  /** As in the `controls` of a request; null if there is nothing to send. */
  value() {
    const image = this.scene.url();
    if (!image || !this.name) return null;
    const { name, scale, start, end, low, high } = this;
    const own = this.scene.isDarkOnLight ? "invert" : "none";
    const annotate = this.scene.source === "picture" ? this.annotator : own;
    return { name, image, scale, start, end, annotate, ...(annotate === "canny" ? { low, high } : {}) };
  }
}

export class Hints {
  #names = [];
  #list = [];
  #current = null;
  #host;
  #parts;

  /**
   * host   size(): [width, height] of a new sketch; picture(): the image that is edited, or null;
   *        shown(): another hint, or its source, is to be shown; changed(); fail(error)
   */
  constructor(host) {
    this.#host = host;
    this.root = el("div", { class: "ed-hints" });
    this.#parts = this.#build();
    this.#show();
  }

  get scene() {
    return this.#current?.scene ?? null;
  }

  get any() {
    return this.#names.length > 0;
  }

  /** What goes into the `controls` of a request. */
  values() {
    return this.#list.map((hint) => hint.value()).filter(Boolean);
  }

  async prepare() {
    for (const hint of this.#list) await hint.scene.prepare();
  }

  set names(names) {
    this.#names = [...names];
    for (const hint of this.#list) {
      if (!this.#names.includes(hint.name)) hint.name = this.#names[0] ?? "";
    }
    this.#parts.network.fill(this.#names.map((name) => [name, name]));
    this.#show();
  }

  /** Have a hint to draw on, in the size that is wanted now if nothing has been drawn. */
  begin() {
    if (!this.any) return;
    if (!this.#current) this.#add();
    const [width, height] = this.#host.size();
    for (const hint of this.#list) {
      const { scene } = hint;
      if (scene.lines.width === width && scene.lines.height === height) continue;
      if (!scene.isEmpty || scene.history.canUndo) continue;
      const resized = new HintScene(width, height);
      Object.assign(resized, { source: scene.source, picture: scene.picture, paper: scene.isDarkOnLight });
      hint.scene = resized;
    }
    this.#show();
  }

  /** Take a picture, a Blob or a canvas, as the current hint. */
  async setPicture(source) {
    const hint = this.#current;
    if (!hint) return;
    try {
      hint.scene.picture = source instanceof HTMLCanvasElement ? source : (await readPicture(source)).canvas;
    } catch (error) {
      this.#host.fail(error);
      return;
    }
    hint.scene.source = "picture";
    this.#show();
    this.#host.changed();
  }

  #add() {
    this.#current = new Hint(this.#names[0], ...this.#host.size());
    this.#list.push(this.#current);
  }

  #remove() {
    const at = this.#list.indexOf(this.#current);
    this.#list.splice(at, 1);
    this.#current = this.#list[Math.min(at, this.#list.length - 1)] ?? null;
    if (!this.#current) this.#add();
    this.#show();
    this.#host.changed();
  }

  #set(name, value) {
    this.#current[name] = value;
    this.#host.changed();
  }

  #build() {
    const set = (name) => (value) => this.#set(name, value);
    const tabs = el("div", { class: "ed-tabs", role: "group", "aria-label": "Hints" });
    const network = choice({
      label: "Network",
      options: [],
      value: "",
      change: (name) => {
        this.#set("name", name);
        this.#show();
      },
    });
    const source = segments({
      label: "The hint is",
      options: [["sketch", "Draw it"], ["picture", "A picture"]],
      value: "sketch",
      change: (value) => {
        this.#current.scene.source = value;
        this.#show();
        this.#host.changed();
      },
    });
    const paper = check({
      label: "Black lines on white",
      title: "Sent with the annotator invert",
      change: (on) => {
        this.#current.scene.paper = on;
        this.#show();
        this.#host.changed();
      },
    });
    const under = check({
      label: "Trace the image",
      title: "Show the image that is edited faintly below the lines",
      change: (on) => {
        this.#current.scene.under = on ? this.#host.picture() : null;
        this.#show();
      },
    });
    const use = button("Use the image", () => this.setPicture(this.#host.picture()));
    const file = fileButton("Choose a picture", (blob) => this.setPicture(blob));
    const annotate = choice({
      label: "It is",
      options: ANNOTATORS,
      value: "canny",
      change: (value) => {
        this.#set("annotate", value);
        this.#show();
      },
    });
    const threshold = (name, other, limit, label) =>
      slider({
        label,
        min: 0,
        max: 255,
        step: 1,
        value: 0,
        change: (value) => {
          this.#current[other] = limit(this.#current[other], value);
          this.#set(name, value);
          this.#show();
        },
      });
    const low = threshold("low", "high", Math.max, "Weakest edge");
    const high = threshold("high", "low", Math.min, "Clear edge");
    const scale = slider({ label: "Strength", min: 0, max: 2, step: 0.05, value: 1, change: set("scale") });
    const share = (label, change) => slider({ label, min: 0, max: 1, step: 0.05, value: 0, show: percent, change });
    const start = share("From", (value) => this.#range(Math.min(value, 0.95), null));
    const end = share("Until", (value) => this.#range(null, Math.max(value, 0.05)));
    start.root.title = end.root.title = "The part of the steps in which the hint is followed";
    const none = el(
      "p",
      { class: "ed-note" },
      "This model has no control networks. A server that is started with --controls FOLDER has those in the folder.",
    );
    const draw = el("div", { class: "ed-row" }, paper.root, under.root);
    const choose = el("div", { class: "ed-row" }, use, file, annotate.root);
    const edges = el("div", { class: "ed-row" }, low.root, high.root);
    const settings = el(
      "div",
      { class: "ed-settings" },
      el("div", { class: "ed-row" }, network.root, source.root),
      draw,
      choose,
      edges,
      el("div", { class: "ed-row" }, scale.root, start.root, end.root),
    );
    this.root.append(none, tabs, settings);
    return { tabs, network, source, paper, under, use, annotate, low, high, scale, start, end, none, draw, choose, edges, settings };
  }

  #range(start, end) {
    const hint = this.#current;
    hint.start = start ?? Math.min(hint.start, end - 0.05);
    hint.end = end ?? Math.max(hint.end, start + 0.05);
    // sums of 0.05 are not exact
    hint.start = Number(hint.start.toFixed(2));
    hint.end = Number(hint.end.toFixed(2));
    this.#show();
    this.#host.changed();
  }

  /** Show the hints and the settings of the current one. */
  #show() {
    const parts = this.#parts;
    const hint = this.#current;
    parts.none.hidden = this.any;
    parts.tabs.hidden = parts.settings.hidden = !this.any || !hint;
    if (hint) {
      const { scene } = hint;
      const isSketch = scene.source === "sketch";
      const picture = this.#host.picture();
      parts.network.set(hint.name);
      parts.source.set(scene.source);
      parts.paper.set(scene.isDarkOnLight);
      parts.under.set(scene.under !== null);
      parts.under.root.hidden = parts.use.hidden = !picture;
      parts.annotate.set(hint.annotator);
      for (const name of ["low", "high", "scale", "start", "end"]) parts[name].set(hint[name]);
      parts.draw.hidden = !isSketch;
      parts.choose.hidden = isSketch;
      parts.edges.hidden = isSketch || hint.annotator !== "canny";
      this.#showTabs();
    }
    this.#host.shown();
  }

  #showTabs() {
    const tab = (hint, i) =>
      button(`Hint ${i + 1}`, () => {
        this.#current = hint;
        this.#show();
        this.#parts.tabs.children[i].focus();
      }, { "aria-pressed": String(hint === this.#current) });
    const add = button("+ Add", () => {
      this.#add();
      this.#show();
      this.#parts.tabs.children[this.#list.length - 1].focus();
    }, { class: "ed-quiet", "aria-label": "Add a hint", disabled: this.#list.length >= MOST });
    const remove = button("Remove", () => this.#remove(), { class: "ed-quiet", "aria-label": "Remove this hint" });
    this.#parts.tabs.replaceChildren(...this.#list.map(tab), add, remove);
  }
}
