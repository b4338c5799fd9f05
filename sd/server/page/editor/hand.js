// What pointers and keys do on the canvas: paint, drag the frame, pan, zoom.

import { dragged, sidesAt } from "./geometry.js";
import { Pointers } from "./pointers.js";

const REACH = 10; // CSS pixels around a side of the frame in which it can be taken
const TOUCH_REACH = 22;
const ZOOM = 1.25;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PAN = 40; // CSS pixels for an arrow key where nothing is painted

/** Whether keys belong to an element: what is typed or chosen there. */
const takesKeys = (target) => target.matches("input:not([type=range], [type=radio], [type=checkbox]), textarea, select");

export class Hand {
  #stage;
  #painter;
  #actions;
  #drag = null; // of the frame: {sides, from (screen), frame}
  #pointers;

  /**
   * actions   what else keys and drags do: undo(), redo(), toggleErase(), toggleResult(), brushChanged(),
   *           frameMoved(), frameChanged(before), at(point or null)
   */
  constructor(root, stage, painter, actions) {
    this.#stage = stage;
    this.#painter = painter;
    this.#actions = actions;
    const canvas = stage.canvas;
    this.#pointers = new Pointers(canvas, this);
    document.addEventListener("keydown", (event) => {
      // the focus is nowhere, on the body, after a click beside the controls
      const isOwn = root.contains(event.target) || (event.target === document.body && root.getClientRects().length > 0);
      if (isOwn) this.#key(event);
    });
    canvas.addEventListener("keyup", (event) => this.#keyUp(event));
    canvas.addEventListener("pointerdown", () => canvas.focus({ preventScroll: true, focusVisible: false }), true);
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && painter.showKeyCursor());
    canvas.addEventListener("blur", () => {
      this.#pointers.panning = false;
      painter.hideKeyCursor();
    });
  }

  press(point, { erase, touch }) {
    const scene = this.#stage.scene;
    if (scene?.surface) {
      this.#painter.press(point, erase);
      return true;
    }
    const sides = this.#sides(point, touch ? TOUCH_REACH : REACH);
    if (!sides.length) return false;
    this.#drag = { sides, from: point, frame: scene.frame };
    return true;
  }

  #sides(point, reach) {
    const scene = this.#stage.scene;
    if (scene?.mode !== "outpaint" || scene.seesResult) return [];
    return sidesAt(scene.frame, scene.width, scene.height, this.#stage.view, point.x, point.y, reach);
  }

  move(points) {
    if (!this.#drag) {
      this.#painter.move(points);
      this.#tell(points.at(-1));
      return;
    }
    const { sides, from, frame } = this.#drag;
    const scene = this.#stage.scene;
    const { scale } = this.#stage.view;
    const { x, y } = points.at(-1);
    scene.frame = dragged(frame, sides, (x - from.x) / scale, (y - from.y) / scale, scene.width, scene.height);
    this.#stage.request();
    this.#actions.frameMoved();
  }

  release() {
    if (!this.#drag) {
      this.#painter.release();
      return;
    }
    const { frame } = this.#drag;
    this.#drag = null;
    this.#actions.frameChanged(frame);
  }

  cancel() {
    if (!this.#drag) {
      this.#painter.cancel();
      return;
    }
    this.#stage.scene.frame = this.#drag.frame;
    this.#drag = null;
    this.#stage.request();
    this.#actions.frameMoved();
  }

  hover(point) {
    this.#painter.hover(point);
    this.#tell(point);
    this.#showCursor(point);
  }

  #showCursor(point) {
    const surface = this.#stage.scene?.surface;
    const sides = point ? this.#sides(point, REACH) : [];
    this.#stage.canvas.dataset.cursor = this.#pointers?.panning ? "pan" : surface ? "brush" : sides.join("-") || "pan";
  }

  #tell(point) {
    this.#actions.at(point && this.#stage.view.toImage(point.x, point.y));
  }

  pan(dx, dy) {
    this.#stage.pan(dx, dy);
  }

  pinch(from, to) {
    this.#stage.pinch(from, to);
  }

  zoom(x, y, factor) {
    this.#stage.zoom(x, y, factor);
  }

  busy(isBusy, action) {
    this.#stage.canvas.dataset.busy = isBusy ? action : "";
  }

  /** Zoom in (1), out (-1), or show all (0). */
  zoomBy(direction) {
    if (direction) this.#stage.zoomMiddle(ZOOM ** direction);
    else this.#stage.fit();
  }

  #key(event) {
    if (event.defaultPrevented || event.altKey || takesKeys(event.target) || !this.#stage.scene) return;
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const isTaken = event.ctrlKey || event.metaKey ? this.#control(name, event.shiftKey) : this.#plain(name, event);
    if (isTaken) event.preventDefault();
  }

  #control(name, isShift) {
    if (name === "z") this.#actions[isShift ? "redo" : "undo"]();
    else if (name === "y") this.#actions.redo();
    else return false;
    return true;
  }

  #plain(name, event) {
    if (event.target === this.#stage.canvas && this.#onCanvas(name, event)) return true;
    if (name === "[" || name === "]") {
      this.#painter.resize(name === "]" ? 1 : -1);
      this.#actions.brushChanged();
    } else if (name === "x") this.#actions.toggleErase();
    else if (name === "b") this.#actions.toggleResult();
    else if (name === "+" || name === "=") this.zoomBy(1);
    else if (name === "-") this.zoomBy(-1);
    else if (name === "0") this.zoomBy(0);
    else return false;
    return true;
  }

  #onCanvas(name, event) {
    if (name in ARROWS && this.#pointers.isIdle) {
      const [dx, dy] = ARROWS[name];
      if (!this.#stage.scene.surface) this.#stage.pan(-dx * PAN, -dy * PAN);
      else this.#actions.at(this.#painter.moveKeyCursor(dx, dy, event.shiftKey), true);
      return true;
    }
    if (name === " ") {
      this.#pointers.key(event);
      if (this.#pointers.isIdle) this.#painter.pressKey();
      if (!this.#painter.hasKeyCursor) this.#stage.canvas.dataset.cursor = "pan";
      return true;
    }
    return false;
  }

  #keyUp(event) {
    if (event.code !== "Space") return;
    this.#pointers.key(event);
    this.#painter.releaseKey();
    if (this.#stage.scene?.surface) this.#stage.canvas.dataset.cursor = "brush";
  }
}
