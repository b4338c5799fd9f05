// Images that are dropped or pasted anywhere on the page.

import { $ } from "./dom.js";

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
const imageIn = (list) => [...(list ?? [])].find((file) => file.type.startsWith("image/"));

// take(file, target) gets each image, unless something else has taken the event.
export function start(take, hint) {
  let depth = 0;
  const over = (shown) => {
    $("drop-hint").hidden = !shown;
    if (shown) $("drop-hint").firstElementChild.textContent = hint();
  };
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth++;
    over(hint() !== "");
  });
  addEventListener("dragleave", (event) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth - 1);
    if (!depth) over(false);
  });
  addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault(); // or the browser opens the file in place of the page
  });
  addEventListener("drop", (event) => {
    depth = 0;
    over(false);
    if (event.defaultPrevented || !hasFiles(event)) return;
    event.preventDefault();
    const file = imageIn(event.dataTransfer.files);
    if (file) take(file, event.target);
  });
  addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData?.files);
    if (!file || event.defaultPrevented) return;
    event.preventDefault();
    take(file, event.target);
  });
}
