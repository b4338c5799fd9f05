// See inside: what happens in the model, step by step and word by word.

import { getJson, stream, toJson } from "../api.js";
import { announce, debounce, el, isField } from "../dom.js";
import { Controls } from "./controls.js";
import { Curve, facts } from "./curve.js";
import { explanation, INTRODUCTION, QUESTION } from "./explanations.js";
import { counted, percent, plain } from "./numbers.js";
import { Recording, Recordings } from "./recording.js";
import { bodyFor, isFew } from "./request.js";
import { Stage } from "./stage.js";
import { Strip } from "./strip.js";
import { Words } from "./words.js";

const PAUSE = 120; // milliseconds without a change of a slider, after which it is answered

const TITLES = {
  noisy: "Show what the network was given, in place of what it predicted",
  pull: "Show where guidance acts: how far the prompt moves the prediction",
  same: "Give both maps the same colours for the same values",
};

export class Inside {
  // body() returns what would be sent to /api/generate; onSettings(settings) takes settings over into the form.
  constructor(root, { body, onSettings }) {
    Object.assign(this, { root, body, onSettings });
    this.own = {}; // settings that were changed here
    this.models = null;
    this.recording = null;
    this.recordings = new Recordings();
    this.running = null; // the AbortController of the request in progress
    this.follows = true; // the newest step is shown as it comes
    this.later = debounce(PAUSE, () => this.look());
    this.build();
    document.addEventListener("view", () => this.opened());
  }

  // The view may have been opened: with a model that answers at once, there need not be an empty one.
  async opened() {
    const { request, model } = this.body(); // no model: the page does not know it yet
    if (this.recording || this.running || !this.root.checkVisibility() || !model || !request.prompt.trim()) return;
    this.models ??= await getJson("/api/models").catch(() => null);
    if (this.answersAtOnce && !this.recording && !this.running) this.look({ fresh: true });
  }

  build() {
    this.strip = new Strip((frame) => this.chose(frame));
    this.curve = new Curve((step) => this.strip.go(step));
    this.words = new Words(() => this.draw());
    const onPlace = (place) => this.stages.forEach((stage) => stage.point(place));
    this.stages = ["Image with a map", "Image with the second map"].map((label) => new Stage({ onPlace, label }));
    this.controls = new Controls({
      onChange: (name, value) => this.changed(name, value),
      onReset: () => this.change({}),
      onUse: () => this.use(),
    });
    const button = (text, does, properties = {}) =>
      el("button", { type: "button", ...properties, on: { click: does } }, text);
    this.go = button("Look inside", () => this.look({ fresh: true }), { className: "primary inside-go" });
    this.stop = button("Cancel", () => this.cancel(), { hidden: true });
    this.status = el("span", { className: "inside-status" }, ""); // not live: it changes with each step
    this.error = el("div", { className: "alert", role: "alert", hidden: true });
    this.notes = el("ul", { className: "notes", hidden: true });
    const range = { type: "range", id: "inside-opacity", min: 0, max: 100, value: 80 };
    this.opacity = el("input", { ...range, on: { input: () => this.draw() } });
    const toggle = (name, text) => button(text, () => this.flip(name), { title: TITLES[name], "aria-pressed": "false" });
    this.toggles = {
      noisy: toggle("noisy", "Noisy latent"),
      pull: toggle("pull", "Guidance"),
      same: toggle("same", "Same scale"),
    };
    this.free = button("Release words", () => this.words.release(), { className: "quiet", hidden: true });
    const toggles = { className: "inside-toggles", role: "group", "aria-label": "View" };
    this.facts = el("div");
    const panel = (title, ...children) =>
      el("section", { className: "inside-panel", "aria-label": title }, el("h3", {}, title), ...children);
    this.results = el("div", { className: "inside-results", hidden: true },
      el("div", { className: "inside-stages" }, ...this.stages.map((stage) => stage.element)),
      el("div", { className: "inside-side" }, panel("Words", this.words.element, explanation("words"))),
      el("div", { className: "inside-view" },
        el("div", toggles, ...Object.values(this.toggles), this.free),
        el("label", { className: "inside-opacity", for: "inside-opacity" }, "Opacity", this.opacity)),
      el("div", { className: "inside-panel inside-reel" }, this.strip.element, explanation("steps")),
      el("div", { className: "inside-below" },
        panel("Noise", this.curve.element, explanation("noise")),
        panel("This step", this.facts, explanation("guidance"))),
    );
    const introduction = INTRODUCTION.map((text) => el("p", {}, text));
    this.empty = el("div", { className: "inside-empty-state" }, el("h2", {}, QUESTION), ...introduction);
    this.root.classList.add("inside");
    this.root.replaceChildren(
      el("header", { className: "inside-head" },
        el("div", { className: "inside-run" }, this.go, this.stop, this.status), this.controls.element),
      this.error, this.empty, this.results, this.notes,
    );
    document.addEventListener("keydown", (event) => this.key(event), { capture: true });
    this.controls.element.hidden = true; // until there is a run whose settings they show
  }

