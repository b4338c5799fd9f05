// Pointer events of a canvas as strokes, pans and zooms: mouse, pen with pressure, and touch with one or two fingers.

const PAN_KEY = "Space";
const FACTOR = 1.0016; // zoom for a CSS pixel of the wheel

/**
 * Calls methods of `handler`, with points {x, y, pressure} in CSS pixels of the canvas:
 *
 *   press(point, {erase, touch})   returns true to draw, false to pan
 *   move(points)           all points since the last call, also those between two frames
 *   release()              the stroke ends
 *   cancel()               a second finger shows that it was none
 *   hover(point or null)   the pointer moves over the canvas without drawing, or leaves it
 *   pan(dx, dy), pinch(from, to), zoom(x, y, factor)
 *   busy(isBusy)           drawing or panning begins or ends
 */
export class Pointers {
  #canvas;
  #handler;
  #down = new Map(); // pointer id -> last point, of those that touch the canvas
  #action = null; // "draw", "pan", "pinch", or "ended": a finger is left over from a pinch
  #owner = null; // id of the pointer that draws or pans
  #hovered = null; // the last point
  #penAt = -Infinity; // time of the last event of a pen
  panning = false; // the key that turns a drag into a pan is held

  constructor(canvas, handler) {
    this.#canvas = canvas;
    this.#handler = handler;
    const on = (name, method, options) => canvas.addEventListener(name, (event) => method.call(this, event), options);
    on("pointerdown", this.#press);
    on("pointermove", this.#move);
    on("pointerup", this.#lift);
    on("pointercancel", this.#lost);
    on("lostpointercapture", this.#lost);
    on("pointerleave", () => this.#action === null && handler.hover(null));
    on("wheel", this.#wheel, { passive: false });
    on("contextmenu", (event) => this.#action !== null && event.preventDefault());
  }

  get isIdle() {
    return this.#action === null;
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    // a mouse has no pressure (0.5 while a button is down); nor has a finger on most screens
    const pressure = event.pointerType === "pen" && event.pressure > 0 ? event.pressure : 1;
    return { x: event.clientX - box.left, y: event.clientY - box.top, pressure };
  }

  #press(event) {
    if (event.pointerType === "pen") this.#penAt = event.timeStamp;
    // a hand that rests on the screen while a pen is used
    if (event.pointerType === "touch" && event.timeStamp - this.#penAt < 500) return;
    const isMiddle = event.button === 1;
    const isEraser = event.button === 5; // the other end of a pen
    if (!isMiddle && !isEraser && event.button !== 0) return;
    if (isMiddle) event.preventDefault(); // the browser would scroll
    const point = this.#point(event);
    this.#down.set(event.pointerId, point);
    try {
      this.#canvas.setPointerCapture(event.pointerId);
    } catch {
      // the pointer has gone already
    }
    if (this.#down.size === 2 && event.pointerType === "touch" && this.#action !== "pinch") {
      if (this.#action === "draw") this.#handler.cancel();
      this.#begin("pinch", null);
    } else if (this.#action === null) {
      const touch = event.pointerType === "touch";
      const draws = !isMiddle && !this.panning && this.#handler.press(point, { erase: isEraser, touch });
      this.#begin(draws ? "draw" : "pan", event.pointerId);
    }
  }

  #begin(action, owner) {
    this.#action = action;
    this.#owner = owner;
    this.#handler.busy(action !== null && action !== "ended", action);
  }

  #move(event) {
    if (event.pointerType === "pen") this.#penAt = event.timeStamp;
    const point = this.#point(event);
    const before = this.#down.get(event.pointerId);
    // browsers send moves of a pointer that rests when the page below it changes
    const rests = this.#hovered && this.#hovered.x === point.x && this.#hovered.y === point.y;
    if (this.#action === null && !rests) this.#handler.hover(point);
    this.#hovered = point;
    if (!before) return;
    this.#down.set(event.pointerId, point);
    if (this.#action === "pinch") {
      const ids = [...this.#down.keys()].slice(0, 2);
      const to = ids.map((id) => this.#down.get(id));
      this.#handler.pinch(ids.map((id, i) => (id === event.pointerId ? before : to[i])), to);
    } else if (event.pointerId !== this.#owner) {
      return;
    } else if (this.#action === "pan") {
      this.#handler.pan(point.x - before.x, point.y - before.y);
    } else if (this.#action === "draw") {
      const events = event.getCoalescedEvents?.() ?? [];
      this.#handler.move((events.length ? events : [event]).map((each) => this.#point(each)));
    }
  }

  #lift(event) {
    if (!this.#down.delete(event.pointerId)) return;
    if (this.#action === "draw" && event.pointerId === this.#owner) this.#handler.release();
    this.#after(event);
  }

  #lost(event) {
    if (!this.#down.delete(event.pointerId)) return;
    if (this.#action === "draw" && event.pointerId === this.#owner) this.#handler.cancel();
    this.#after(event);
  }

  #after(event) {
    if (this.#down.size === 0) this.#begin(null, null);
    else if (this.#action === "pinch" || event.pointerId === this.#owner) this.#begin("ended", null);
  }

  #wheel(event) {
    event.preventDefault();
    const { x, y } = this.#point(event);
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode]; // of a pixel, a line, a page
    // a pinch on a touchpad comes as a wheel with Ctrl, in much smaller steps
    this.#handler.zoom(x, y, FACTOR ** (-Math.max(Math.min(pixels, 300), -300) * (event.ctrlKey ? 6 : 1)));
  }

  /** A key went down or up anywhere in the editor. */
  key(event) {
    if (event.code === PAN_KEY) this.panning = event.type === "keydown";
  }
}
