// A grey image of bytes that a brush paints on: a mask (255 is generated) or the lines of a sketch. No DOM in here.

import { clamp, clipped, union } from "./geometry.js";

export class Surface {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.version = 0; // grows with each change
    this.changed = null; // the rectangle changed since it was last taken, for those who draw it
  }

  get rect() {
    return { x: 0, y: 0, width: this.width, height: this.height };
  }

  touch(rect) {
    this.version += 1;
    this.changed = union(this.changed, rect);
  }

  /** The rectangle that changed since the last call, or null. */
  takeChanged() {
    const rect = this.changed;
    this.changed = null;
    return rect;
  }

  /** The values of a rectangle, row by row. */
  copy(rect) {
    const found = new Uint8Array(rect.width * rect.height);
    for (let y = 0; y < rect.height; y++) {
      const start = (rect.y + y) * this.width + rect.x;
      found.set(this.data.subarray(start, start + rect.width), y * rect.width);
    }
    return found;
  }

  put(rect, values) {
    for (let y = 0; y < rect.height; y++) {
      this.data.set(values.subarray(y * rect.width, (y + 1) * rect.width), (rect.y + y) * this.width + rect.x);
    }
    this.touch(rect);
  }

  /** Change all of it by a function of each value, and return the entry for the history. */
  change(of) {
    const entry = patch(this, this.rect, this.data.slice());
    const table = Uint8Array.from({ length: 256 }, (_, value) => of(value));
    for (let i = 0; i < this.data.length; i++) this.data[i] = table[this.data[i]];
    this.touch(this.rect);
    return entry;
  }

  /** The share that is painted, 0 to 1, grey counted as a part. */
  share() {
    let sum = 0;
    for (let i = 0; i < this.data.length; i++) sum += this.data[i];
    return sum / (255 * this.data.length);
  }

  /**
   * Paint from a to b, each {x, y, radius} in pixels. Full coverage within (1 - softness) of the radius, none outside of
   * it; an edge is never sharper than one pixel. Painting keeps the larger value, so a stroke that crosses itself is no
   * stronger there; erasing keeps the smaller one. Returns the rectangle changed, or null.
   */
  paint(a, b, softness, erase) {
    const length = Math.hypot(b.x - a.x, b.y - a.y);
    // a long diagonal is painted in pieces, whose rectangles have far fewer pixels than that around all of it
    const pieces = Math.max(1, Math.ceil(length / Math.max(4 * Math.max(a.radius, b.radius), 64)));
    let touched = null;
    let from = a;
    for (let i = 1; i <= pieces; i++) {
      const to = between(a, b, i / pieces);
      touched = union(touched, this.#piece(from, to, softness, erase));
      from = to;
    }
    if (touched) this.touch(touched);
    return touched;
  }

  #piece(a, b, softness, erase) {
    const reach = Math.max(a.radius, b.radius) + 0.5;
    const left = Math.min(a.x, b.x) - reach;
    const top = Math.min(a.y, b.y) - reach;
    const around = { x: left, y: top, width: Math.abs(b.x - a.x) + 2 * reach, height: Math.abs(b.y - a.y) + 2 * reach };
    const rect = clipped(around, this.width, this.height);
    if (!rect) return null;
    const dx = b.x - a.x;
    const dy = b.y - a.y;
    const squared = dx * dx + dy * dy;
    const done = erase ? 0 : 255; // most of a stroke lies on what its last piece has painted
    for (let y = rect.y; y < rect.y + rect.height; y++) {
      const py = y + 0.5 - a.y;
      let i = y * this.width + rect.x;
      for (let x = rect.x; x < rect.x + rect.width; x++, i++) {
        if (this.data[i] === done) continue;
        const px = x + 0.5 - a.x;
        const t = squared > 0 ? clamp((px * dx + py * dy) / squared, 0, 1) : 0;
        const ex = px - t * dx;
        const ey = py - t * dy;
        const distance = ex * ex + ey * ey;
        if (distance >= reach * reach) continue;
        const radius = a.radius + (b.radius - a.radius) * t;
        const edge = Math.max(radius * softness, 1);
        const cover = clamp((radius + 0.5 - Math.sqrt(distance)) / edge, 0, 1);
        // a soft edge has no kink where it begins and ends
        const value = Math.round(255 * (softness > 0 ? cover * cover * (3 - 2 * cover) : cover));
        if (erase) {
          if (255 - value < this.data[i]) this.data[i] = 255 - value;
        } else if (value > this.data[i]) {
          this.data[i] = value;
        }
      }
    }
    return rect;
  }
}

const between = (a, b, t) => ({
  x: a.x + (b.x - a.x) * t,
  y: a.y + (b.y - a.y) * t,
  radius: a.radius + (b.radius - a.radius) * t,
});

/** An entry of the history: these were the values of a rectangle of a surface. */
function patch(surface, rect, before) {
  let kept = before;
  return {
    bytes: before.length,
    swap() {
      const present = surface.copy(rect);
      surface.put(rect, kept);
      kept = present;
    },
  };
}

const THINNEST = 0.15; // of the brush's radius, with the lightest pressure

/** One stroke of a brush {size (diameter in pixels), softness (0 to 1), erase}. */
export class Stroke {
  constructor(surface, brush) {
    this.surface = surface;
    this.brush = { ...brush };
    this.before = surface.data.slice();
    this.touched = null;
    this.last = null;
  }

  /** Paint up to this point of the image. pressure   0 to 1; 1 is the size of the brush */
  to(x, y, pressure = 1) {
    const point = { x, y, radius: (this.brush.size / 2) * (THINNEST + (1 - THINNEST) * clamp(pressure, 0, 1)) };
    const touched = this.surface.paint(this.last ?? point, point, this.brush.softness, this.brush.erase);
    this.touched = union(this.touched, touched);
    this.last = point;
  }

  /** End it. Returns the entry for the history, or null if no pixel was reached. */
  finish() {
    return this.touched && patch(this.surface, this.touched, this.#beforeIn(this.touched));
  }

  /** Take it back. */
  cancel() {
    if (this.touched) this.surface.put(this.touched, this.#beforeIn(this.touched));
    this.touched = null;
  }

  #beforeIn(rect) {
    const whole = new Surface(0, 0);
    Object.assign(whole, { width: this.surface.width, height: this.surface.height, data: this.before });
    return whole.copy(rect);
  }
}

/**
 * The mask of an image in a frame: the surface where the image is, white around it, and a ramp from white to black over
 * `overlap` pixels inwards from each side that the frame extends. Without a frame, the values of the surface.
 */
export function framedMask(surface, frame, overlap) {
  const { width, height } = surface;
  const wide = width + frame.left + frame.right;
  const high = height + frame.top + frame.bottom;
  const found = new Surface(wide, high);
  found.data.fill(255);
  found.put({ x: frame.left, y: frame.top, width, height }, surface.data);
  const ramp = (distance) => (distance < overlap ? Math.round(255 * (1 - (distance + 0.5) / overlap)) : 0);
  const across = Array.from({ length: width }, (_, x) =>
    Math.max(frame.left ? ramp(x) : 0, frame.right ? ramp(width - 1 - x) : 0),
  );
  for (let y = 0; y < height; y++) {
    const down = Math.max(frame.top ? ramp(y) : 0, frame.bottom ? ramp(height - 1 - y) : 0);
    const row = (y + frame.top) * wide + frame.left;
    for (let x = 0; x < width; x++) {
      const least = Math.max(across[x], down);
      if (least > found.data[row + x]) found.data[row + x] = least;
    }
  }
  return found;
}