  // ------------------------------------------------------------------------------------------------ settings

  changed(name, value) {
    // the settings of the few-step LoRA and those of the model have nothing in common
    this.change(name === "few" ? { few: value } : { ...this.own, [name]: value });
  }

  change(own) {
    this.own = own;
    const changed = Object.keys(own).length > 0;
    this.controls.changes.hidden = !changed;
    if (!this.recording) return;
    if (this.answersAtOnce) this.later();
    else this.status.textContent = "Settings changed: press Look inside";
  }

  use() {
    const { plan } = this.recording;
    if (this.models.few_steps) this.onSettings({ fast: this.isFew }); // first, as each has steps of its own
    this.onSettings({ steps: this.sent.request.params.steps ?? plan.steps, guidance: plan.guidance });
    this.own = {};
    this.controls.changes.hidden = true;
    announce("The form has these settings now");
  }

  // Whether a run takes so little time that sliders start one: the embedded model's does.
  get answersAtOnce() {
    const name = this.body().model ?? this.models?.current;
    return this.models?.models?.find((each) => each.name === name)?.embedded ?? false;
  }

  get isFew() {
    return Boolean(this.sent) && isFew(this.sent, this.models?.few_steps);
  }

  // ------------------------------------------------------------------------------------------------ runs

  // Look into a run. fresh: with the seed of the form, where sliders keep the one that is shown.
  async look({ fresh = false } = {}) {
    this.later.stop();
    this.cancel();
    const running = (this.running = new AbortController());
    this.fail("");
    this.busy(true, "Waiting…");
    try {
      if (fresh || !this.models) this.models = await getJson("/api/models", running.signal);
      this.controls.offer(this.models.few_steps, this.models.limits?.max_steps);
      const seed = fresh || !this.recording?.plan ? undefined : BigInt(this.recording.plan.seed);
      const body = (this.sent = bodyFor(this.body(), { ...this.own, seed }, this.models.few_steps));
      const key = toJson(body);
      const known = fresh ? null : this.recordings.get(key);
      if (known) this.replay(known);
      else await this.record(body, key, running);
    } catch (error) {
      if (running.signal.aborted) return;
      this.fail(error.message);
    } finally {
      if (this.running === running) this.finish();
    }
  }

  async record(body, key, running) {
    const recording = new Recording();
    for await (const event of stream("/api/inside", body, running.signal)) {
      if (running.signal.aborted) return;
      if (event.event === "queued") {
        const before = event.data.position;
        this.status.textContent = before ? `Waiting: ${counted(before, "job")} before this one` : "Starting…";
      } else if (event.event === "error") {
        this.fail(event.data.message);
      } else if (recording.take(event)) {
        this.took(recording, event.event);
      }
    }
    if (recording.end) {
      // also under the guidance that the model has by default, which the slider shows
      const { guidance, seed } = recording.plan;
      const same = bodyFor(body, { guidance, seed: BigInt(seed) }, null);
      for (const each of [key, toJson(same)]) this.recordings.put(each, recording);
    }
    if (!recording.end && this.error.hidden) this.fail("The server ended before the image did: try again");
  }

