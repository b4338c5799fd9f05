// The form: fields to settings, and settings to fields.

import { $, el, setIcon, shape } from "./dom.js";
import { fill, mark, READERS, slide } from "./fields.js";
import { DEFAULTS, isFast, optionNames, randomSeed, sampling, sizeOf } from "./settings.js";

const RATIOS = [
  ["square", 1, 1],
  ["portrait", 2, 3],
  ["landscape", 3, 2],
  ["tall", 9, 16],
  ["wide", 16, 9],
];

// id of the field, name of the setting, kind of value. Those of sampling exist with the few-step LoRA, and without.
const FIELDS = [
  ["prompt", "prompt", "text"],
  ["negative", "negative", "text"],
  ["width", "width", "size"],
  ["height", "height", "size"],
  ["own-size", "ownSize", "flag"],
  ["live", "live", "flag"],
  ["steps", "steps", "sampling", "whole"],
  ["guidance", "guidance", "sampling", "number"],
  ["sampler", "sampler", "sampling", "text"],
  ["spacing", "spacing", "sampling", "text"],
  ["seed", "seed", "seed"],
  ["n", "n", "whole"],
  ["strength", "strength", "number"],
  ["vae", "vae", "text"],
  ["hires-on", "hiresOn", "flag"],
  ["hires", "hires", "number"],
  ["hires-strength", "hiresStrength", "number"],
  ["hires-steps", "hiresSteps", "whole"],
  ["hires-upscaler", "hiresUpscaler", "text"],
  ["web-ui", "webUi", "flag"],
  ["clip-skip", "clipSkip", "whole"],
  ["variation-seed", "variationSeed", "seed"],
  ["variation-strength", "variationStrength", "number"],
  ["guidance-rescale", "guidanceRescale", "number"],
  ["rng", "rng", "text"],
  ["tileable", "tileable", "flag"],
];
const EMPTY = { hiresSteps: null, clipSkip: null, variationSeed: "" }; // settings that a field may leave open

export class Form extends EventTarget {
  // Events: "change" after every change by the user; its detail is {prompt: whether only a prompt changed}.
  constructor(settings) {
    super();
    this.settings = settings;
    this.models = null;
    this.editing = null; // the kind of request that the editor's image is for, while it is in use
    for (const [id, name, kind, of] of FIELDS) {
      $(id).addEventListener("input", () => this.#read(id, name, kind, of, false));
      $(id).addEventListener("change", () => this.#read(id, name, kind, of, true));
    }
    for (const id of ["steps", "guidance", "strength"]) {
      $(`${id}-range`).addEventListener("input", () => {
        $(id).value = $(`${id}-range`).value;
        $(id).dispatchEvent(new Event("input"));
      });
    }
    $("fast").addEventListener("change", () => this.set({ fast: $("fast").checked }));
    $("dice").addEventListener("click", () => this.set({ seed: randomSeed() }));
    $("lock").addEventListener("click", () => this.set({ lock: !this.settings.lock }, { quiet: true }));
    $("swap").addEventListener("click", () => {
      const { width, height } = sizeOf(this.settings, this.models);
      this.set({ width: height, height: width });
    });
    this.render();
  }

  // Change settings, show them, and tell; quiet: nothing has to be generated for it.
  set(values, { quiet = false } = {}) {
    Object.assign(this.settings, values);
    this.render();
    this.#changed(quiet);
  }

  // Other settings in the place of all.
  replace(settings, options) {
    this.settings = settings;
    this.set({}, options);
  }

  setModels(models) {
    this.models = models;
    fill($("sampler"), models.samplers ?? [], (each) => [each.key, each.label]);
    fill($("spacing"), models.spacings ?? [], (each) => [each, each[0].toUpperCase() + each.slice(1)]);
    fill($("vae"), [{ name: "" }, ...(models.vaes ?? [])], (each) => [each.name, each.name || "the model's"]);
    $("n").max = models.limits?.max_batch ?? 8;
    this.#presets();
    this.render();
  }

  #changed(quiet = false, prompt = false) {
    this.dispatchEvent(new CustomEvent("change", { detail: { quiet, prompt } }));
  }

  #read(id, name, kind, of, final) {
    const field = $(id);
    const found = READERS[of ?? kind](field, final);
    mark(field, found.wrong);
    if (!("value" in found)) {
      if (final) this.render(); // it stays as it was
      return;
    }
    const value = found.value ?? this.#empty(name, kind);
    const target = kind === "sampling" ? this.#profile() : this.settings;
    const same = target[name] === value;
    target[name] = value;
    if (name === "seed" && !same) this.settings.lock = true; // a seed that is typed is meant
    if (name === "sampler" && !same) this.#usual(value);
    this.render(final ? null : field);
    if (!same) this.#changed(name === "live", field.tagName === "TEXTAREA");
  }

