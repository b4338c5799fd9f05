// The settings in an image's file, read by the server, taken over into the form, with a list of what could not be.

import { postBytes } from "./api.js";
import { $, el, toast } from "./dom.js";
import { sentence } from "./texts.js";
import { fresh } from "./settings.js";

const PARAMS = {
  width: "width",
  height: "height",
  n: "n",
  variation_strength: "variationStrength",
  guidance_rescale: "guidanceRescale",
  rng: "rng",
  tileable: "tileable",
  options: "options",
};
const REQUEST = {
  prompt: "prompt",
  negative: "negative",
  web_ui_prompts: "webUi",
  clip_skip: "clipSkip",
  strength: "strength",
  hires: "hires",
  hires_strength: "hiresStrength",
  hires_steps: "hiresSteps",
  hires_upscaler: "hiresUpscaler",
};
const SAMPLING = ["steps", "guidance", "sampler", "spacing"];
const OF_IMAGE = ["posterior", "fit", "match_colours", "content", "blur", "margin", "image", "mask", "controls"];

// The settings of a recipe, and notes on what is not in them.
export function settingsOf({ request, loras }, models) {
  const settings = fresh();
  const notes = [];
  const { kind, params = {}, ...rest } = request;
  settings.webUi = false; // a recipe says so if it is not
  settings.lock = true;
  const few = models?.few_steps;
  const fast = Boolean(few) && loras.some((each) => each.name === few.lora && each.weight === 1);
  settings.fast = fast;
  for (const [name, value] of Object.entries(params)) {
    if (value === null || value === undefined) continue;
    if (SAMPLING.includes(name)) (fast ? settings.few : settings.full)[name] = value;
    else if (name === "seed") settings.seed = String(value);
    else if (name === "variation_seed") settings.variationSeed = String(value);
    else if (name in PARAMS) settings[PARAMS[name]] = value;
    else settings.extra.params[name] = value;
  }
  for (const [name, value] of Object.entries(rest)) {
    if (value === null || value === undefined) continue;
    if (name in REQUEST) settings[REQUEST[name]] = value;
    else if (OF_IMAGE.includes(name)) notes.push(`${name} goes with an initial image, and was left out.`);
    else settings.extra.request[name] = value;
  }
  settings.hiresOn = kind === "hires";
  if (kind === "img2img" || kind === "inpaint")
    notes.push("It was made from another image, which is not in the file. Put one into Edit image to do the same.");
  settings.loras = loras
    .filter((each) => each.known && !(fast && each.name === few.lora))
    .map(({ name, weight }) => ({ name, weight }));
  for (const { name, known } of loras) if (!known) notes.push(`This server does not have the LoRA ${name}.`);
  return { settings, notes };
}

export class Recipes {
  // onSwitch(name) switches the model; onEdit(blob) puts the image into the editor.
  constructor(form, { onSwitch, onEdit }) {
    Object.assign(this, { form, onSwitch, onEdit });
    $("recipe-file").addEventListener("change", () => {
      const [file] = $("recipe-file").files;
      $("recipe-file").value = "";
      if (file) this.read(file);
    });
    $("recipe-pick").addEventListener("click", () => $("recipe-file").click());
  }

  // Read the settings in an image into the form.
  async read(blob) {
    const name = blob.name || "the image";
    let found;
    try {
      found = await postBytes("/api/recipe", blob);
    } catch (error) {
      this.#show(`Nothing was read from ${name}`, [sentence(error.message)], [this.#edit(blob)]);
      return;
    }
    const before = structuredClone(this.form.settings);
    const { settings, notes } = settingsOf(found, this.form.models);
    settings.live = before.live;
    this.form.replace(settings);
    const buttons = [];
    if (found.model && found.model !== this.form.models?.current) {
      if (found.model_known) buttons.push(this.#button(`Switch to ${found.model}`, () => this.onSwitch(found.model)));
      else notes.unshift(`It was made with the model ${found.model}, which this server does not have.`);
    }
    const undo = () => {
      this.form.replace(before);
      this.close();
      toast("Your settings are back");
    };
    buttons.push(this.#edit(blob), this.#button("Undo", undo));
    this.#show(`Settings read from ${name}`, [...notes, ...(found.notes ?? []).map(sentence)], buttons);
  }

  #button(label, click) {
    return el("button", { type: "button", on: { click } }, label);
  }

  #edit(blob) {
    return this.#button("Edit this image", () => this.onEdit(blob));
  }

  #show(title, notes, buttons) {
    buttons.push(this.#button("Close", () => this.close()));
    const list = notes.length ? el("ul", {}, ...notes.map((note) => el("li", {}, note))) : null;
    $("recipe").replaceChildren(
      el("strong", { role: "status" }, title),
      ...(list ? [list] : []),
      el("div", { className: "chips" }, ...buttons),
    );
    $("recipe").hidden = false;
    $("recipe").scrollIntoView({ block: "nearest" });
  }

  close() {
    $("recipe").hidden = true;
    $("recipe").replaceChildren();
  }
}
