// The keys of the editor, as a list below it; the canvas is described by it.

import { el } from "./dom.js";

const KEYS = [
  [["←", "→", "↑", "↓"], "move the brush by a quarter of its size; with Shift, by one pixel"],
  [["Space"], "paints while it is held; with a drag, it moves the image"],
  [["[", "]"], "change the size of the brush"],
  [["X"], "changes between brush and eraser"],
  [["Ctrl+Z", "Ctrl+Shift+Z"], "undo and redo"],
  [["+", "-", "0"], "zoom in, zoom out, show all"],
  [["B"], "compares with the result"],
];

/** A list that opens. id   that of the list */
export function keyHelp(id) {
  const rows = KEYS.map(([keys, what]) =>
    el("li", {}, ...keys.flatMap((key) => [el("kbd", {}, key), " "]), what),
  );
  return el("details", { class: "ed-help" }, el("summary", {}, "Keys"), el("ul", { id }, ...rows));
}
