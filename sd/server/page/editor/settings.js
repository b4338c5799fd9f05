// The settings of inpainting and of the frame, below the image.

import { NO_FRAME, SIDES, UNIT } from "./geometry.js";
import { button, check, choice, el, numberField, slider } from "./dom.js";

const CONTENTS = [
  ["original", "the image"],
  ["fill", "the colours around it"],
  ["noise", "noise"],
];
const FILLS = [
  ["edges", "the edge pixels"],
  ["transparent", "nothing"],
];

/** What is asked of inpainting besides image and mask: the fields content, blur and margin of a request. */
export class InpaintSettings {
  #values = { content: "original", blur: 0, margin: null };
  #margin = 32;

  constructor(changed) {
    const set = (name) => (value) => {
      this.#values[name] = value;
      changed();
    };
    const content = choice({
      label: "Start from",
      title: "What the masked part contains at first; no difference at strength 1",
      options: CONTENTS,
      value: "original",
      change: set("content"),
    });
    this.blur = slider({
      label: "Mask blur",
      title: "Softens the edge of the mask, outwards",
      min: 0,
      max: 64,
      step: 1,
      value: 0,
      show: (value) => `${value} px`,
      change: set("blur"),
    });
    const margin = slider({
      label: "Around it",
      title: "Pixels around the mask that the model sees",
      min: 0,
      max: 256,
      step: 4,
      value: this.#margin,
      show: (value) => `${value} px`,
      change: (value) => {
        this.#margin = value;
        set("margin")(value);
      },
    });
    margin.root.hidden = true;
    const only = check({
      label: "Only the masked region",
      title: "Generate the region around the mask at the model's full size: finer details in large images",
      change: (on) => {
        margin.root.hidden = !on;
        set("margin")(on ? this.#margin : null);
      },
    });
    this.root = el("div", { class: "ed-row" }, content.root, this.blur.root, only.root, margin.root);
  }

  value() {
    return { ...this.#values };
  }
}

/** The frame's sizes as numbers, for those who do not drag it, and how the new part begins. */
export class FrameSettings {
  #fields = {};

  /** host   setFrame(frame); changed(): fill or overlap of the scene were changed; scene(): the PictureScene */
  constructor(host) {
    const row = el("div", { class: "ed-row", role: "group", "aria-label": "Pixels to add on each side" });
    for (const side of SIDES) {
      const field = numberField({
        label: side[0].toUpperCase() + side.slice(1),
        min: 0,
        max: 4096,
        step: UNIT,
        value: 0,
        change: (value) => host.setFrame({ ...host.scene().frame, [side]: value }),
      });
      this.#fields[side] = field;
      row.append(field.root);
    }
    row.append(button("No frame", () => host.setFrame(NO_FRAME), { class: "ed-quiet" }));
    this.fill = choice({
      label: "The new part is",
      title: "What it contains at first; no difference at strength 1",
      options: FILLS,
      value: "edges",
      change: (value) => {
        host.scene().fill = value;
        host.changed();
      },
    });
    this.overlap = slider({
      label: "Soft overlap",
      title: "Pixels of the image, at its edge, that the new part fades into",
      min: 0,
      max: 128,
      step: 1,
      value: 0,
      show: (value) => `${value} px`,
      change: (value) => {
        host.scene().overlap = value;
        host.changed();
      },
    });
    this.root = el("div", { class: "ed-stack" }, row, el("div", { class: "ed-row" }, this.fill.root, this.overlap.root));
  }

  /** Show the values of a scene. */
  show(scene) {
    for (const side of SIDES) this.#fields[side].set(scene.frame[side]);
    this.fill.set(scene.fill);
    this.overlap.set(scene.overlap);
  }
}
