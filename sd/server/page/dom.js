// Small helpers for elements. Texts only ever become text nodes: nothing from a prompt or a file is read as HTML.

export const $ = (id) => document.getElementById(id);

// An element with properties (or, with a dash or colon in the name, attributes) and children: elements and texts.
export function el(tag, properties = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "for") found.setAttribute(name, value);
    else if (name === "on") for (const [type, does] of Object.entries(value)) found.addEventListener(type, does);
    else found[name] = value;
  }
  found.append(...children.filter((child) => child !== null && child !== undefined));
  return found;
}

const SVG = "http://www.w3.org/2000/svg";

// A symbol of index.html.
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

// The button that closes a dialog.
export function closeButton(dialog) {
  const properties = { type: "button", className: "icon quiet close", "aria-label": "Close" };
  return el("button", { ...properties, on: { click: () => dialog.close() } }, icon("close"));
}

export function setIcon(button, name) {
  button.replaceChildren(icon(name));
}

// A rectangle of this shape, as a symbol for a size.
export function shape(width, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const scale = 18 / Math.max(width, height);
  const rect = document.createElementNS(SVG, "rect");
  const values = { width: width * scale, height: height * scale, rx: 2.5 };
  for (const [name, value] of Object.entries(values)) rect.setAttribute(name, value);
  rect.setAttribute("x", 12 - (width * scale) / 2);
  rect.setAttribute("y", 12 - (height * scale) / 2);
  svg.append(rect);
  return svg;
}

// Call a function once nothing has called for it during so many milliseconds.
export function debounce(milliseconds, does) {
  let timer = 0;
  const later = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => does(...given), milliseconds);
  };
  later.stop = () => clearTimeout(timer);
  return later;
}

let leaving = 0;

// A short message that goes away by itself; with an action, a button for it.
export function toast(text, action, does) {
  const box = $("toast");
  box.replaceChildren(el("span", {}, text));
  if (action) {
    const run = () => {
      box.hidden = true;
      does();
    };
    box.append(el("button", { type: "button", className: "quiet", on: { click: run } }, action));
  }
  const dialog = document.querySelector("dialog[open]"); // while one is open, nothing outside of it can be pressed
  (dialog ?? document.body).append(box);
  dialog?.addEventListener("close", () => document.body.append(box), { once: true });
  box.hidden = false;
  clearTimeout(leaving);
  leaving = setTimeout(() => (box.hidden = true), action ? 8000 : 4000);
}

// Tell a screen reader.
export function announce(text) {
  $("announce").textContent = text;
}

// Ask before something that cannot be undone: true for yes.
export function ask(question, yes) {
  const dialog = $("ask-dialog");
  $("ask-title").textContent = question;
  $("ask-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export const isField = (target) => target instanceof Element && target.matches("input, textarea, select");

// A data: URL of a Blob.
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// The bytes of a base64 text, as a Blob.
export function fromBase64(text, type) {
  const found = atob(text);
  const bytes = new Uint8Array(found.length);
  for (let i = 0; i < found.length; i++) bytes[i] = found.charCodeAt(i);
  return new Blob([bytes], { type });
}
