// What is shown of the newest result: its images, a line about them, and what the server says of them.

import { $, el, fromBase64, icon } from "./dom.js";
import { clearImages, showImages } from "./run.js";
import { pairs, sentence } from "./texts.js";

// The items of the gallery that an answer makes. `settings` are those of the form when it was asked for.
export function itemsOf(answer, settings, draft) {
  const now = Date.now();
  return answer.images.map((image, i) => {
    const seed = String(answer.seeds[i]);
    const variation = answer.variation_seeds?.[i];
    const own = { ...structuredClone(settings), n: 1, seed, lock: true };
    if (variation !== undefined && variation !== null) own.variationSeed = String(variation);
    return {
      id: `${String(now).padStart(14, "0")}-${String(i).padStart(3, "0")}-${answer.id}`,
      blob: fromBase64(image, "image/png"),
      prompt: settings.prompt,
      negative: settings.negative,
      seed,
      settings: own,
      text: answer.texts[i] ?? "",
      notes: answer.notes,
      model: answer.model,
      seconds: answer.seconds,
      interrupted: answer.interrupted,
      created: now,
      draft,
    };
  });
}

// Steps, sampler and model, as the text of the image has them.
function named(text) {
  const found = new Map(pairs(text));
  const steps = found.get("Steps");
  return [steps && `${steps} ${steps === "1" ? "step" : "steps"}`, found.get("Sampler"), found.get("Model")].filter(
    Boolean,
  );
}

export class Result {
  // actions: open(item), edit(item), download(item)
  constructor(gallery, actions) {
    Object.assign(this, { gallery, actions, items: [] });
    gallery.addEventListener("change", () => {
      if (this.items.some((item) => !gallery.items.includes(item))) this.latest();
    });
  }

  show(items) {
    this.items = items;
    if (!items.length) {
      clearImages();
      $("caption").hidden = $("notes").hidden = true;
      return;
    }
    const [item] = items;
    const urls = items.map((each) => this.gallery.url(each));
    showImages(urls, "result", item.prompt || "no prompt", (i) => this.actions.open(items[i]));
    this.#caption(item, items.length);
    const notes = item.notes ?? [];
    $("notes").hidden = !notes.length;
    $("notes").replaceChildren(...notes.map((note) => el("li", {}, sentence(note))));
  }

  // The newest of the gallery.
  latest() {
    this.show(this.gallery.items.slice(0, 1));
  }

  again() {
    const kept = this.items.filter((item) => this.gallery.items.includes(item));
    if (kept.length) this.show(kept);
    else this.latest();
  }

  #caption(item, count) {
    const said = [
      count > 1 ? `${count} images` : `Seed ${item.seed}`,
      ...named(item.text),
      `${item.seconds.toFixed(2)} s`,
      ...(item.interrupted ? ["stopped early"] : []),
    ];
    const button = (label, symbol, does) =>
      el("button", { type: "button", className: "quiet", on: { click: () => does(item) } }, icon(symbol), label);
    $("caption").replaceChildren(
      el("span", {}, said.join(" · ")),
      el(
        "span",
        { className: "caption-do" },
        button("Edit", "edit", this.actions.edit),
        button("Download", "down", this.actions.download),
      ),
    );
    $("caption").hidden = false;
  }
}
