// Numbers as people read them.

export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.05) return "< 0.1 %";
  return `${value >= 99.95 ? Math.round(value) : value.toFixed(1)} %`;
}

// A plain number with about three digits.
export function plain(value) {
  return String(Number(value.toPrecision(3)));
}

export const counted = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
