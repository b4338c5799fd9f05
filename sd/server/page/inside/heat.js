// Maps drawn as heat: dark where there is little, bright where there is much.

// Colours from the least to the most, each [at, red, green, blue].
const RAMP = [
  [0, 22, 11, 57],
  [0.3, 105, 22, 110],
  [0.55, 200, 52, 78],
  [0.78, 248, 140, 40],
  [1, 252, 246, 170],
];
const FLOOR = 0.45; // of the opacity: of the place with the least

function ramp(share) {
  const above = Math.max(1, RAMP.findIndex(([at]) => at >= share));
  const [low, ...from] = RAMP[above - 1];
  const [high, ...to] = RAMP[above];
  const part = (share - low) / (high - low);
  return from.map((value, i) => value + part * (to[i] - value));
}

// A map as the server sends it: {width, height, max, mean, data}, with a byte for each position.
export class Heat {
  constructor(width, height, values) {
    this.width = width;
    this.height = height;
    this.values = values;
    this.low = Math.min(...values);
    this.high = Math.max(...values);
    this.mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  }

  static of({ width, height, max, data }) {
    const bytes = atob(data);
    return new Heat(width, height, Float32Array.from(bytes, (c) => (c.charCodeAt(0) / 255) * max));
  }

  // The mean of several maps, at the size of the first: those of another size are left out.
  static mean(maps) {
    const [first] = maps;
    const same = maps.filter((map) => map.width === first.width && map.height === first.height);
    const values = first.values.map((_, i) => same.reduce((sum, map) => sum + map.values[i], 0) / same.length);
    return new Heat(first.width, first.height, values);
  }

  // The value at a place, x and y as fractions of the sides.
  at(x, y) {
    const column = Math.min(Math.floor(x * this.width), this.width - 1);
    const row = Math.min(Math.floor(y * this.height), this.height - 1);
    return this.values[row * this.width + column];
  }
}

// Draw a map over the whole of a canvas; opacity 0 to 1. Values from `low` to `high` take the colours of the ramp.
export function drawHeat(canvas, heat, opacity, low = heat.low, high = heat.high) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const image = new ImageData(heat.width, heat.height);
  const range = high - low || 1;
  heat.values.forEach((value, i) => {
    const share = Math.min(Math.max((value - low) / range, 0), 1);
    image.data.set([...ramp(share), 255 * opacity * (FLOOR + (1 - FLOOR) * share)], 4 * i);
  });
  const small = new OffscreenCanvas(heat.width, heat.height);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

export function clear(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

// The colours of the ramp from left to right, for a legend.
export function drawRamp(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const colour = ramp(x / (canvas.width - 1)).map(Math.round);
    context.fillStyle = `rgb(${colour.join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
