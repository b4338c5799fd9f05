// The images that were generated: a grid, newest first.

import { $, ask, el, toast } from "./dom.js";
import * as store from "./store.js";

export class Gallery extends EventTarget {
  // Events: "open" with the index of an item, "compare" with two items, "change".
  constructor() {
    super();
    this.items = []; // newest first
    this.urls = new Map(); // of the blobs, by id
    this.rows = new Map(); // of the grid, by id
    this.first = null; // of two to compare
    $("gallery-clear").addEventListener("click", () => this.#clear());
    $("comparing-stop").addEventListener("click", () => this.pick(null));
    $("gallery").addEventListener("keydown", (event) => this.#key(event));
  }

  async open() {
    const found = (await store.open()).filter((item) => item?.blob instanceof Blob);
    const old = store.surplus(found);
    if (old.length) store.drop(...old);
    const kept = found.slice(old.length).reverse();
    this.items = [...this.items, ...kept];
    this.#render();
  }

  url(item) {
    if (!this.urls.has(item.id)) this.urls.set(item.id, URL.createObjectURL(item.blob));
    return this.urls.get(item.id);
  }

  // Add images. Those of a slider that moved (draft) take the place of the ones before them.
  async add(items) {
    if (items[0]?.draft) await this.#remove(this.items.filter((item) => item.draft));
    else for (const item of this.items) item.draft = false;
    const old = this.items.slice(300);
    this.items = [...items.toReversed(), ...this.items];
    if (old.length) await this.#remove(old);
    this.#render();
    await Promise.all(items.map(store.put));
  }

  async delete(item) {
    const place = this.items.indexOf(item);
    await this.#remove([item], { keep: true });
    this.#render();
    toast("Deleted", "Undo", async () => {
      this.items.splice(place, 0, item);
      this.#render();
      await store.put(item);
    });
  }

  async #remove(items, { keep = false } = {}) {
    const ids = new Set(items.map((item) => item.id));
    if (!ids.size) return;
    this.items = this.items.filter((item) => !ids.has(item.id));
    for (const id of keep ? [] : ids) {
      URL.revokeObjectURL(this.urls.get(id));
      this.urls.delete(id);
      this.rows.delete(id);
    }
    await store.drop(...ids);
  }

  async #clear() {
    const count = this.items.length;
    const many = count === 1 ? "the image" : `all ${count} images`;
    if (!(await ask(`Delete ${many} of the gallery?`, "Delete"))) return;
    await this.#remove([...this.items]);
    this.pick(null);
    this.#render();
  }

  // Choose the first of two images to compare; the next one that is opened is the second.
  pick(item) {
    this.first = item;
    $("comparing").hidden = !item;
    $("gallery").classList.toggle("picking", Boolean(item));
    if (item) {
      const other = [...$("gallery").querySelectorAll("button")][this.items[0] === item ? 1 : 0];
      other?.focus();
      $("comparing").scrollIntoView({ block: "nearest" });
    }
  }

  #choose(item) {
    if (this.first && this.first !== item) {
      const pair = [this.first, item];
      this.pick(null);
      this.dispatchEvent(new CustomEvent("compare", { detail: pair }));
    } else {
      this.pick(null);
      this.dispatchEvent(new CustomEvent("open", { detail: this.items.indexOf(item) }));
    }
  }

  #key(event) {
    const buttons = [...$("gallery").querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const top = buttons[0].getBoundingClientRect().top;
    const columns = buttons.filter((each) => Math.abs(each.getBoundingClientRect().top - top) < 4).length;
    const moves = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: columns,
      ArrowUp: -columns,
      Home: -at,
      End: buttons.length - 1 - at,
    };
    if (event.key in moves) {
      event.preventDefault();
      buttons[Math.min(buttons.length - 1, Math.max(0, at + moves[event.key]))].focus();
    } else if (event.key === "Delete") {
      event.preventDefault();
      this.delete(this.items[at]).then(() =>
        $("gallery").querySelectorAll("button")[Math.min(at, this.items.length - 1)]?.focus(),
      );
    } else if (event.key === "c" && !event.ctrlKey && !event.metaKey) this.pick(this.items[at]);
    else if (event.key === "Escape" && this.first) {
      event.stopPropagation();
      this.pick(null);
    }
  }

  #row(item) {
    if (!this.rows.has(item.id)) {
      const label = `${item.prompt || "no prompt"}, seed ${item.seed}`;
      const image = el("img", { src: this.url(item), alt: "", loading: "lazy", decoding: "async" });
      const click = () => this.#choose(item);
      const button = el("button", { type: "button", "aria-label": label, title: label, on: { click } }, image);
      button.dataset.id = item.id;
      this.rows.set(item.id, el("li", {}, button));
    }
    return this.rows.get(item.id);
  }

  #render() {
    const focused = document.activeElement?.closest?.("#gallery button")?.dataset.id;
    $("gallery-section").hidden = !this.items.length;
    $("gallery-about").textContent =
      this.items.length > 1 ? `${this.items.length} images, kept in this browser` : "kept in this browser";
    $("gallery").replaceChildren(...this.items.map((item) => this.#row(item)));
    if (focused)
      $("gallery")
        .querySelector(`[data-id="${CSS.escape(focused)}"]`)
        ?.focus();
    this.dispatchEvent(new Event("change"));
  }
}

// Save an image as a file.
export function download(item, url) {
  const words = (item.prompt || "image").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  el("a", { href: url, download: `${words.slice(0, 60) || "image"}-${item.seed}.png` }).click();
}
