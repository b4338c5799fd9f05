// One image of the gallery at full size, with its settings and what can be done with it.

import { $, closeButton, el, icon, toast } from "./dom.js";
import { download } from "./gallery.js";
import { pairs } from "./texts.js";

export class Viewer extends EventTarget {
  // Events: "use", "edit" and "compare", with the item.
  constructor(gallery) {
    super();
    this.gallery = gallery;
    this.index = 0;
    this.after = null; // what to do once the dialog is closed
    this.dialog = $("viewer");
    this.content = el("div", { className: "content" }); // beside a message that may be shown
    this.dialog.append(this.content);
    this.dialog.addEventListener("keydown", (event) => this.#key(event));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => {
      const id = this.item?.id;
      $("gallery")
        .querySelector(`[data-id="${CSS.escape(id ?? "")}"]`)
        ?.focus();
      const { after } = this;
      this.after = null;
      after?.();
    });
  }

  get item() {
    return this.gallery.items[this.index];
  }

  open(index) {
    this.index = index;
    this.#render();
    if (this.dialog.open) return;
    this.dialog.showModal();
    this.content.querySelector("[data-does=use]").focus();
  }

  #move(by) {
    const index = this.index + by;
    if (index >= 0 && index < this.gallery.items.length) this.open(index);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const does = {
      ArrowLeft: () => this.#move(-1),
      ArrowRight: () => this.#move(1),
      Delete: () => this.#delete(),
      d: () => download(this.item, this.gallery.url(this.item)),
      c: () => this.#tell("compare"),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  #tell(name) {
    const { item } = this;
    // once the focus is back in the page
    this.after = () => this.dispatchEvent(new CustomEvent(name, { detail: item }));
    this.dialog.close();
  }

  async #delete() {
    await this.gallery.delete(this.item);
    if (!this.gallery.items.length) return this.dialog.close();
    return this.open(Math.min(this.index, this.gallery.items.length - 1));
  }

  #render() {
    const { item, gallery } = this;
    const url = gallery.url(item);
    const had = this.content.contains(document.activeElement) ? document.activeElement?.dataset.does : null;
    const action = (name, symbol, label, does) => {
      const button = el("button", { type: "button", on: { click: does } }, icon(symbol), label);
      button.dataset.does = name;
      return button;
    };
    const arrow = (name, symbol, label, by) => {
      const disabled = !gallery.items[this.index + by];
      const button = el(
        "button",
        {
          type: "button",
          className: `icon arrow ${name}`,
          disabled,
          "aria-label": label,
          on: { click: () => this.#move(by) },
        },
        icon(symbol),
      );
      button.dataset.does = name;
      return button;
    };
    const close = closeButton(this.dialog);
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(item.text);
        toast("The settings are in the clipboard");
      } catch {
        toast("This browser does not let the page use the clipboard");
      }
    };
    this.content.replaceChildren(
      el(
        "div",
        { className: "picture" },
        arrow("left", "left", "Newer image", -1),
        el("img", { src: url, alt: item.prompt || "no prompt" }),
        arrow("right", "right", "Older image", 1),
      ),
      el(
        "div",
        { className: "about" },
        close,
        el(
          "div",
          { className: "do" },
          action("use", "use", "Use these settings", () => this.#tell("use")),
          action("edit", "edit", "Edit", () => this.#tell("edit")),
          action("compare", "compare", "Compare", () => this.#tell("compare")),
          action("download", "down", "Download", () => download(item, url)),
          action("copy", "copy", "Copy text", copy),
          action("delete", "delete", "Delete", () => this.#delete()),
        ),
        el("h2", {}, "Prompt"),
        el("p", { className: "words" }, item.prompt || "none"),
        ...(item.negative ? [el("h2", {}, "Negative prompt"), el("p", { className: "words" }, item.negative)] : []),
        el("h2", {}, "Settings"),
        el("dl", {}, ...rows(item)),
        ...(item.notes?.length
          ? [el("h2", {}, "Notes"), el("ul", {}, ...item.notes.map((note) => el("li", {}, note)))]
          : []),
      ),
    );
    const again = had && this.dialog.querySelector(`[data-does="${had}"]`);
    if (again && !again.disabled) again.focus();
    else if (had) this.dialog.querySelector("[data-does=use]").focus();
  }
}

function rows(item) {
  const known = pairs(item.text);
  const found = known.length ? known : [["Seed", item.seed]];
  found.push(["Time", `${item.seconds.toFixed(2)} s${item.interrupted ? ", stopped early" : ""}`]);
  return found.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]);
}
