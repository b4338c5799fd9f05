// Elements for the editor's controls. All text goes in as text, never as HTML.

let count = 0;
const freshId = () => `editor-${++count}`;

/** An element. attributes   names and values; true sets one without a value, false and null leave it out */
export function el(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (value === true) found.setAttribute(name, "");
    else if (value !== false && value !== null) found.setAttribute(name, value);
  }
  found.append(...children.filter((child) => child !== null));
  return found;
}

/** A button. keys   the shortcut, shown in its tooltip */
export function button(text, onclick, { title = "", keys = "", ...attributes } = {}) {
  const hint = [title, keys && `(${keys})`].filter(Boolean).join(" ");
  return el("button", { type: "button", onclick, title: hint || null, ...attributes }, text);
}

/** A slider with its value beside it: {root, input, set(value), get()}. show   value -> text */
export function slider({ label, min, max, step, value, show = String, change, title = null }) {
  const id = freshId();
  const input = el("input", { type: "range", id, min, max, step });
  const output = el("output", { for: id, "aria-hidden": "true" }); // the slider's own text says it already
  const root = el("div", { class: "ed-slider", title }, el("label", { for: id }, label), input, output);
  const set = (number) => {
    input.value = number;
    output.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    set(input.value);
    change(Number(input.value));
  });
  set(value);
  return { root, input, set, get: () => Number(input.value) };
}

/** A field for a number: {root, input, set(value)}. change   called with a valid number once it is entered */
export function numberField({ label, min, max, step, value, change }) {
  const id = freshId();
  const input = el("input", { type: "number", id, min, max, step, inputmode: "numeric" });
  input.value = value;
  input.addEventListener("change", () => change(Number(input.value)));
  return {
    root: el("div", { class: "ed-number" }, el("label", { for: id }, label), input),
    input,
    set: (number) => (input.value = number),
  };
}

/** A list to choose from: {root, input, set(value), fill(options)}. options   pairs of value and text */
export function choice({ label, options, value, change, title = null }) {
  const id = freshId();
  const input = el("select", { id, onchange: () => change(input.value) });
  const fill = (pairs) => input.replaceChildren(...pairs.map(([key, text]) => el("option", { value: key }, text)));
  fill(options);
  input.value = value;
  const root = el("div", { class: "ed-choice", title }, el("label", { for: id }, label), input);
  return { root, input, fill, set: (key) => (input.value = key) };
}

/** Radio buttons side by side: {root, set(value)}. options   pairs of value and text */
export function segments({ label, options, value, change, titles = {} }) {
  const name = freshId();
  const inputs = new Map();
  const root = el("fieldset", { class: "ed-segments" }, el("legend", { class: "visually-hidden" }, label));
  for (const [key, text] of options) {
    const input = el("input", { type: "radio", name, value: key, onchange: () => change(key) });
    inputs.set(key, input);
    root.append(el("label", { title: titles[key] ?? null }, input, el("span", {}, text)));
  }
  const set = (key) => (inputs.get(key).checked = true);
  set(value);
  return { root, set };
}

/** A check box: {root, input, set(value)}. */
export function check({ label, value = false, change, title = null }) {
  const input = el("input", { type: "checkbox", onchange: () => change(input.checked) });
  input.checked = value;
  return { root: el("label", { class: "ed-check", title }, input, label), input, set: (on) => (input.checked = on) };
}

/** A button that opens the file picker for images. */
export function fileButton(text, onfile, attributes = {}) {
  const input = el("input", {
    type: "file",
    accept: "image/png,image/jpeg,image/webp,image/*",
    hidden: true,
    onchange: () => {
      if (input.files.length) onfile(input.files[0]);
      input.value = ""; // the same file can be chosen again
    },
  });
  return el("span", { class: "ed-file" }, button(text, () => input.click(), attributes), input);
}

/** The first image in a paste or drop, or null. */
export function imageIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? null;
}
