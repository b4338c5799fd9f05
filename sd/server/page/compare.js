// Two images on top of each other, with a line between them to move: by pointer, touch or arrow keys.

import { $, closeButton, el, icon } from "./dom.js";

export class Compare {
  constructor(gallery) {
    this.gallery = gallery;
    this.dialog = $("compare");
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open(first, second) {
    const image = (item, className) =>
      el("img", {
        src: this.gallery.url(item),
        alt: `${item.prompt || "no prompt"}, seed ${item.seed}`,
        className,
        draggable: false,
      });
    this.top = image(first, "over");
    this.line = el("div", { className: "line" });
    this.box = el(
      "div",
      {
        className: "two-images",
        tabIndex: 0,
        role: "slider",
        "aria-label": "How much of the first image is shown",
        "aria-valuemin": 0,
        "aria-valuemax": 100,
      },
      image(second, "under"),
      this.top,
      this.line,
    );
    this.box.addEventListener("pointerdown", (event) => {
      this.box.setPointerCapture(event.pointerId);
      this.#point(event);
    });
    this.box.addEventListener("pointermove", (event) => event.buttons && this.#point(event));
    this.box.addEventListener("keydown", (event) => {
      const by = {
        ArrowLeft: -2,
        ArrowDown: -2,
        ArrowRight: 2,
        ArrowUp: 2,
        PageDown: -10,
        PageUp: 10,
        Home: -100,
        End: 100,
      }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      this.#set(this.part + by);
    });
    const close = closeButton(this.dialog);
    const swap = el(
      "button",
      { type: "button", className: "quiet", on: { click: () => this.open(second, first) } },
      icon("swap"),
      "Swap",
    );
    this.dialog.replaceChildren(
      el("div", { className: "compare-top" }, el("h2", {}, "Compare"), swap, close),
      this.box,
      el("div", { className: "compare-names" }, caption(first), caption(second)),
    );
    this.#set(50);
    if (!this.dialog.open) this.dialog.showModal();
    this.box.focus();
  }

  #point(event) {
    const { left, width } = this.box.getBoundingClientRect();
    this.#set((100 * (event.clientX - left)) / width);
  }

  #set(part) {
    this.part = Math.min(100, Math.max(0, part));
    this.top.style.clipPath = `inset(0 ${100 - this.part}% 0 0)`;
    this.line.style.left = `${this.part}%`;
    this.box.setAttribute("aria-valuenow", Math.round(this.part));
    this.box.setAttribute("aria-valuetext", `${Math.round(this.part)} %`);
  }
}

function caption(item) {
  return el("p", {}, item.prompt || "no prompt", el("br"), el("small", {}, `seed ${item.seed}`));
}
