// The place to edit an image: image to image, a mask brush, a frame for outpainting, and sketches for control networks.
//
//     geometry.js   coordinates, and the frame          history.js   undo and redo
//     surface.js    masks and lines as bytes            pictures.js  images as canvases and data URLs
//     scenes.js     what is edited, and how it is shown stage.js     the canvas
//     painter.js    the brush                           hand.js      pointers (pointers.js) and keys
//     toolbar.js, settings.js, hints.js, help.js        the controls, from the elements of dom.js

import { button, el, fileButton, imageIn, segments } from "./dom.js";
import { isExtended } from "./geometry.js";
import { Hand } from "./hand.js";
import { keyHelp } from "./help.js";
import { Hints } from "./hints.js";
import { Painter } from "./painter.js";
import { readPicture } from "./pictures.js";
import { PictureScene } from "./scenes.js";
import { FrameSettings, InpaintSettings } from "./settings.js";
import { Stage } from "./stage.js";
import { Toolbar } from "./toolbar.js";

const MODES = [["img2img", "Image to image"], ["inpaint", "Inpaint"], ["outpaint", "Outpaint"], ["sketch", "Sketch"]];
const PREPARE_AFTER = 400; // milliseconds without a change, until the data URLs are made in the background

export class Editor extends EventTarget {
  #tab = "img2img";
  #picture = null; // PictureScene
  #size = [512, 512]; // of a sketch without an image
  #timer = 0;
  #setting = 0; // number of the last call of setImage or setResult: an older one that takes longer is dropped
  #parts;

  constructor(root) {
    super();
    this.root = root;
    this.#build();
    this.#listen();
    this.#show();
  }

