// What can be changed here: steps, guidance and the few-step LoRA.

import { el } from "../dom.js";
import { plain } from "./numbers.js";

const MOST_STEPS = 50;
const MOST_GUIDANCE = 15;

class Slider {
  constructor(name, label, range, onInput) {
    const id = `inside-${name}`;
    this.range = el("input", { type: "range", id, ...range, on: { input: () => this.changed(onInput) } });
    this.value = el("output", { for: id }, "");
    this.element = el("div", { className: "field inside-slider" },
      el("label", { for: id }, label),
      el("div", { className: "inside-range" }, this.range, this.value));
  }

  changed(onInput) {
    this.show(Number(this.range.value));
    onInput(Number(this.range.value));
  }

  show(value) {
    if (value > Number(this.range.max)) this.range.max = value;
    this.range.value = value;
    const share = (this.range.value - this.range.min) / (this.range.max - this.range.min);
    this.range.style.setProperty("--part", `${100 * share}%`);
    this.value.textContent = plain(value);
  }

  get busy() {
    return document.activeElement === this.range;
  }
}

export class Controls {
  // onChange(name, value) is called while a slider moves, and when the switch is changed; onReset and onUse by buttons.
  constructor({ onChange, onReset, onUse }) {
    const slider = (name, label, range) => new Slider(name, label, range, (value) => onChange(name, value));
    this.steps = slider("steps", "Steps", { min: 1, max: MOST_STEPS, step: 1 });
    this.guidance = slider("guidance", "Guidance", { min: 0, max: MOST_GUIDANCE, step: 0.1 });
    this.few = el("input", { type: "checkbox", role: "switch", id: "inside-few",
      on: { change: () => onChange("few", this.few.checked) } });
    this.fewName = el("small", {}, "");
    this.fewRow = el("label", { className: "switch", hidden: true },
      this.few, el("span"), "Few-step LoRA ", this.fewName);
    const button = (text, title, does) =>
      el("button", { type: "button", className: "quiet", title, on: { click: does } }, text);
    this.use = button("Use in the form", "Take these settings over into the form", onUse);
    this.reset = button("Reset", "Follow the settings of the form again", onReset);
    this.changes = el("div", { className: "inside-changes", hidden: true }, this.use, this.reset);
    this.element = el("div", { className: "inside-settings" },
      this.steps.element, this.guidance.element,
      el("div", { className: "inside-more" }, this.fewRow, this.changes));
  }

  // What the server says it has: the few-step LoRA of the model, and its limits.
  offer(few, mostSteps) {
    this.fewRow.hidden = !few;
    this.fewName.textContent = few?.lora ?? "";
    if (mostSteps) this.steps.range.max = Math.min(mostSteps, MOST_STEPS);
  }

  // Show the settings of a run; a slider that is being moved stays where it is.
  show({ steps, guidance, few }, changed) {
    if (!this.steps.busy && steps !== undefined && steps !== null) this.steps.show(steps);
    if (!this.guidance.busy && guidance !== undefined && guidance !== null) this.guidance.show(guidance);
    this.few.checked = few;
    this.changes.hidden = !changed;
  }
}
