// The canvas on which an image or sketch is shown: sharp on screens of any density, drawn at most once for each frame.

import { View } from "./geometry.js";

const PADDING = 16; // CSS pixels around an image that fits
const SQUARE = 8; // CSS pixels of the pattern under transparent parts

/**
 * A scene has `rect` (what is shown, in image coordinates) and `draw(context, stage)`, called with the context in image
 * coordinates.
 */
export class Stage {
  #scene = null;
  #requested = false;
  #pattern = null;
  #fitted = true; // nobody has zoomed or panned: a new size is fitted again

  constructor(canvas) {
    this.canvas = canvas;
    this.view = new View();
    this.width = 0; // CSS pixels
    this.height = 0;
    this.density = 1;
    this.cursor = null; // {x, y (image coordinates), size, softness, erase, strong}
    new ResizeObserver((entries) => this.#resized(entries.at(-1))).observe(canvas);
    this.#watchDensity();
  }

  get scene() {
    return this.#scene;
  }

  set scene(scene) {
    this.#scene = scene;
    this.fit();
  }

  /** Show all of the scene. */
  fit() {
    this.#fitted = true;
    if (this.#scene && this.width) this.view.fit(this.#scene.rect, this.width, this.height, PADDING);
    this.request();
  }

  zoom(x, y, factor) {
    this.#moved(() => this.view.zoomAt(x, y, factor));
  }

  zoomMiddle(factor) {
    this.zoom(this.width / 2, this.height / 2, factor);
  }

  pan(dx, dy) {
    this.#moved(() => this.view.panBy(dx, dy));
  }

  pinch(from, to) {
    this.#moved(() => this.view.pinch(from, to));
  }

  reveal(point) {
    this.#moved(() => this.view.reveal(point, this.width, this.height, PADDING));
  }

  /** Fit the scene again if a part of it is out of sight. */
  fitIfHidden() {
    if (!this.view.shows(this.#scene.rect, this.width, this.height)) this.fit();
  }

  #moved(change) {
    if (!this.#scene || !this.width) return;
    change();
    this.view.keepInside(this.#scene.rect, this.width, this.height);
    this.#fitted = false;
    this.request();
  }

  /** Draw in the next frame. */
  request() {
    if (this.#requested) return;
    this.#requested = true;
    requestAnimationFrame(() => {
      this.#requested = false;
      this.#draw();
    });
  }

  #watchDensity() {
    // the density changes with the zoom of the page, or when the window moves to another screen
    matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener(
      "change",
      () => {
        this.#resized();
        this.#watchDensity();
      },
      { once: true },
    );
  }

  #resized(entry) {
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width || !height) return; // hidden
    // the exact number of the screen's pixels, where the browser knows it: it rounds in ways that are its own
    const exact = entry?.devicePixelContentBoxSize?.[0];
    const pixels = (length, known) => {
      const rounded = Math.round(length * devicePixelRatio);
      return Math.abs(known - rounded) <= 1 ? known : rounded; // a density that is only emulated is unknown to it
    };
    const wide = pixels(width, exact?.inlineSize);
    const high = pixels(height, exact?.blockSize);
    const before = [this.width, this.height];
    [this.width, this.height, this.density] = [width, height, wide / width];
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      this.canvas.width = wide;
      this.canvas.height = high;
    }
    if (this.#fitted || !before[0]) this.fit();
    else this.pan((width - before[0]) / 2, (height - before[1]) / 2);
    this.#draw(); // at once: a canvas of a new size is empty
  }

  #draw() {
    const context = this.canvas.getContext("2d");
    const { density, view } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.#scene) return;
    const rect = this.#scene.rect;
    const start = view.toScreen(rect.x, rect.y);
    context.scale(density, density);
    context.fillStyle = this.#checks(context);
    context.fillRect(start.x, start.y, rect.width * view.scale, rect.height * view.scale);
    context.translate(view.x, view.y);
    context.scale(view.scale, view.scale);
    // pixels are seen as such from near, and averaged from far
    context.imageSmoothingEnabled = view.scale * density < 2;
    context.imageSmoothingQuality = "low";
    this.#scene.draw(context, this);
    if (this.cursor) this.#drawCursor(context);
  }

  #checks(context) {
    if (!this.#pattern) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 2 * SQUARE;
      const squares = tile.getContext("2d");
      for (const [colour, x, y] of [["#9a9a9a", 0, 0], ["#c4c4c4", 1, 0], ["#c4c4c4", 0, 1], ["#9a9a9a", 1, 1]]) {
        squares.fillStyle = colour;
        squares.fillRect(x * SQUARE, y * SQUARE, SQUARE, SQUARE);
      }
      this.#pattern = context.createPattern(tile, "repeat");
    }
    return this.#pattern;
  }

  #drawCursor(context) {
    const { x, y, size, softness, erase, strong } = this.cursor;
    const px = 1 / this.view.scale; // a CSS pixel
    const ring = (radius, dash) => {
      context.setLineDash(dash);
      context.beginPath();
      context.arc(x, y, Math.max(radius, px), 0, 2 * Math.PI);
      for (const [colour, wide] of [["rgb(0 0 0 / 70%)", strong ? 4 : 3], ["#fff", strong ? 2 : 1]]) {
        context.strokeStyle = colour;
        context.lineWidth = wide * px;
        context.stroke();
      }
    };
    ring(size / 2, erase ? [4 * px, 3 * px] : []);
    if (softness > 0.05) ring((size / 2) * (1 - softness / 2), [2 * px, 4 * px]); // where half is painted
    context.setLineDash([]);
    const arm = 5 * px;
    if (strong || size * this.view.scale < 8) {
      context.strokeStyle = "#fff";
      context.lineWidth = px;
      context.beginPath();
      context.moveTo(x - arm, y);
      context.lineTo(x + arm, y);
      context.moveTo(x, y - arm);
      context.lineTo(x, y + arm);
      context.stroke();
    }
  }
}
