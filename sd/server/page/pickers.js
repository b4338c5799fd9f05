// Choosing LoRAs, and words of embeddings.

import { $, el, icon, toast } from "./dom.js";

const MOST_SHOWN = 60;

export class Pickers {
  constructor(form) {
    this.form = form;
    this.chosen = -1; // of the list
    const search = $("lora-search");
    search.addEventListener("input", () => this.#list(true));
    search.addEventListener("focus", () => this.#list(true));
    search.addEventListener("blur", () => setTimeout(() => this.#list(false), 150)); // after a click into the list
    search.addEventListener("keydown", (event) => this.#key(event));
    form.addEventListener("change", () => this.render());
  }

  get #all() {
    const models = this.form.models;
    const fast = models?.few_steps?.lora; // has a switch of its own
    return (models?.loras ?? []).map((each) => each.name).filter((name) => name !== fast);
  }

  get #found() {
    const wanted = $("lora-search").value.trim().toLowerCase().split(/\s+/);
    const used = new Set(this.form.settings.loras.map((each) => each.name));
    return this.#all.filter((name) => !used.has(name) && wanted.every((part) => name.toLowerCase().includes(part)));
  }

  #list(open) {
    const list = $("lora-list");
    $("lora-search").setAttribute("aria-expanded", open);
    $("lora-search").removeAttribute("aria-activedescendant");
    this.chosen = -1;
    if (!open) return list.replaceChildren();
    const found = this.#found;
    const rows = found.slice(0, MOST_SHOWN).map((name, i) => {
      const mousedown = (event) => {
        event.preventDefault();
        this.#add(name);
      };
      return el("li", { id: `lora-${i}`, role: "option", "aria-selected": "false", on: { mousedown } }, name);
    });
    if (found.length > MOST_SHOWN) rows.push(el("li", { className: "none" }, `and ${found.length - MOST_SHOWN} more`));
    if (!found.length) {
      const why = this.#all.length
        ? "No other LoRA has this name."
        : "There is none: start the server with --loras FOLDER.";
      rows.push(el("li", { className: "none" }, why));
    }
    list.replaceChildren(...rows);
    return undefined;
  }

  #key(event) {
    const rows = [...$("lora-list").querySelectorAll("[role=option]")];
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && rows.length) {
      event.preventDefault();
      this.chosen = (this.chosen + (event.key === "ArrowDown" ? 1 : -1) + rows.length) % rows.length;
      rows.forEach((row, i) => row.setAttribute("aria-selected", i === this.chosen));
      rows[this.chosen].scrollIntoView({ block: "nearest" });
      $("lora-search").setAttribute("aria-activedescendant", rows[this.chosen].id);
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      if (rows.length) this.#add(rows[Math.max(0, this.chosen)].textContent);
    } else if (event.key === "Escape" && $("lora-search").value) {
      event.stopPropagation();
      $("lora-search").value = "";
      this.#list(true);
    }
  }

  #add(name) {
    $("lora-search").value = "";
    this.form.set({ loras: [...this.form.settings.loras, { name, weight: 1 }] });
    this.#list(document.activeElement === $("lora-search"));
  }

  // Show what is chosen; `typing` is a field that must stay.
  render() {
    const { settings, models } = this.form;
    const box = $("loras");
    const names = JSON.stringify(settings.loras.map((each) => each.name));
    const count = settings.loras.length;
    $("loras-badge").hidden = !count;
    $("loras-badge").textContent = count;
    const known = new Set((models?.loras ?? []).map((each) => each.name));
    const state = names + [...known].join("/");
    if (box.dataset.state !== state) {
      box.dataset.state = state;
      box.replaceChildren(...settings.loras.map((each, i) => this.#row(each, i, !models || known.has(each.name))));
    }
    settings.loras.forEach((each, i) => {
      const field = box.children[i].querySelector("input[type=number]");
      if (field !== document.activeElement) field.value = each.weight;
    });
    this.#words();
  }

  #row({ name, weight }, i, known) {
    const change = (value) => {
      const found = Number(value);
      if (!Number.isFinite(found) || value === "") return;
      const loras = this.form.settings.loras.map((each, k) => (k === i ? { ...each, weight: found } : each));
      this.form.set({ loras });
    };
    const input = el("input", {
      type: "number",
      step: 0.05,
      value: weight,
      "aria-label": `Weight of ${name}`,
      on: { input: (event) => change(event.target.value) },
    });
    const click = () => this.form.set({ loras: this.form.settings.loras.filter((each, k) => k !== i) });
    const remove = el(
      "button",
      { type: "button", className: "icon quiet", "aria-label": `Remove ${name}`, on: { click } },
      icon("close"),
    );
    const title = known ? name : `${name}: this server has no such LoRA`;
    return el("div", {}, el("span", { className: known ? "name" : "name unknown", title }, name), input, remove);
  }

  #words() {
    const found = this.form.models?.embeddings ?? [];
    $("embeddings-field").hidden = !found.length;
    const state = JSON.stringify(found);
    if ($("embeddings").dataset.state === state) return;
    $("embeddings").dataset.state = state;
    $("embeddings").replaceChildren(
      ...found.flatMap((each) => {
        const words = each.words?.length ? each.words : [];
        const label = words.join(" ") || each.name;
        const title = words.length ? each.name : `${each.name} does not fit this model`;
        const click = () => this.#insert(words.join(" "));
        return [el("button", { type: "button", title, disabled: !words.length, on: { click } }, label)];
      }),
    );
  }

  // Put a word into the prompt, where the cursor was.
  #insert(word) {
    const field = $("prompt");
    const at = field.selectionEnd ?? field.value.length;
    const before = field.value.slice(0, at);
    const text = `${before && !/\s$/.test(before) ? " " : ""}${word}`;
    field.setRangeText(text, at, at, "end");
    field.dispatchEvent(new Event("input"));
    toast(`${word} is in the prompt now`);
  }
}
