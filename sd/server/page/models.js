// What the server has: models, LoRAs, samplers, limits. And which model is the current one.

import { getJson, postJson } from "./api.js";
import { $, el, toast } from "./dom.js";
import { sentence } from "./texts.js";

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Models extends EventTarget {
  // Event: "change" with what GET /api/models answers.
  constructor() {
    super();
    this.value = null;
    $("model").addEventListener("change", () => this.select($("model").value));
    $("refresh").addEventListener("click", () => this.refresh());
  }

  // Ask until the server has loaded its model, or nobody gives its key. onWait(text) is told why it takes time.
  async load(onWait) {
    for (;;) {
      try {
        return this.#take(await getJson("/api/models"));
      } catch (error) {
        onWait(sentence(error.message));
        if (error.status === 401) return null; // no key was given
        await wait(error.status === 503 ? 1000 : 4000);
      }
    }
  }

  async update() {
    try {
      this.#take(await getJson("/api/models"));
    } catch {
      // it is said by what is done next
    }
  }

  async select(name) {
    try {
      this.#take(await postJson("/api/models/select", { name }), true);
      toast(`${name} is used from now on`);
    } catch (error) {
      $("model").value = this.value?.current ?? "";
      toast(sentence(error.message));
    }
  }

  async refresh() {
    $("refresh").disabled = true;
    try {
      this.#take(await postJson("/api/refresh", {}));
      toast("Looked for new files");
    } catch (error) {
      toast(sentence(error.message));
    }
    $("refresh").disabled = false;
  }

  #take(value, switched = false) {
    this.value = value;
    const select = $("model");
    select.replaceChildren(
      ...value.models.map((each) => el("option", { value: each.name, title: each.title }, each.name)),
    );
    select.value = value.current;
    select.disabled = value.models.length < 2;
    select.title = value.models.find((each) => each.name === value.current)?.title ?? "";
    this.dispatchEvent(new CustomEvent("change", { detail: { models: value, switched } }));
    return value;
  }
}
