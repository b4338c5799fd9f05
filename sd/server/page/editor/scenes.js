// What the editor shows and keeps: the image to edit with its mask and frame, and the sketch of a hint.

import { NO_FRAME, SIDES, clamp, frameRect, isExtended, snapped } from "./geometry.js";
import { History, replacement } from "./history.js";
import { Encoded, GREY, INVERTED, Layer, canvasOf, drawExtended, drawn, palette, reduced } from "./pictures.js";
import { Surface, framedMask } from "./surface.js";

const TINT = [255, 45, 110]; // of the mask over the image
const TINTED = 0.6;
const SMALL = 1536; // pixels: a larger picture is shown by a reduced one, while all of it is seen
const MASK = palette((value) => [...TINT, value * TINTED]);
const PLAIN = `rgb(${TINT.join(" ")} / ${TINTED})`;

/** The image to edit. mode is "img2img", "inpaint" or "outpaint". */
export class PictureScene {
  mode = "img2img";
  frame = NO_FRAME;
  fill = "edges"; // of the part outside of the image: its edge pixels, or "transparent"
  overlap = 0; // pixels of the soft edge of that part's mask inside of the image
  showsResult = false;
  #result = null; // a picture that was generated from this one
  #resultKey = ""; // and from which state of it
  #image = new Encoded();
  #mask = new Encoded();
  #small = null; // {of: the picture, canvas: reduced}
  #strokes = new History();
  #frames = new History();
  #adopted = 0; // pictures that were results

  constructor(picture, transparent) {
    this.picture = picture;
    this.mask = transparent ?? new Surface(picture.width, picture.height);
    this.layer = new Layer(this.mask, MASK);
    const side = Math.min(picture.width, picture.height);
    this.brushSize = clamp(side / 8, 2, 64);
    this.overlap = Math.round(clamp(side / 8, 1, 32));
  }

  get width() {
    return this.picture.width;
  }

  get height() {
    return this.picture.height;
  }

  /** What is undone now: of the frame while it is shown, and of the mask. */
  get history() {
    return this.mode === "outpaint" ? this.#frames : this.#strokes;
  }

  /** What a brush paints on now, or null. */
  get surface() {
    return this.mode === "inpaint" && !this.seesResult ? this.mask : null;
  }

  /** The picture that was generated from the image in its present frame, or null. */
  get result() {
    return this.#resultKey === this.#imageKey ? this.#result : null;
  }

  set result(picture) {
    this.#result = picture;
    this.#resultKey = this.#imageKey;
  }

  get seesResult() {
    return this.showsResult && this.result !== null;
  }

  get activeFrame() {
    return this.mode === "outpaint" ? this.frame : NO_FRAME;
  }

  get rect() {
    return frameRect(this.activeFrame, this.width, this.height);
  }

  /** Change the frame, by a drag from `before` or at once; the history remembers it. */
  setFrame(frame, before = this.frame) {
    this.frame = snapped(frame, this.width, this.height);
    const same = JSON.stringify(this.frame) === JSON.stringify(before);
    if (!same) this.history.add(replacement(before, () => this.frame, (kept) => (this.frame = kept)));
    return !same;
  }

  /** Edit the result, which has the size of the image; the history remembers the image. */
  adopt() {
    const get = () => this.picture;
    const set = (picture) => {
      this.picture = picture;
      this.#adopted += 1;
    };
    this.history.add(replacement(this.picture, get, set, 4 * this.width * this.height));
    set(this.result);
    this.#result = null;
    this.showsResult = false;
  }

  draw(context, stage) {
    if (this.seesResult) {
      // a result may be larger or smaller; it is shown in the place of what it was made from
      const { x, y, width, height } = this.rect;
      context.drawImage(this.result, x, y, width, height);
      return;
    }
    const shown = this.#shownAt(stage.view.scale * stage.density);
    if (this.fill === "edges") drawExtended(context, this.picture, this.activeFrame, shown);
    else context.drawImage(shown, 0, 0, this.width, this.height);
    if (this.mode === "img2img") return;
    this.layer.update();
    context.drawImage(this.layer.canvas, 0, 0);
    if (this.mode === "outpaint") this.#drawFrame(context, 1 / stage.view.scale);
  }

  /** The picture, or a reduced one that is as good at this scale and takes less time to draw. */
  #shownAt(scale) {
    if (this.#small?.of !== this.picture) this.#small = { of: this.picture, canvas: reduced(this.picture, SMALL) };
    const { canvas } = this.#small;
    return scale <= canvas.width / this.width ? canvas : this.picture;
  }

