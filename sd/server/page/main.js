// Puts the page together: the form, the run, the gallery, the editor and what is inside.

import { Editor } from "./editor/editor.js";
import { Inside } from "./inside/inside.js";
import { Compare } from "./compare.js";
import { $, debounce, el, toast } from "./dom.js";
import * as drop from "./drop.js";
import { Form } from "./form.js";
import { download, Gallery } from "./gallery.js";
import { Models } from "./models.js";
import { Pickers } from "./pickers.js";
import { Recipes } from "./recipe.js";
import { itemsOf, Result } from "./result.js";
import { Runner } from "./run.js";
import { bodyOf, checked, fresh, isFast, load, randomSeed, resolved, save, sizeOf } from "./settings.js";
import { sentence } from "./texts.js";
import { Tokens } from "./tokens.js";
import { Viewer } from "./viewer.js";
import * as views from "./views.js";

const LIVE_DELAY = 180; // milliseconds after a slider moved
const TYPING_DELAY = 700; // and after a letter was typed
const EXAMPLES = [
  "a red house in the snow",
  "two cats on the beach at sunset, watercolour",
  "pixel art of a castle at night",
  "a big yellow balloon over the sea",
];

const editor = new Editor($("editor"));
const form = new Form(load());
const models = new Models();
const runner = new Runner();
const gallery = new Gallery();
const viewer = new Viewer(gallery);
const compare = new Compare(gallery);
const pickers = new Pickers(form);
const tokens = ["prompt", "negative"].map((id) => new Tokens(id, () => form.settings.webUi));
const recipes = new Recipes(form, { onSwitch: (name) => models.select(name), onEdit: edit });
const result = new Result(gallery, {
  open: (item) => viewer.open(gallery.items.indexOf(item)),
  edit: (item) => edit(item.blob, item),
  download: (item) => download(item, gallery.url(item)),
});
const inside = new Inside($("inside"), { body: () => bodyOf(form.settings, form.models), onSettings });

let hasNewModel = false; // that no image was made with yet
let lastSeed = null; // of the last image that was asked for by the button

function generate({ quiet = false } = {}) {
  if (!form.models || document.querySelector("dialog[open]")) return;
  if (views.view() === "inside") {
    if (!quiet) inside.look({ fresh: true });
    return;
  }
  if (runner.running && !(quiet && runner.quiet)) return;
  live.stop();
  typed.stop();
  const { settings } = form;
  if (!quiet && !settings.lock && settings.seed === lastSeed) form.set({ seed: randomSeed() }, { quiet: true });
  if (!quiet) lastSeed = settings.seed;
  const edits = views.view() === "edit";
  let body;
  try {
    body = bodyOf(settings, form.models, edits ? editor.value() : null, edits ? editor.hints() : []);
  } catch (error) {
    $("error").textContent = sentence(error.message);
    $("error").hidden = false;
    return;
  }
  runner.start(body, resolved(settings, form.models), quiet);
  if (!quiet && (edits || matchMedia("(max-width: 999px)").matches)) $("stage").scrollIntoView({ block: "nearest" });
}

const live = debounce(LIVE_DELAY, () => generate({ quiet: true }));
const typed = debounce(TYPING_DELAY, () => generate({ quiet: true }));

// A slider of "See inside" was moved: take it over.
function onSettings(values) {
  const own = isFast(form.settings, form.models) ? form.settings.few : form.settings.full;
  for (const [name, value] of Object.entries(values)) {
    if (name in own) own[name] = value;
    else if (name in form.settings) form.settings[name] = name === "seed" ? String(value) : value;
  }
  form.set({}, { quiet: true });
}

async function edit(blob, item = null) {
  views.show("edit", { focus: true });
  if (item && !form.settings.prompt) form.set({ prompt: item.prompt, negative: item.negative });
  try {
    await editor.setImage(blob);
  } catch (error) {
    toast(sentence(error.message));
  }
  showEditing();
}

