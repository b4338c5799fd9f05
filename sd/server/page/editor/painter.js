// The brush: strokes of a pointer or of the keyboard on the surface of the scene that is shown.

import { clamp } from "./geometry.js";
import { Stroke } from "./surface.js";

const LARGEST = 512; // pixels, of a brush
const BUDGET = 8; // milliseconds of a frame for painting: what is left waits for the next one

export class Painter {
  #stage;
  #painted;
  #stroke = null;
  #history = null; // of the surface that the stroke is on
  #waiting = []; // points that are painted before the next frame
  #scheduled = false;
  #isByKey = false; // whether the stroke is the keyboard's
  #key = null; // {x, y}: where the keyboard's cursor is, in the image

  /** painted   called after each stroke */
  constructor(stage, painted) {
    this.#stage = stage;
    this.#painted = painted;
    this.brush = { size: 32, softness: 0.2, erase: false };
  }

  get isPainting() {
    return this.#stroke !== null;
  }

  /** Whether the keyboard moves the brush now, so that its cursor is shown. */
  get hasKeyCursor() {
    return this.#key !== null;
  }

  /** Suit an image of this size: the largest brush that is useful there, and the size to begin with. */
  suit(width, height, size) {
    this.largest = clamp(Math.min(width, height), 16, LARGEST);
    this.brush.size = clamp(Math.round(size), 1, this.largest);
  }

  /** One size up (1) or down (-1). */
  resize(direction) {
    const size = this.brush.size;
    const next = direction > 0 ? Math.max(size + 1, Math.round(size * 1.15)) : Math.min(size - 1, Math.round(size / 1.15));
    this.brush.size = clamp(next, 1, this.largest);
    this.#showKey();
  }

  /** Begin a stroke at a point of the canvas. erase   whatever the brush does otherwise, as with a pen's eraser */
  press(point, erase = false) {
    this.#key = null;
    this.#begin(erase);
    this.move([point]);
  }

  #begin(erase) {
    const scene = this.#stage.scene;
    this.release(); // the keyboard's, if it paints meanwhile
    this.#history = scene.history;
    this.#isByKey = false;
    this.#stroke = new Stroke(scene.surface, { ...this.brush, erase: erase || this.brush.erase });
  }

  /** Go on to these points {x, y, pressure} of the canvas. */
  move(points) {
    if (!this.#stroke) return;
    for (const { x, y, pressure } of points) this.#waiting.push({ ...this.#stage.view.toImage(x, y), pressure });
    this.hover(points.at(-1));
    this.#schedule();
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      this.#paint(BUDGET);
      if (this.#waiting.length) this.#schedule();
    });
  }

  /** Paint what waits, for so many milliseconds; at least one point. */
  #paint(budget = Infinity) {
    const end = performance.now() + budget;
    let taken = 0;
    do {
      const point = this.#waiting[taken++];
      if (point) this.#stroke?.to(point.x, point.y, point.pressure);
    } while (taken < this.#waiting.length && performance.now() < end);
    this.#waiting.splice(0, taken);
    this.#stage.request();
  }

  release() {
    if (!this.#stroke) return;
    this.#paint();
    const entry = this.#stroke.finish();
    this.#stroke = null;
    if (entry) {
      this.#history.add(entry);
      this.#painted();
    }
  }

  cancel() {
    this.#waiting = [];
    this.#stroke?.cancel();
    this.#stroke = null;
    this.#stage.request();
  }

  /** Show the brush at a point of the canvas, or nowhere. */
  hover(point) {
    this.#key = null;
    const at = point && this.#stage.scene?.surface ? this.#stage.view.toImage(point.x, point.y) : null;
    this.#stage.cursor = at && { ...at, ...this.brush };
    this.#stage.request();
  }

  /** Show the keyboard's cursor: where it was, or in the middle. */
  showKeyCursor() {
    const scene = this.#stage.scene;
    if (!scene?.surface || this.#key) return;
    const { x, y } = this.#stage.cursor ?? this.#stage.view.toImage(this.#stage.width / 2, this.#stage.height / 2);
    this.#key = { x: clamp(Math.floor(x) + 0.5, 0.5, scene.width), y: clamp(Math.floor(y) + 0.5, 0.5, scene.height) };
    this.#showKey();
  }

  /** Hide it, and end its stroke. */
  hideKeyCursor() {
    this.releaseKey();
    if (this.#key) this.hover(null);
  }

  /** Move it by steps of a quarter of the brush, or by one pixel; a stroke goes with it. Returns where it is. */
  moveKeyCursor(dx, dy, isFine) {
    const scene = this.#stage.scene;
    this.showKeyCursor();
    if (!this.#key) return null;
    const step = isFine ? 1 : Math.max(1, Math.round(this.brush.size / 4));
    this.#key = {
      x: clamp(this.#key.x + dx * step, 0.5, scene.width - 0.5),
      y: clamp(this.#key.y + dy * step, 0.5, scene.height - 0.5),
    };
    if (this.#isByKey) this.#stroke?.to(this.#key.x, this.#key.y);
    this.#stage.reveal(this.#key);
    this.#showKey();
    return this.#key;
  }

  /** Begin a stroke at the keyboard's cursor. */
  pressKey() {
    if (!this.#key || this.#stroke) return;
    this.#begin(false);
    this.#isByKey = true;
    this.#stroke.to(this.#key.x, this.#key.y);
    this.#showKey();
  }

  /** End the keyboard's stroke, if there is one. */
  releaseKey() {
    if (this.#isByKey) this.release();
  }

  /** Show the brush as it is now. */
  show() {
    this.#showKey();
  }

  #showKey() {
    if (this.#key) this.#stage.cursor = { ...this.#key, ...this.brush, strong: true };
    else if (this.#stage.cursor) Object.assign(this.#stage.cursor, this.brush);
    this.#stage.request();
  }
}
