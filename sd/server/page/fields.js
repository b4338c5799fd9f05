// What a field of the form says: {value}, where null is an empty field; {} while it may still be typed in; or
// {wrong: true}.

import { asSeed } from "./settings.js";

// final: the field was left, so a number out of its range becomes the nearest one in it.
function number(step) {
  return (field, final) => {
    if (field.value.trim() === "") return final ? { value: null } : {};
    const low = field.min === "" ? -Infinity : Number(field.min);
    const high = field.max === "" ? Infinity : Number(field.max);
    const given = Number(field.value);
    const right = Math.min(high, Math.max(low, step ? Math.round(given / step) * step : given));
    if (!Number.isFinite(right)) return {};
    return final || right === given ? { value: right } : { wrong: true };
  };
}

function seed(field, final) {
  if (field.value.trim() === "") return final ? { value: null } : {};
  const found = asSeed(field.value);
  return found === null ? { wrong: true } : { value: String(found) };
}

export const READERS = {
  text: (field) => ({ value: field.value }),
  flag: (field) => ({ value: field.checked }),
  number: number(0),
  whole: number(1),
  size: number(8),
  seed,
};

export function mark(field, wrong) {
  if (wrong) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

// Put entries into a select; of(entry) is [value, label].
export function fill(select, entries, of) {
  const options = entries.map((entry) => {
    const [value, label] = of(entry);
    return new Option(label, value);
  });
  select.replaceChildren(...options);
}

export function slide(range, value) {
  range.value = value ?? range.min;
  const part = (100 * (range.value - range.min)) / (range.max - range.min);
  range.style.setProperty("--part", `${part}%`);
}
