// Which view is shown: generate, edit or inside. The address has it as #edit, so a reload and the back button keep it.

import { $ } from "./dom.js";

const VIEWS = ["generate", "edit", "inside"];

export const view = () => $("work").dataset.view;

export function show(name, { focus = false } = {}) {
  $("work").dataset.view = name;
  $("view-edit").hidden = name !== "edit";
  $("view-generate").hidden = name === "inside"; // beside the editor, it shows the result
  $("view-inside").hidden = name !== "inside";
  for (const each of VIEWS) {
    if (each === name) $(`tab-${each}`).setAttribute("aria-current", "page");
    else $(`tab-${each}`).removeAttribute("aria-current");
  }
  const hash = name === "generate" ? "" : `#${name}`;
  if (location.hash !== hash) history.replaceState(null, "", location.pathname + hash);
  if (focus) $("work").focus();
  document.dispatchEvent(new CustomEvent("view", { detail: name }));
}

export function start() {
  for (const each of VIEWS) $(`tab-${each}`).addEventListener("click", () => show(each));
  const named = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "generate");
  addEventListener("hashchange", () => show(named()));
  show(named());
}
