// Numbers as people read them.

export function percent(share, digits = 1) {
  const value = 100 * share;
  if (value > 0 && value < 0.05) return "< 0.1 %";
  return `${value >= 99.95 || (digits === 1 && value >= 10 && Number.isInteger(value)) ? Math.round(value) : value.toFixed(digits)} %`;
}

// A plain number with about three digits.
export function plain(value) {
  return String(Number(value.toPrecision(3)));
}

export const counted = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
