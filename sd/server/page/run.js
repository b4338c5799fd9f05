// One generation after the other: progress, previews while it denoises, stopping and cancelling.

import { generate, postJson } from "./api.js";
import { $, announce, el } from "./dom.js";
import { sentence } from "./texts.js";

const PATIENCE = 250; // milliseconds: what is done before does not change the buttons

export class Runner extends EventTarget {
  // Events: "done" with {answer, body, settings, quiet}, "failed" and "cancelled".
  constructor() {
    super();
    this.controller = null;
    this.id = null;
    this.quiet = false;
    this.slow = false; // it takes long enough for the buttons to change
    $("cancel").addEventListener("click", () => this.cancel());
    $("stop").addEventListener("click", () => this.stop());
  }

  get running() {
    return this.controller !== null;
  }

  // Generate. settings: those of the form, for "done"; quiet: a slider was moved. A quiet one takes the place of the
  // quiet one that runs, and shows progress only if it takes long.
  async start(body, settings, quiet = false) {
    if (this.running && !(quiet && this.quiet)) return;
    this.controller?.abort();
    const controller = new AbortController();
    Object.assign(this, { controller, id: null, quiet, slow: false });
    $("error").hidden = true;
    const later = () => {
      this.slow = true;
      this.#buttons(true);
      $("run").hidden = false;
      $("caption").hidden = true; // of the image before; the bar is in its place
    };
    const timer = setTimeout(later, quiet ? 4 * PATIENCE : PATIENCE);
    this.#progress("Starting", 0, 1);
    try {
      for await (const { event, data } of generate(body, controller.signal)) {
        if (this.controller !== controller) return; // a newer one has begun
        if (event === "queued") this.#queued(data);
        else if (event === "step") this.#step(data);
        else if (event === "error") throw new Error(data.message);
        else if (event === "done") {
          this.#end(timer);
          if (!quiet) announce(data.interrupted ? "Stopped early" : "The image is ready");
          this.dispatchEvent(new CustomEvent("done", { detail: { answer: data, body, settings, quiet } }));
          return;
        }
      }
      throw new Error("The connection to the server broke before the image was ready.");
    } catch (error) {
      if (this.controller !== controller) return;
      this.#end(timer);
      if (error.name === "AbortError" || controller.signal.aborted) {
        announce("Cancelled");
        this.dispatchEvent(new Event("cancelled"));
      } else {
        $("error").textContent = sentence(error.message);
        $("error").hidden = false;
        this.dispatchEvent(new Event("failed"));
      }
    } finally {
      clearTimeout(timer);
    }
  }

  // Drop it: closing the connection is what tells the server.
  cancel() {
    this.controller?.abort();
  }

  // Finish now, with what the model expects at this step.
  async stop() {
    if (!this.id) return;
    $("stop").disabled = true;
    try {
      await postJson(`/api/jobs/${encodeURIComponent(this.id)}/interrupt`, {});
    } catch {
      // it has ended meanwhile
    }
  }

  #queued({ id, position }) {
    this.id = id;
    const text = position > 0 ? `${position} before it in the queue` : "Next in the queue";
    this.#progress(text, 0, 1);
    if (position > 0) announce(text);
  }

  #step({ step, steps, previews }) {
    this.#progress(`Step ${step} of ${steps}`, step, steps);
    const quarter = Math.max(1, Math.floor(steps / 4)); // a screen reader is told four times, not at each step
    if (!this.quiet && steps > 8 && step % quarter === 0) announce(`Step ${step} of ${steps}`);
    if (previews?.length && (!this.quiet || this.slow)) showImages(previews, "preview");
  }

  #progress(text, value, max) {
    $("progress-text").textContent = text;
    $("progress").max = max;
    $("progress").value = value;
  }

  #buttons(running) {
    const had = document.activeElement;
    $("go").hidden = running;
    $("stop").hidden = $("cancel").hidden = !running;
    $("stop").disabled = false;
    if (running && had === $("go")) $("cancel").focus();
    if (!running && (had === $("cancel") || had === $("stop"))) $("go").focus();
  }

  #end(timer) {
    clearTimeout(timer);
    this.controller = null;
    this.#buttons(false);
    $("run").hidden = true;
  }
}

// Show images, by their URLs, in the stage; with `onOpen`, each is a button.
export function showImages(urls, kind, alt = "", onOpen = null) {
  const box = $("result");
  $("empty").hidden = true;
  box.hidden = false;
  box.dataset.count = urls.length;
  box.dataset.kind = kind;
  const same = box.childElementCount === urls.length && [...box.children].every((each) => each.tagName === "IMG");
  if (kind === "preview" && same) {
    urls.forEach((url, i) => (box.children[i].src = url)); // no flicker between previews
    return;
  }
  box.replaceChildren(
    ...urls.map((src, i) => {
      const image = el("img", { src, alt: kind === "preview" ? "Preview" : alt, className: kind });
      if (!onOpen) return image;
      return el("button", { type: "button", "aria-label": "Open the image", on: { click: () => onOpen(i) } }, image);
    }),
  );
}

export function clearImages() {
  $("result").hidden = true;
  $("result").replaceChildren();
  $("empty").hidden = false;
}
