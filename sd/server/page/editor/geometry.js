// Where the image is on the screen, and how far the frame around it is dragged. No DOM in here.
// Image coordinates are in pixels of the image, (0, 0) its top left corner; screen coordinates are CSS pixels in the canvas.

export const UNIT = 8; // the frame grows in steps of this: a model's images have such sides
export const LONGEST = 4096; // pixels of a side of the frame; the server takes no larger images
const CLOSEST = 64; // CSS pixels for a pixel of the image, at most
const FARTHEST = 1 / 64;

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** The part of the rectangle {x, y, width, height} of whole pixels inside of an image; null if there is none. */
export function clipped(rect, width, height) {
  const x = clamp(Math.floor(rect.x), 0, width);
  const y = clamp(Math.floor(rect.y), 0, height);
  const right = clamp(Math.ceil(rect.x + rect.width), 0, width);
  const bottom = clamp(Math.ceil(rect.y + rect.height), 0, height);
  return right > x && bottom > y ? { x, y, width: right - x, height: bottom - y } : null;
}

/** The smallest rectangle around both; either may be null. */
export function union(a, b) {
  if (!a || !b) return a || b;
  const x = Math.min(a.x, b.x);
  const y = Math.min(a.y, b.y);
  return {
    x,
    y,
    width: Math.max(a.x + a.width, b.x + b.width) - x,
    height: Math.max(a.y + a.height, b.y + b.height) - y,
  };
}

/** The map from image to screen coordinates: screen = image * scale + (x, y). */
export class View {
  constructor() {
    this.scale = 1;
    this.x = 0;
    this.y = 0;
  }

  toImage(x, y) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }

  toScreen(x, y) {
    return { x: x * this.scale + this.x, y: y * this.scale + this.y };
  }

  /** Show all of a rectangle of the image in the middle of a canvas of this size. */
  fit(rect, width, height, padding = 0) {
    const wide = Math.max(width - 2 * padding, 1);
    const high = Math.max(height - 2 * padding, 1);
    this.scale = clamp(Math.min(wide / rect.width, high / rect.height), FARTHEST, CLOSEST);
    this.x = width / 2 - (rect.x + rect.width / 2) * this.scale;
    this.y = height / 2 - (rect.y + rect.height / 2) * this.scale;
  }

  /** Zoom by a factor; the point of the image at the screen point (x, y) stays there. */
  zoomAt(x, y, factor) {
    const at = this.toImage(x, y);
    this.scale = clamp(this.scale * factor, FARTHEST, CLOSEST);
    this.x = x - at.x * this.scale;
    this.y = y - at.y * this.scale;
  }

  panBy(dx, dy) {
    this.x += dx;
    this.y += dy;
  }

  /** Two fingers moved from screen points `from` to `to`, each a pair: zoom by their distance, pan by their middle. */
  pinch(from, to) {
    const middle = ([a, b]) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
    const distance = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y);
    const before = middle(from);
    const after = middle(to);
    this.panBy(after.x - before.x, after.y - before.y);
    if (distance(from) > 0 && distance(to) > 0) this.zoomAt(after.x, after.y, distance(to) / distance(from));
  }

  /** Keep at least `least` CSS pixels of a rectangle of the image within a canvas of this size. */
  keepInside(rect, width, height, least = 32) {
    const start = this.toScreen(rect.x, rect.y);
    const end = this.toScreen(rect.x + rect.width, rect.y + rect.height);
    this.x += clamp(0, least - end.x, width - least - start.x);
    this.y += clamp(0, least - end.y, height - least - start.y);
  }

  /** Move as little as needed so that a point of the image is at least `padding` from the edges of the canvas. */
  reveal(point, width, height, padding) {
    const at = this.toScreen(point.x, point.y);
    this.x += clamp(at.x, padding, Math.max(width - padding, padding)) - at.x;
    this.y += clamp(at.y, padding, Math.max(height - padding, padding)) - at.y;
  }

  /** Whether all of a rectangle of the image is visible. */
  shows(rect, width, height) {
    const start = this.toScreen(rect.x, rect.y);
    const end = this.toScreen(rect.x + rect.width, rect.y + rect.height);
    return start.x >= 0 && start.y >= 0 && end.x <= width && end.y <= height;
  }
}

// The frame {left, top, right, bottom}: how many pixels it reaches beyond the image on each side, multiples of UNIT.

export const NO_FRAME = Object.freeze({ left: 0, top: 0, right: 0, bottom: 0 });
export const SIDES = Object.freeze(["left", "top", "right", "bottom"]);

/** The rectangle of the frame around an image of this size. */
export function frameRect(frame, width, height) {
  return {
    x: -frame.left,
    y: -frame.top,
    width: width + frame.left + frame.right,
    height: height + frame.top + frame.bottom,
  };
}

/** A frame with its sides rounded to multiples of UNIT, none inside of the image, and not above LONGEST in all. */
export function snapped(frame, width, height) {
  const length = (value, most) => clamp(Math.round((Number(value) || 0) / UNIT) * UNIT, 0, most);
  // an image that is longer than LONGEST already leaves less for its other side
  const room = (side, other) =>
    Math.max(Math.floor((LONGEST * Math.min(1, LONGEST / other) - side) / UNIT) * UNIT, 0);
  const wide = room(width, height);
  const high = room(height, width);
  const left = length(frame.left, wide);
  const top = length(frame.top, high);
  return {
    left,
    top,
    right: length(frame.right, wide - left),
    bottom: length(frame.bottom, high - top),
  };
}

/** Whether a frame is larger than the image. */
export const isExtended = (frame) => SIDES.some((side) => frame[side] > 0);

/** The sides of the frame that a drag from the screen point (x, y) moves: one, two at a corner, or none. */
export function sidesAt(frame, width, height, view, x, y, reach) {
  const rect = frameRect(frame, width, height);
  const start = view.toScreen(rect.x, rect.y);
  const end = view.toScreen(rect.x + rect.width, rect.y + rect.height);
  if (x < start.x - reach || x > end.x + reach || y < start.y - reach || y > end.y + reach) return [];
  const sides = [];
  // of two sides within reach, in a very small image, the nearer one
  if (Math.min(Math.abs(x - start.x), Math.abs(x - end.x)) <= reach) {
    sides.push(Math.abs(x - start.x) < Math.abs(x - end.x) ? "left" : "right");
  }
  if (Math.min(Math.abs(y - start.y), Math.abs(y - end.y)) <= reach) {
    sides.push(Math.abs(y - start.y) < Math.abs(y - end.y) ? "top" : "bottom");
  }
  return sides;
}

/** The frame after a drag of these sides by (dx, dy) pixels of the image. */
export function dragged(frame, sides, dx, dy, width, height) {
  const moved = { ...frame };
  const outwards = { left: -dx, right: dx, top: -dy, bottom: dy };
  for (const side of sides) moved[side] = Math.max(frame[side] + outwards[side], 0);
  return snapped(moved, width, height);
}