  // Show a recording that is complete.
  replay(recording) {
    this.took(recording, "begin");
    recording.steps.forEach((_, i) => this.fill(recording, i));
    this.took(recording, "done");
  }

  // Something was added to a recording.
  took(recording, event) {
    if (event === "begin") {
      this.keepsFrame = !this.follows && this.strip.selected < this.recording?.total; // a step that was chosen
      this.recording = recording;
      this.show(recording.plan);
    } else if (event === "step") {
      const newest = recording.steps.length - 1;
      this.fill(recording, newest);
      this.status.textContent = `Step ${newest + 1} of ${recording.total}`;
      if (!this.keepsFrame) this.strip.select(newest, false);
      this.draw();
    } else {
      const { end, total } = recording;
      this.strip.fill(total, `data:image/png;base64,${end.images[0]}`, null);
      if (!this.keepsFrame) this.strip.select(total, false);
      this.notes.replaceChildren(...end.notes.map((note) => el("li", {}, note)));
      this.notes.hidden = !end.notes.length;
      this.draw();
      const steps = counted(recording.steps.length, "step");
      announce(`The image is done after ${steps}. The words of the prompt are buttons: each shows its map`);
    }
  }

  fill(recording, step) {
    const { x0, alpha_bar: signal } = recording.steps[step];
    this.strip.fill(step, x0, 1 - signal);
  }

  show(plan) {
    this.empty.hidden = true;
    this.results.hidden = this.controls.element.hidden = false;
    this.words.set(plan.words, plan.parts);
    this.curve.set(plan);
    this.strip.set(plan.steps);
    const steps = this.sent.request.params.steps ?? plan.steps; // of the whole grid, of which strength takes a part
    this.controls.show({ steps, guidance: plan.guidance, few: this.isFew }, Object.keys(this.own).length > 0);
  }

  cancel() {
    this.running?.abort();
    this.running = null;
    this.busy(false, "");
  }

  finish() {
    this.running = null;
    const { end, steps } = this.recording ?? {};
    const done = end && this.error.hidden;
    this.busy(false, done ? `${counted(steps.length, "step")} in ${end.seconds.toFixed(1)} s` : "");
  }