  // What an empty field means.
  #empty(name, kind) {
    if (kind === "sampling" || kind === "size") return null; // the model's
    if (name === "seed") return randomSeed();
    return name in EMPTY ? EMPTY[name] : this.settings[name];
  }

  #profile() {
    return isFast(this.settings, this.models) ? this.settings.few : this.settings.full;
  }

  // With another sampler, the spacing that is usual for it.
  #usual(key) {
    const usual = this.models?.samplers?.find((each) => each.key === key)?.usual_spacing;
    if (usual && !isFast(this.settings, this.models)) this.#profile().spacing = usual;
  }

  #presets() {
    const side = this.models.defaults?.size;
    $("presets").replaceChildren();
    if (!side) return; // until the model is loaded
    const step = side >= 512 ? 64 : 8;
    const round = (value) => Math.max(step, Math.round(value / step) * step);
    $("presets").replaceChildren(
      ...RATIOS.map(([label, x, y]) => {
        const found = { width: round(side * Math.sqrt(x / y)), height: round(side * Math.sqrt(y / x)) };
        const click = () => this.set(found);
        const title = `${label}: ${found.width} × ${found.height}`;
        const button = el(
          "button",
          { type: "button", title, "aria-label": title, on: { click } },
          shape(x, y),
          `${x}:${y}`,
        );
        Object.assign(button.dataset, found);
        return button;
      }),
    );
  }

  // Write all settings into the fields, except into the one that is being typed in.
  render(typing = null) {
    const { settings, models } = this;
    const found = { ...settings, ...sampling(settings, models), ...sizeOf(settings, models) };
    for (const [id, name, kind] of FIELDS) {
      const field = $(id);
      if (field === typing) continue;
      if (kind === "flag") field.checked = found[name];
      else if (field.value !== String(found[name] ?? "")) field.value = found[name] ?? "";
      if (kind !== "flag") mark(field, false);
    }
    const fast = isFast(settings, models);
    $("fast-row").hidden = !models?.few_steps;
    $("fast").checked = fast;
    $("fast-about").textContent = models?.few_steps ? `${models.few_steps.steps} steps` : "";
    const most = models?.limits?.max_steps ?? 150;
    $("steps").max = most;
    $("steps-range").max = fast ? 12 : Math.min(most, 60);
    $("guidance-range").max = fast ? 4 : 15;
    for (const id of ["steps", "guidance", "strength"]) slide($(`${id}-range`), found[id]);
    $("guidance-about").textContent =
      found.guidance === 1 ? "none: the negative prompt has no effect" : "how strictly it follows the prompt";
    setIcon($("lock"), settings.lock ? "lock" : "unlock");
    $("lock").setAttribute("aria-pressed", settings.lock);
    for (const button of $("presets").children)
      button.setAttribute(
        "aria-pressed",
        button.dataset.width === String(found.width) && button.dataset.height === String(found.height),
      );
    this.#options(found.sampler, typing);
    this.#editing();
    this.#hires(found);
    const changed = ["clipSkip", "variationSeed", "guidanceRescale", "tileable", "vae", "rng"];
    const { request, params } = settings.extra;
    const more =
      changed.filter((name) => settings[name] !== DEFAULTS[name]).length +
      Object.keys({ ...request, ...params }).length;
    $("more-badge").hidden = !more;
    $("more-badge").textContent = more;
    this.#extra();
  }

  #editing() {
    const { editing } = this;
    $("strength-field").hidden = !editing;
    $("own-size-row").hidden = editing !== "img2img";
    $("size-field").hidden = editing === "inpaint";
    $("size-field").classList.toggle("own", editing === "img2img" && this.settings.ownSize);
    $("hires-details").hidden = Boolean(editing);
  }

  #hires({ width, height, hires, hiresOn }) {
    $("hires-badge").hidden = !hiresOn;
    const round = (value) => Math.round((value * hires) / 8) * 8;
    $("hires-size").textContent = hiresOn && width && height ? `About ${round(width)} × ${round(height)} pixels` : "";
    for (const field of $("hires-details").querySelectorAll(".two input, .two select")) field.disabled = !hiresOn;
  }

  // The options of the sampler, such as eta.
  #options(sampler, typing) {
    if (typing?.closest("#sampler-options")) return;
    const known = this.models?.samplers?.find((each) => each.key === sampler)?.options;
    const names = optionNames(known);
    const box = $("sampler-options");
    if (box.dataset.names === names.join()) {
      for (const field of box.querySelectorAll("input"))
        if (field !== typing) field.value = this.settings.options[field.dataset.name] ?? "";
      return;
    }
    box.dataset.names = names.join();
    box.replaceChildren(
      ...names.map((name) => {
        const input = () => {
          const options = { ...this.settings.options };
          if (field.value.trim() === "" || !Number.isFinite(Number(field.value))) delete options[name];
          else options[name] = Number(field.value);
          this.settings.options = options;
          this.#changed();
        };
        const id = `option-${name}`;
        const field = el("input", {
          type: "number",
          id,
          step: "any",
          placeholder: known[name]?.default ?? "",
          on: { input },
        });
        field.dataset.name = name;
        field.value = this.settings.options[name] ?? "";
        return el("div", { className: "field" }, el("label", { for: id }, `${name}`), field);
      }),
    );
  }

  // Settings from a recipe that have no field.
  #extra() {
    const rows = [];
    for (const place of ["request", "params"]) {
      for (const [name, value] of Object.entries(this.settings.extra[place])) {
        const click = () => {
          delete this.settings.extra[place][name];
          this.set({});
        };
        const remove = el("button", {
          type: "button",
          className: "icon quiet",
          "aria-label": `Remove ${name}`,
          on: { click },
        });
        setIcon(remove, "close");
        rows.push(el("div", {}, el("span", { className: "name" }, name), el("span", {}, String(value)), remove));
      }
    }
    if (rows.length) rows.unshift(el("span", { className: "label" }, "From a recipe"));
    $("extra").replaceChildren(...rows);
  }
}
