// What the form holds: one value, kept in localStorage, that becomes the body of a request. Null: the model's default.

const KEY = "sd-settings";

export const DEFAULTS = {
  prompt: "",
  negative: "",
  width: null,
  height: null,
  ownSize: true, // image to image: the size of the image
  fast: null, // with the few-step LoRA of the model, if it has one
  live: false,
  full: { steps: null, guidance: null, sampler: null, spacing: null }, // without the few-step LoRA, ...
  few: { steps: null, guidance: null, sampler: null, spacing: null }, // ... and with it
  seed: "1",
  lock: false,
  n: 1,
  strength: 0.75,
  loras: [], // {name, weight}
  vae: "",
  hiresOn: false,
  hires: 2,
  hiresStrength: 0.55,
  hiresSteps: null,
  hiresUpscaler: "lanczos",
  webUi: true,
  clipSkip: null,
  variationSeed: "",
  variationStrength: 0,
  guidanceRescale: 0,
  rng: "torch-cpu",
  tileable: false,
  options: {}, // of the sampler
  extra: { request: {}, params: {} }, // from recipes: settings that the form has no field for
};

const MAX_SEED = 2n ** 64n - 1n;

// A new value with the defaults.
export const fresh = () => structuredClone(DEFAULTS);

// Only what DEFAULTS has, and only of the same type: localStorage and the gallery may hold those of another version.
export function checked(found) {
  const value = fresh();
  if (typeof found !== "object" || found === null) return value;
  for (const [name, own] of Object.entries(DEFAULTS)) {
    const given = found[name];
    if (given === undefined || given === null) continue;
    if (
      own === null
        ? typeof given !== "object"
        : typeof given === typeof own && Array.isArray(given) === Array.isArray(own)
    )
      value[name] = typeof own === "object" && own !== null && !Array.isArray(own) ? { ...own, ...given } : given;
  }
  value.loras = value.loras.filter((each) => typeof each?.name === "string" && Number.isFinite(each.weight));
  value.extra = { request: { ...value.extra.request }, params: { ...value.extra.params } };
  return value;
}

export function load() {
  try {
    return checked(JSON.parse(localStorage.getItem(KEY)));
  } catch {
    return fresh();
  }
}

export function save(settings) {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // storage is full or off: they are lost when the page is closed
  }
}

export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

// A text as a seed, or null if it is none.
export function asSeed(text) {
  const plain = String(text).trim();
  if (!/^\d{1,20}$/.test(plain)) return null;
  const found = BigInt(plain);
  return found <= MAX_SEED ? found : null;
}

// A seed as a number, if it is exact; api.js writes the others.
const plain = (seed) => (seed <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(seed) : seed);

export const isFast = (settings, models) => Boolean(models?.few_steps) && (settings.fast ?? true);

// Steps, guidance, sampler and spacing, with the defaults of the model, or of its few-step LoRA.
export function sampling(settings, models) {
  const fast = isFast(settings, models);
  const own = fast ? settings.few : settings.full;
  const defaults = fast ? models.few_steps : (models?.defaults ?? {});
  const found = {};
  for (const name of Object.keys(own)) found[name] = own[name] ?? defaults[name];
  return found;
}

// Width and height, with the default of the model: null while it is not loaded.
export function sizeOf(settings, models) {
  const size = models?.defaults?.size ?? null;
  return { width: settings.width ?? size, height: settings.height ?? size };
}

// A copy with the defaults filled in: what an image was made with, whatever the defaults are later.
export function resolved(settings, models) {
  const fast = isFast(settings, models);
  const own = { ...structuredClone(settings), ...sizeOf(settings, models), fast };
  own[fast ? "few" : "full"] = { ...own.full, ...sampling(settings, models) };
  return own;
}

// The body of POST /api/generate. `edit` is the editor's value, or null; `hints` are its hints for control networks.
export function bodyOf(settings, models, edit = null, hints = []) {
  const params = { ...settings.extra.params, ...sampling(settings, models) };
  params.seed = plain(asSeed(settings.seed) ?? 0n);
  params.n = settings.n;
  const own = edit && (edit.kind === "inpaint" || settings.ownSize);
  if (!own) Object.assign(params, sizeOf(settings, models));
  if (settings.variationStrength > 0 && asSeed(settings.variationSeed) !== null) {
    params.variation_seed = plain(asSeed(settings.variationSeed));
    params.variation_strength = settings.variationStrength;
  }
  if (settings.guidanceRescale) params.guidance_rescale = settings.guidanceRescale;
  if (settings.rng !== DEFAULTS.rng) params.rng = settings.rng;
  if (settings.tileable) params.tileable = true;
  const known = models?.samplers?.find((each) => each.key === params.sampler)?.options ?? [];
  const options = Object.entries(settings.options).filter(([name]) => optionNames(known).includes(name));
  if (options.length) params.options = Object.fromEntries(options);

  const request = {
    ...settings.extra.request,
    kind: edit ? edit.kind : settings.hiresOn ? "hires" : "txt2img",
    prompt: settings.prompt,
    negative: settings.negative,
    web_ui_prompts: settings.webUi,
    params,
  };
  if (settings.clipSkip) request.clip_skip = settings.clipSkip;
  if (edit) Object.assign(request, { strength: settings.strength }, edit);
  else if (settings.hiresOn) {
    request.hires = settings.hires;
    request.hires_strength = settings.hiresStrength;
    request.hires_upscaler = settings.hiresUpscaler;
    if (settings.hiresSteps) request.hires_steps = settings.hiresSteps;
  }
  if (hints.length) request.controls = hints;

  const loras = settings.loras.map(({ name, weight }) => ({ name, weight }));
  if (isFast(settings, models) && !loras.some((each) => each.name === models.few_steps.lora))
    loras.push({ name: models.few_steps.lora, weight: 1 });
  return { request, model: models?.current ?? null, loras, vae: settings.vae || null, previews: 1 };
}

// The names of a sampler's options, which the server gives as names, as values with a name, or by name.
export function optionNames(options) {
  if (Array.isArray(options)) return options.map((each) => (typeof each === "string" ? each : each.name));
  return Object.keys(options ?? {});
}