  busy(is, status) {
    this.stop.hidden = !is;
    this.root.setAttribute("aria-busy", String(is));
    this.status.textContent = status;
  }

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
  }

  // ------------------------------------------------------------------------------------------------ views

  chose(frame) {
    this.follows = frame >= (this.recording?.total ?? 0);
    this.keepsFrame = !this.follows;
    this.draw();
  }

  flip(name) {
    const button = this.toggles[name];
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    this.draw();
  }

  // Enable one of the buttons, or say why it has no effect now.
  enable(name, can, why) {
    this.toggles[name].disabled = !can;
    this.toggles[name].title = can ? TITLES[name] : why;
  }

  is(name) {
    return this.toggles[name].getAttribute("aria-pressed") === "true";
  }

  draw() {
    const { recording } = this;
    if (!recording?.plan) return;
    const frame = this.strip.selected;
    const { plan, total } = recording;
    const step = recording.steps[frame] ?? null;
    const count = plan.words.length;
    const shares = Array.from({ length: count }, (_, word) => recording.map(frame, word).heat?.mean ?? null);
    this.words.shares(shares, recording.special(frame));
    this.curve.mark(frame);
    this.facts.replaceChildren(this.factsOf(frame));
    this.enable("noisy", frame < total, "The result has no noise: choose a step");
    this.enable("pull", plan.guided, "This run has no guidance");
    this.free.hidden = !this.words.kept.length;

    const { shown } = this.words;
    const maps = this.is("pull") && !shown.length ? [this.pull(frame)] : shown.map((word) => this.map(frame, word));
    const two = maps.length > 1;
    this.toggles.same.hidden = !two;
    this.stages[1].element.hidden = !two;
    const heats = maps.map((map) => map?.heat).filter(Boolean);
    const scale = two && this.is("same") && heats.length === 2
      ? { low: Math.min(...heats.map((heat) => heat.low)), high: Math.max(...heats.map((heat) => heat.high)) }
      : {};
    const [source, width, height] = this.source(frame, step);
    const what = this.is("noisy") ? "Noisy latent" : "Prediction";
    const alt = step ? `${what} at step ${frame + 1} of ${total}` : "The generated image";
    this.stages.forEach((stage, i) => {
      stage.show(source, width, height, alt);
      stage.overlay(maps[i] && { ...maps[i], ...scale, opacity: this.opacity.value / 100 });
    });
    this.opacity.style.setProperty("--part", `${this.opacity.value}%`);
  }

  // The address and the size of the image of a frame.
  source(frame, step) {
    const { plan, end, steps, total } = this.recording;
    const { width, height } = plan;
    if (step) return [this.is("noisy") ? step.x : step.x0, width, height];
    // a result that was cropped or pasted into another image does not fit the maps: the last prediction does
    if (frame >= total && end) {
      const mapped = this.words.shown.length || this.is("pull");
      return [end.aligned || !mapped ? `data:image/png;base64,${end.images[0]}` : steps.at(-1).x0, width, height];
    }
    return [steps.at(-1)?.x0 ?? null, width, height];
  }

  map(frame, word) {
    const { heat, whole } = this.recording.map(frame, word);
    const { text } = this.recording.plan.words[word];
    if (!heat) return { title: text, about: "not in the prompt at this step", heat: null };
    const about = `${percent(heat.mean)} of the attention, ${whole ? "mean of all steps" : `step ${frame + 1}`}`;
    return { heat, title: text, about, write: percent };
  }

  pull(frame) {
    const heat = this.recording.pull(frame);
    const when = frame < this.recording.total ? `step ${frame + 1}` : "mean of all steps";
    if (!heat) return { title: "Guidance", about: "none at this step", heat: null };
    return { heat, title: "Guidance", about: `|with − without the prompt|, ${when}`, write: plain };
  }

  factsOf(frame) {
    const { plan, steps, total, end } = this.recording;
    const step = steps[frame];
    if (!step) {
      return facts([
        ["Sampler", `${plan.sampler}, ${plan.spacing}`],
        ["Steps", `${total}${plan.evaluations > 1 ? `, ${plan.evaluations} evaluations each` : ""}`],
        ["Guidance", plan.guided ? plain(plan.guidance) : "none"],
        ["Seed", String(plan.seed)],
        ["Latent", plan.latent.join(" × ")],
        ["Network predicts", plan.prediction === "v" ? "velocity v" : "noise ε"],
        ["Time", end ? `${end.seconds.toFixed(2)} s` : null],
      ]);
    }
    return facts([
      ["Step", `${frame + 1} of ${total}`],
      ["Timestep t", plain(step.t)],
      ["Signal ᾱ", percent(step.alpha_bar)],
      ["Noise 1 − ᾱ", percent(1 - step.alpha_bar)],
      ["Prediction changed by", step.change === null ? "–" : percent(step.change)],
      ["Guidance moved it by", step.guidance ? `${plain(step.guidance.mean)} on average` : "no guidance"],
    ]);
  }

  // Keys of the whole view: also where nothing in it has the focus, as after a press beside all buttons.
  key(event) {
    const { target } = event;
    if (event.altKey || event.ctrlKey || event.metaKey || !this.root.checkVisibility()) return;
    if (event.key === "Escape" && this.running) {
      this.cancel();
      event.preventDefault();
    } else if (this.recording && !isField(target) && (this.root.contains(target) || target.contains(this.root))) {
      if (this.strip.key(event)) event.preventDefault();
    }
  }
}