function showSize() {
  const { width, height } = sizeOf(form.settings, form.models);
  if (width && height) editor.setSize(width, height);
}

function showEditing() {
  form.editing = views.view() === "edit" ? editor.kind : null;
  form.render(document.activeElement?.form === $("form") ? document.activeElement : null);
}

runner.addEventListener("done", async ({ detail: { answer, body, settings, quiet } }) => {
  const items = itemsOf(answer, settings, quiet);
  await gallery.add(items);
  result.show(items);
  if (body.request.image && views.view() === "edit") editor.setResult(items[0].blob, body.request).catch(() => {});
  if (hasNewModel) models.update(); // which has been loaded now: its words are known
  hasNewModel = false;
});
for (const name of ["failed", "cancelled"]) runner.addEventListener(name, () => result.again());

form.addEventListener("change", ({ detail: { quiet, prompt } }) => {
  save(form.settings);
  for (const each of tokens) each.update();
  showSize();
  if (form.settings.live && !quiet) (prompt ? typed : live)();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("reset").addEventListener("click", () => {
  const before = structuredClone(form.settings);
  form.replace({ ...fresh(), prompt: before.prompt, negative: before.negative, seed: randomSeed() }, { quiet: true });
  toast("All settings are as at the start", "Undo", () => form.replace(before));
});

models.addEventListener("change", ({ detail: { models: found, switched } }) => {
  form.setModels(found);
  showSize();
  for (const each of tokens) each.update();
  if (switched) {
    hasNewModel = true;
    const none = { steps: null, guidance: null, sampler: null, spacing: null };
    form.set({ width: null, height: null, vae: "", fast: null, full: { ...none }, few: { ...none } });
  }
  pickers.render();
  editor.setControls((found.controls ?? []).map((each) => each.name));
  $("go").disabled = false;
  $("empty-about").textContent = "Write a prompt and press Generate. Drop an image anywhere to use its settings.";
  const embedded = found.models.find((each) => each.name === found.current)?.embedded;
  const use = (prompt) => {
    form.set({ prompt }, { quiet: true });
    generate();
  };
  const chips = (embedded ? EXAMPLES : []).map((text) =>
    el("button", { type: "button", on: { click: () => use(text) } }, text),
  );
  $("examples").replaceChildren(...chips);
});

viewer.addEventListener("use", ({ detail: item }) => {
  const before = structuredClone(form.settings);
  form.replace({ ...checked(item.settings), live: before.live }, { quiet: true });
  lastSeed = null;
  toast("These settings are in the form, with the seed locked", "Undo", () => form.replace(before, { quiet: true }));
  if (views.view() === "inside") views.show("generate");
});
viewer.addEventListener("edit", ({ detail: item }) => edit(item.blob, item));
viewer.addEventListener("compare", ({ detail: item }) => gallery.pick(item));
gallery.addEventListener("open", ({ detail: index }) => viewer.open(index));
gallery.addEventListener("compare", ({ detail: [first, second] }) => compare.open(first, second));
editor.addEventListener("change", () => {
  showEditing();
  if (form.settings.live && views.view() === "edit") live(); // each stroke, too
});
document.addEventListener("view", showEditing);

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) {
    if (runner.running) runner.cancel();
    else gallery.pick(null);
  }
});

drop.start(
  (file, target) => {
    const toForm = target instanceof Element && target.closest("#form");
    if (views.view() === "edit" && !toForm) edit(file);
    else recipes.read(file);
  },
  () => (views.view() === "generate" ? "Drop the image to use its settings" : ""),
);

if (!localStorage.getItem("sd-settings")) form.set({ seed: randomSeed() }, { quiet: true });
views.start();
$("go").disabled = true;
await gallery.open();
if (!runner.running) result.latest();
lastSeed = gallery.items[0]?.seed ?? null;
document.body.dataset.ready = "";
if (await models.load((text) => ($("empty-about").textContent = text))) document.body.dataset.models = "";
