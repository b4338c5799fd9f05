// Texts of the server, as they are shown.

// The library's messages begin in lower case and have no full stop.
export function sentence(text) {
  const plain = String(text || "Something went wrong.").trim();
  return plain[0].toUpperCase() + plain.slice(1);
}

// What was used, as the server wrote it: "Steps: 4, Sampler: LCM, Seed: 1, ...".
export function pairs(text) {
  const last = String(text ?? "")
    .trimEnd()
    .split("\n")
    .pop();
  if (!/^\s*Steps: /.test(last)) return [];
  return [...last.matchAll(/\s*([\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g)].map((found) => [found[1], found[2]]);
}