  #drawFrame(context, px) {
    const { x, y, width, height } = this.rect;
    context.fillStyle = PLAIN;
    context.beginPath();
    context.rect(x, y, width, height);
    context.rect(0, 0, this.width, this.height);
    context.fill("evenodd");
    this.#drawRamps(context);
    const outline = (x0, y0, wide, high) => {
      for (const [colour, line] of [["rgb(0 0 0 / 60%)", 3], ["#fff", 1]]) {
        context.strokeStyle = colour;
        context.lineWidth = line * px;
        context.strokeRect(x0, y0, wide, high);
      }
    };
    outline(x, y, width, height);
    const grip = 10 * px;
    for (const gx of [x, x + width / 2, x + width]) {
      for (const gy of [y, y + height / 2, y + height]) {
        if (gx === x + width / 2 && gy === y + height / 2) continue;
        context.fillStyle = "#fff";
        context.fillRect(gx - grip / 2, gy - grip / 2, grip, grip);
        outline(gx - grip / 2, gy - grip / 2, grip, grip);
      }
    }
  }

  /** The soft overlap, as `framedMask` has it: in a corner, the nearer side counts. */
  #drawRamps(context) {
    const { width, height, overlap, frame } = this;
    if (!overlap) return;
    const inner = { left: frame.left && overlap, top: frame.top && overlap };
    inner.right = width - (frame.right && overlap);
    inner.bottom = height - (frame.bottom && overlap);
    const corners = { left: 0, top: 0, right: width, bottom: height };
    const ends = {
      left: [0, 0, overlap, 0],
      right: [width, 0, width - overlap, 0],
      top: [0, 0, 0, overlap],
      bottom: [0, height, 0, height - overlap],
    };
    const along = { left: ["top", "bottom"], right: ["top", "bottom"], top: ["left", "right"], bottom: ["left", "right"] };
    for (const side of SIDES) {
      if (!frame[side]) continue;
      const isAcross = side === "left" || side === "right";
      const [first, last] = along[side];
      const outer = corners[side];
      const deep = inner[side];
      const path = [
        [outer, corners[first]],
        [deep, inner[first]],
        [deep, inner[last]],
        [outer, corners[last]],
      ];
      const gradient = context.createLinearGradient(...ends[side]);
      gradient.addColorStop(0, PLAIN);
      gradient.addColorStop(1, `rgb(${TINT.join(" ")} / 0)`);
      context.fillStyle = gradient;
      context.beginPath();
      for (const [depth, length] of path) context.lineTo(...(isAcross ? [depth, length] : [length, depth]));
      context.fill();
    }
  }

  get #imageKey() {
    const frame = this.activeFrame;
    return JSON.stringify([this.#adopted, isExtended(frame) && [frame, this.fill]]);
  }

  get #maskKey() {
    const frame = this.activeFrame;
    return JSON.stringify([this.mask.version, frame, isExtended(frame) && this.overlap]);
  }

  #renderImage() {
    const frame = this.activeFrame;
    if (!isExtended(frame)) return this.picture;
    const { width, height } = this.rect;
    const canvas = canvasOf(width, height, { alpha: this.fill === "transparent" });
    const context = canvas.getContext("2d");
    context.translate(frame.left, frame.top);
    if (this.fill === "edges") drawExtended(context, this.picture, frame);
    else context.drawImage(this.picture, 0, 0);
    return canvas;
  }

  #renderMask() {
    const frame = this.activeFrame;
    return drawn(isExtended(frame) ? framedMask(this.mask, frame, this.overlap) : this.mask, GREY);
  }

  /** The image, in its frame, as a data URL. */
  imageUrl() {
    return this.#image.get(this.#imageKey, () => this.#renderImage());
  }

  /** The mask, of the same size, as a data URL. */
  maskUrl() {
    return this.#mask.get(this.#maskKey, () => this.#renderMask());
  }

  /** Make the data URLs in the background. */
  async prepare() {
    await this.#image.prepare(this.#imageKey, () => this.#renderImage());
    if (this.mode !== "img2img") await this.#mask.prepare(this.#maskKey, () => this.#renderMask());
  }
}

/** A hint for a control network: lines that are drawn here, or a picture. */
export class HintScene {
  source = "sketch"; // or "picture"
  #picture = null;
  #pictureNumber = 0;
  isDarkOnLight = false; // black lines on white paper
  under = null; // a picture to trace, shown faintly
  #url = new Encoded();

  constructor(width, height) {
    this.lines = new Surface(width, height);
    this.layer = new Layer(this.lines, GREY);
    this.history = new History();
    this.brushSize = Math.max(Math.min(width, height) / 64, 1);
  }

  get width() {
    return this.#shown?.width ?? this.lines.width;
  }

  get height() {
    return this.#shown?.height ?? this.lines.height;
  }

  get #shown() {
    return this.source === "picture" ? this.#picture : null;
  }

  get surface() {
    return this.source === "sketch" ? this.lines : null;
  }

  get rect() {
    return { x: 0, y: 0, width: this.width, height: this.height };
  }

  get picture() {
    return this.#picture;
  }

  set picture(canvas) {
    this.#picture = canvas;
    this.#pictureNumber += 1;
  }

  /** Whether nothing has been drawn. */
  get isEmpty() {
    return this.lines.version === 0 || this.lines.data.every((value) => value === 0);
  }

  set paper(isDarkOnLight) {
    this.isDarkOnLight = isDarkOnLight;
    this.layer.recolour(isDarkOnLight ? INVERTED : GREY);
  }

  draw(context) {
    if (this.source === "picture") {
      if (this.#picture) context.drawImage(this.#picture, 0, 0);
      return;
    }
    this.layer.update();
    context.drawImage(this.layer.canvas, 0, 0);
    if (!this.under) return;
    context.globalAlpha = 0.35;
    context.drawImage(this.under, 0, 0, this.width, this.height);
    context.globalAlpha = 1;
  }

  get #key() {
    return JSON.stringify(
      this.source === "picture" ? [this.#pictureNumber] : [this.lines.version, this.isDarkOnLight, this.width],
    );
  }

  #render() {
    return this.source === "picture" ? this.#picture : drawn(this.lines, this.isDarkOnLight ? INVERTED : GREY);
  }

  /** The hint as a data URL; null while there is none: nothing drawn, or no picture chosen. */
  url() {
    if (this.source === "picture" ? !this.#picture : this.isEmpty) return null;
    return this.#url.get(this.#key, () => this.#render());
  }

  /** Make the data URL in the background. */
  async prepare() {
    if (this.source === "sketch" || this.#picture) await this.#url.prepare(this.#key, () => this.#render());
  }
}