  /** Edit an image: a Blob, or a URL of this site, data: or blob:. Throws an Error for one that cannot be read. */
  async setImage(blobOrUrl) {
    const number = ++this.#setting;
    const { canvas, transparent, note } = await readPicture(blobOrUrl);
    if (number !== this.#setting) return;
    if (transparent && this.#tab === "img2img") this.#tab = "inpaint";
    if (this.#tab === "sketch") this.#tab = "img2img";
    this.#say([note, transparent ? "The transparent part is the mask." : ""].filter(Boolean).join(" "));
    this.#edit(new PictureScene(canvas, transparent));
  }

  #edit(scene) {
    scene.fill = this.#picture?.fill ?? scene.fill;
    scene.mode = this.#tab;
    this.#picture = scene;
    this.#show();
    this.#changed();
  }

  /**
   * Have a result to compare with, a Blob or URL; null for none. It is no part of `value()`. Nothing happens if the image
   * or its frame is not the one any more that it was made from. value   what `value()` was then
   */
  async setResult(blobOrUrl, value = null) {
    const scene = this.#picture;
    if (!scene) return;
    const result = blobOrUrl === null ? null : (await readPicture(blobOrUrl)).canvas;
    if (scene !== this.#picture || (value && value.image !== scene.imageUrl())) return;
    scene.result = result;
    scene.showsResult &&= result !== null;
    this.#show();
  }

  /** Remove the image, its mask and frame. The hints stay. */
  clear() {
    this.#setting += 1;
    this.#picture = null;
    if (this.#tab !== "sketch") this.#tab = "img2img";
    this.#say("");
    this.#show();
    this.#changed();
  }

  /** The kind of request that `value()` is for, or null; unlike it, this takes no time. */
  get kind() {
    const scene = this.#picture;
    return scene && (scene.mode === "img2img" ? "img2img" : "inpaint");
  }

  /**
   * What goes into a request: null without an image; {kind: "img2img", image}; or {kind: "inpaint", image, mask, content,
   * blur, margin}. Images are data URLs (PNG); the mask has the image's size, and 255 (white) is generated.
   */
  value() {
    const scene = this.#picture;
    if (!scene) return null;
    this.#parts.painter.release(); // a stroke that has not ended counts
    if (scene.mode === "img2img") return { kind: "img2img", image: scene.imageUrl() };
    return { kind: "inpaint", image: scene.imageUrl(), mask: scene.maskUrl(), ...this.#parts.inpaint.value() };
  }

  /** What goes into the `controls` of a request: a list of {name, image, scale, start, end, annotate, ...}. */
  hints() {
    this.#parts.painter.release();
    return this.#parts.hints.values();
  }

  /** The names of the control networks that there are. */
  setControls(names) {
    this.#parts.hints.names = names;
    this.#show();
  }

  /** The size of the images that are generated: that of new sketches, where no image is edited. */
  setSize(width, height) {
    if (this.#size[0] === width && this.#size[1] === height) return;
    this.#size = [width, height];
    if (this.#tab === "sketch") this.#parts.hints.begin();
  }

  get #scene() {
    return this.#tab === "sketch" ? this.#parts.hints.scene : this.#picture;
  }

  #build() {
    const canvas = el("canvas", {
      tabindex: "0",
      role: "application",
      "aria-label": "Image",
      "aria-describedby": "editor-keys",
      "aria-keyshortcuts": "[ ] X B Control+Z Control+Shift+Z",
    });
    const stage = new Stage(canvas);
    const painter = new Painter(stage, () => this.#edited());
    const modes = segments({ label: "What to do", options: MODES, value: this.#tab, change: (tab) => this.#switch(tab) });
    const toolbar = new Toolbar(painter, {
      undo: () => this.#undo("undo"),
      redo: () => this.#undo("redo"),
      fill: () => this.#whole(() => 255),
      invert: () => this.#whole((value) => 255 - value),
      empty: () => this.#whole(() => 0),
      zoomBy: (direction) => hand.zoomBy(direction),
    });
    const inpaint = new InpaintSettings(() => this.#changed());
    const frame = new FrameSettings({
      scene: () => this.#picture,
      changed: () => this.#edited(),
      setFrame: (sides) => {
        this.#picture.setFrame(sides);
        this.#edited();
        stage.fit();
      },
    });
    const hints = new Hints({
      size: () => (this.#picture ? [this.#picture.rect.width, this.#picture.rect.height] : this.#size),
      picture: () => this.#picture?.picture ?? null,
      shown: () => this.#parts && this.#tab === "sketch" && this.#show(),
      changed: () => this.#edited(),
      fail: (error) => this.#say(error.message),
    });
    const before = button("Before", () => this.#compare(false), { title: "The image", keys: "B" });
    const after = button("After", () => this.#compare(true), { title: "The result", keys: "B" });
    const adopt = button("Edit the result", () => this.#adopt(), { class: "ed-quiet", title: "Go on with the result" });
    const compare = el("div", { class: "ed-compare", role: "group", "aria-label": "Result" }, before, after, adopt);
    const file = fileButton("Choose an image", (blob) => this.#open(blob), { class: "primary" });
    const empty = el("div", { class: "ed-empty" }, el("p", {}, "Drop or paste an image here."), file);
    const other = fileButton("Other image", (blob) => this.#open(blob), { class: "ed-quiet" });
    const remove = button("Remove", () => this.clear(), { class: "ed-quiet", title: "Generate without an image" });
    const position = el("span", { class: "ed-position" });
    const spoken = el("span", { class: "visually-hidden", role: "status" });
    const status = el("span", { role: "status" });
    const help = keyHelp("editor-keys");
    const frameBox = el("div", { class: "ed-stage" }, canvas, empty);
    const head = el("div", { class: "ed-head" }, modes.root, el("span", { class: "ed-group" }, other, remove));
    const foot = el("div", { class: "ed-foot" }, status, position, compare, toolbar.zoom, spoken);
    this.root.classList.add("editor");
    this.root.append(head, toolbar.root, frameBox, foot, frame.root, inpaint.root, hints.root, help);
    const hand = new Hand(this.root, stage, painter, {
      undo: () => this.#undo("undo"),
      redo: () => this.#undo("redo"),
      toggleErase: () => {
        painter.brush.erase = !painter.brush.erase;
        painter.show();
        toolbar.show(this.#scene);
      },
      toggleResult: () => this.#compare(!this.#picture?.showsResult),
      brushChanged: () => toolbar.show(this.#scene),
      frameMoved: () => {
        this.#showFrame();
        this.#showCompare();
        this.#describe();
      },
      frameChanged: (start) => {
        this.#picture.setFrame(this.#picture.frame, start);
        stage.fitIfHidden();
        this.#edited();
      },
      at: (point, isByKey) => {
        const text = point ? `x ${Math.floor(point.x)}, y ${Math.floor(point.y)}` : "";
        position.textContent = text;
        if (isByKey) spoken.textContent = text;
      },
    });
    this.#parts = {
      stage, painter, modes, toolbar, inpaint, frame, hints, before, after, compare, empty, other, remove, status, frameBox, help,
    };
  }

  #listen() {
    const over = (event) => {
      if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
      event.preventDefault(); // the page takes drops elsewhere
      this.#parts.frameBox.classList.toggle("ed-over", event.type !== "drop");
      const file = event.type === "drop" ? imageIn(event.dataTransfer) : null;
      if (file) this.#open(file);
      else if (event.type === "drop") this.#say("That is not an image.");
    };
    for (const name of ["dragenter", "dragover", "drop"]) this.root.addEventListener(name, over);
    this.root.addEventListener("dragleave", (event) => {
      if (!this.root.contains(event.relatedTarget)) this.#parts.frameBox.classList.remove("ed-over");
    });
    document.addEventListener("paste", (event) => {
      const file = imageIn(event.clipboardData);
      const isOwn = this.root.contains(event.target) || event.target === document.body;
      if (!file || !isOwn || !this.root.getClientRects().length) return; // the page takes it
      event.preventDefault();
      this.#open(file);
    });
  }

  /** A file that was dropped, pasted or chosen: the image to edit, or the picture of a hint. */
  async #open(file) {
    try {
      const isHint = this.#tab === "sketch" && this.#parts.hints.scene?.source === "picture";
      await (isHint ? this.#parts.hints.setPicture(file) : this.setImage(file));
    } catch (error) {
      this.#say(error.message);
    }
  }

  #switch(tab) {
    this.#parts.painter.release();
    this.#tab = tab;
    if (this.#picture && tab !== "sketch") {
      this.#picture.mode = tab;
      this.#picture.showsResult = false;
    }
    this.#say("");
    if (tab === "sketch") this.#parts.hints.begin();
    this.#show();
    this.#changed();
  }

  #undo(which) {
    const scene = this.#scene;
    if (!scene || this.#parts.painter.isPainting || !scene.history[which]()) return;
    this.#parts.stage.fitIfHidden();
    this.#edited();
  }

  #whole(of) {
    const scene = this.#scene;
    if (!scene?.surface) return;
    this.#parts.painter.release();
    scene.history.add(scene.surface.change(of));
    this.#edited();
  }

  #compare(showsResult) {
    if (!this.#picture?.result || this.#tab === "sketch") return;
    this.#parts.painter.release();
    this.#picture.showsResult = showsResult;
    this.#show();
  }

  /** Edit the result. The mask stays if it fits. */
  #adopt() {
    const scene = this.#picture;
    if (!scene?.result) return;
    this.#parts.painter.release();
    this.#parts.stage.canvas.focus({ preventScroll: true, focusVisible: false });
    const { width, height } = scene.result;
    if (width === scene.width && height === scene.height) {
      scene.adopt();
      this.#show();
      this.#edited();
    } else this.#edit(new PictureScene(scene.result, null));
  }

  /** The mask, the frame or a sketch was changed. */
  #edited() {
    this.#parts.stage.request();
    this.#parts.toolbar.show(this.#scene);
    this.#showFrame();
    this.#showCompare();
    this.#changed();
  }

  #changed() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#settle(), PREPARE_AFTER);
    this.dispatchEvent(new Event("change"));
  }

  async #settle() {
    this.#describe();
    await this.#picture?.prepare();
    await this.#parts.hints.prepare();
  }

  #showFrame() {
    if (this.#picture) this.#parts.frame.show(this.#picture);
  }

  /** Show the scene and the controls of the present tab. */
  #show() {
    const { stage, toolbar, painter, ...parts } = this.#parts;
    const scene = this.#scene;
    const picture = this.#picture;
    const isSketch = this.#tab === "sketch";
    parts.modes.set(this.#tab);
    if (stage.scene !== scene) {
      if (stage.scene) stage.scene.brushSize = painter.brush.size; // each has its own
      stage.scene = scene;
      if (scene) painter.suit(scene.width, scene.height, scene.brushSize);
    } else if (!this.#sameRect(stage, scene)) stage.fit();
    painter.hover(null);
    stage.canvas.hidden = !scene;
    stage.canvas.setAttribute("aria-label", isSketch ? "Sketch" : "Image");
    parts.help.hidden = !scene;
    stage.canvas.dataset.cursor = scene?.surface ? "brush" : "pan";
    parts.empty.hidden = isSketch || picture !== null;
    parts.frameBox.hidden = isSketch && !scene;
    parts.other.hidden = parts.remove.hidden = !picture || isSketch;
    this.#showCompare();
    toolbar.root.hidden = toolbar.zoom.hidden = !scene;
    toolbar.show(scene);
    toolbar.fill.hidden = isSketch;
    parts.frame.root.hidden = !picture || this.#tab !== "outpaint";
    parts.inpaint.root.hidden = !picture || isSketch || this.#tab === "img2img";
    parts.hints.root.hidden = !isSketch;
    this.#showFrame();
    this.#describe();
  }

  #showCompare() {
    const { compare, before, after } = this.#parts;
    const picture = this.#picture;
    compare.hidden = this.#tab === "sketch" || !picture?.result;
    before.setAttribute("aria-pressed", String(!picture?.seesResult));
    after.setAttribute("aria-pressed", String(Boolean(picture?.seesResult)));
  }

  #shownRect = "";

  #sameRect(stage, scene) {
    const rect = JSON.stringify(scene?.rect ?? null);
    const same = rect === this.#shownRect;
    this.#shownRect = rect;
    return same;
  }

  #message = "";

  #say(text) {
    this.#message = text;
    this.#describe();
  }

  /** Say what is edited, and what is missing. */
  #describe() {
    const picture = this.#picture;
    const texts = [this.#message];
    if (picture && this.#tab !== "sketch") {
      const { width, height } = picture.rect;
      texts.push(`${width}×${height} pixels.`);
      if (this.#tab !== "img2img") texts.push(this.#aboutMask(picture));
    } else if (this.#tab === "sketch" && this.#parts.hints.scene) {
      const { source, picture: chosen } = this.#parts.hints.scene;
      if (source === "sketch") texts.push("Draw the lines that the image should follow.");
      else if (!chosen) texts.push("Drop, paste or choose the picture.");
      if (picture) texts.push(`The image is used as well: ${Object.fromEntries(MODES)[picture.mode].toLowerCase()}.`);
    }
    this.#parts.status.textContent = texts.filter(Boolean).join(" ");
  }

  #aboutMask(picture) {
    if (isExtended(picture.activeFrame)) return "";
    const share = picture.mask.share();
    if (this.#tab === "outpaint" && share === 0) return "Drag an edge or a corner outwards.";
    if (share === 0) return "Paint over the part to generate anew.";
    return `Mask: ${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %.`;
  }
}
