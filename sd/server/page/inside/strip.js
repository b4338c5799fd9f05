// The steps as a film strip, and the buttons that move along it.

import { el, icon } from "../dom.js";
import { percent } from "./numbers.js";

const SECONDS = 4; // that the whole film takes
const STILL = 1000; // milliseconds for each frame, for those who want less motion
const still = matchMedia("(prefers-reduced-motion: reduce)");

const SVG = "http://www.w3.org/2000/svg";

function drawn(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const found = document.createElementNS(SVG, "path");
  found.setAttribute("d", path);
  found.setAttribute("class", "solid");
  svg.append(found);
  return svg;
}

const PLAY = "M8 5.5v13l10.5-6.5z";
const PAUSE = "M8 6h2.5v12H8zM13.5 6H16v12h-2.5z";

export class Strip {
  // onSelect(frame) is called when a frame is chosen: a step from 0 on, or the number of steps for the whole run.
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.frames = [];
    this.selected = 0;
    this.timer = 0;
    const about = { role: "listbox", "aria-label": "Steps", "aria-orientation": "horizontal" };
    this.list = el("div", { className: "inside-strip", ...about });
    const button = (label, content, does) => {
      const properties = { type: "button", className: "icon quiet", "aria-label": label, title: label };
      return el("button", { ...properties, on: { click: does } }, content);
    };
    this.back = button("Previous step (left arrow)", icon("left"), () => this.move(-1));
    this.on = button("Next step (right arrow)", icon("right"), () => this.move(1));
    this.play = button("Play", drawn(PLAY), () => (this.timer ? this.pause() : this.start()));
    this.play.classList.add("inside-play");
    this.position = el("span", { className: "inside-position" }, "");
    this.controls = el("div", { className: "inside-controls" }, this.back, this.play, this.on, this.position);
    this.element = el("div", { className: "inside-film" }, this.list, this.controls);
  }

  // Begin anew with empty frames: one for each step, and one for the whole run.
  set(steps) {
    this.pause();
    this.frames = Array.from({ length: steps + 1 }, (_, i) => this.frame(i, steps));
    this.list.replaceChildren(...this.frames);
    this.select(Math.min(this.selected, steps), false);
  }

  frame(index, steps) {
    const name = index < steps ? String(index + 1) : "Result";
    return el("button", {
      type: "button", role: "option", className: "inside-still", disabled: true, tabIndex: -1, "aria-selected": "false",
      "aria-label": index < steps ? `Step ${name} of ${steps}` : "Result: the whole run",
      on: { click: () => { this.pause(); this.select(index); } },
    }, el("img", { alt: "", hidden: true, draggable: false }), el("span", {}, name));
  }

  // The image of a frame has come.
  fill(index, source, noise) {
    const frame = this.frames[index];
    if (!frame) return;
    const image = frame.querySelector("img");
    Object.assign(image, { src: source, hidden: false });
    frame.disabled = false;
    if (noise !== null) frame.title = `${percent(noise)} noise`;
  }

  get count() {
    return this.frames.filter((frame) => !frame.disabled).length;
  }

  select(index, tell = true) {
    this.selected = index;
    this.frames.forEach((frame, i) => {
      frame.setAttribute("aria-selected", String(i === index));
      frame.tabIndex = i === index ? 0 : -1;
    });
    const frame = this.frames[index];
    if (frame) {
      // only the strip scrolls, not the page
      const left = frame.offsetLeft - (this.list.clientWidth - frame.offsetWidth) / 2;
      this.list.scrollTo({ left, behavior: still.matches || this.timer ? "auto" : "smooth" });
      const steps = this.frames.length - 1;
      this.position.textContent = index < steps ? `Step ${index + 1} of ${steps}` : "Result";
    }
    if (tell) this.onSelect(index);
  }

  move(by) {
    this.pause();
    this.go(this.selected + by);
  }

  go(index) {
    const target = Math.min(Math.max(index, 0), this.frames.length - 1);
    if (!this.frames[target] || this.frames[target].disabled) return;
    const focused = this.list.contains(document.activeElement);
    this.select(target);
    if (focused) this.frames[target].focus({ preventScroll: true });
  }

  start() {
    const last = this.frames.length - 1;
    if (this.count <= last || last < 1) return;
    if (this.selected >= last) this.select(0);
    this.timer = setInterval(() => {
      if (this.selected >= last) this.pause();
      else this.select(this.selected + 1);
    }, still.matches ? STILL : Math.min(Math.max((1000 * SECONDS) / last, 80), 500));
    this.play.replaceChildren(drawn(PAUSE));
    this.play.setAttribute("aria-label", "Pause");
    this.play.title = "Pause";
  }

  pause() {
    if (!this.timer) return;
    clearInterval(this.timer);
    this.timer = 0;
    this.play.replaceChildren(drawn(PLAY));
    this.play.setAttribute("aria-label", "Play");
    this.play.title = "Play";
  }

  // Arrow keys, Home, End; true if the key was one of them.
  key(event) {
    const { selected, frames } = this;
    const to = { ArrowLeft: selected - 1, ArrowRight: selected + 1, Home: 0, End: frames.length - 1 }[event.key];
    if (to === undefined) return false;
    this.pause();
    this.go(to);
    return true;
  }
}
