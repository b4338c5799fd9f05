// How many tokens a prompt has, what the model does not read of it, and which words it does not know.

import { postJson } from "./api.js";
import { $, debounce, el } from "./dom.js";

export class Tokens {
  // Watch a text area; webUi() is whether prompts have the web UI's syntax.
  constructor(id, webUi) {
    this.field = $(id);
    this.box = $(`${id}-tokens`);
    this.webUi = webUi;
    this.controller = null;
    this.later = debounce(250, () => this.#count());
    this.field.addEventListener("input", this.later);
  }

  update() {
    this.later();
  }

  async #count() {
    this.controller?.abort();
    const text = this.field.value;
    if (!text.trim()) return this.box.replaceChildren();
    this.controller = new AbortController();
    try {
      const body = { text, web_ui_prompts: this.webUi() };
      const found = await postJson("/api/tokens", body, this.controller.signal);
      if (this.field.value === text) this.#show(found);
    } catch {
      // aborted by the next one, or the server has said elsewhere that it cannot be reached
    }
  }

  #show({ count, limit, chunks, cut, unknown }) {
    const said = chunks > 1 ? `${count} tokens in ${chunks} parts of ${limit}` : `${count} of ${limit} tokens`;
    const parts = [el("span", { className: cut ? "over" : "" }, said)];
    if (cut) parts.push(". Not read: ", el("del", {}, cut));
    if (unknown?.length) {
      parts.push(". The model does not know ");
      unknown.forEach((word, i) => parts.push(i ? ", " : "", el("b", {}, word)));
    }
    this.box.replaceChildren(...parts);
  }
}
