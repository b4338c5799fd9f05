// Pictures as canvases: reading them, drawing surfaces in colours, and writing data URLs.

import { Surface } from "./surface.js";

export const MOST_PIXELS = 4096 * 4096; // larger images are reduced: the server takes no more
const STRIP = 256; // rows read at once, to use little memory

export function canvasOf(width, height, options = {}) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d", options);
  return canvas;
}

async function decoded(source) {
  if (source instanceof Blob) {
    try {
      return await createImageBitmap(source); // turned as its EXIF says
    } catch {
      const kind = source.type ? ` (${source.type})` : "";
      throw new Error(`This file${kind} is not an image that the browser can read: use PNG, JPEG or WebP.`);
    }
  }
  const url = new URL(source, document.baseURI);
  if (!["data:", "blob:"].includes(url.protocol) && url.origin !== location.origin) {
    throw new Error("Images of other sites are not loaded: save the image and open the file.");
  }
  const image = new Image();
  image.src = url.href;
  try {
    await image.decode();
  } catch {
    throw new Error("This is not an image that the browser can read: use PNG, JPEG or WebP.");
  }
  return image;
}

/**
 * Read an image: a Blob, or a URL of this site, data: or blob:. Returns {canvas, transparent, note}: the opaque picture,
 * transparent pixels on white as in the library; a Surface that is 255 where it is transparent, or null; what was changed.
 */
export async function readPicture(source) {
  const image = await decoded(source);
  const from = { width: image.naturalWidth ?? image.width, height: image.naturalHeight ?? image.height };
  if (!from.width || !from.height) throw new Error("This image has no pixels.");
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (from.width * from.height)));
  const width = Math.max(1, Math.floor(from.width * scale));
  const height = Math.max(1, Math.floor(from.height * scale));
  const own = canvasOf(width, height, { willReadFrequently: true });
  const context = own.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  image.close?.();
  const transparent = transparency(context, width, height);
  const canvas = canvasOf(width, height, { alpha: false });
  const opaque = canvas.getContext("2d");
  opaque.fillStyle = "#fff";
  opaque.fillRect(0, 0, width, height);
  opaque.drawImage(own, 0, 0);
  const note = scale < 1 ? `The image was reduced from ${from.width}×${from.height} to ${width}×${height} pixels.` : "";
  return { canvas, transparent, note };
}

function transparency(context, width, height) {
  const surface = new Surface(width, height);
  let any = false;
  for (let y = 0; y < height; y += STRIP) {
    const { data } = context.getImageData(0, y, width, Math.min(STRIP, height - y));
    for (let i = 3, at = y * width; i < data.length; i += 4, at++) {
      if (data[i] === 255) continue;
      surface.data[at] = 255 - data[i];
      any = true;
    }
  }
  return any ? surface : null;
}

/** 256 colours as the words of an ImageData. of   value -> [red, green, blue, alpha] */
export function palette(of) {
  const bytes = new Uint8ClampedArray(1024);
  for (let value = 0; value < 256; value++) bytes.set(of(value), 4 * value);
  return new Uint32Array(bytes.buffer);
}

export const GREY = palette((value) => [value, value, value, 255]);
export const INVERTED = palette((value) => [255 - value, 255 - value, 255 - value, 255]);

/** A canvas that follows a surface, in the colours of a palette. */
export class Layer {
  constructor(surface, colours) {
    this.surface = surface;
    this.canvas = canvasOf(surface.width, surface.height);
    this.recolour(colours);
  }

  recolour(colours) {
    this.colours = colours;
    this.surface.takeChanged();
    this.#draw(this.surface.rect);
  }

  /** Draw what has changed. */
  update() {
    const rect = this.surface.takeChanged();
    if (rect) this.#draw(rect);
  }

  #draw(rect) {
    const context = this.canvas.getContext("2d");
    for (let y = 0; y < rect.height; y += STRIP) {
      const strip = { ...rect, y: rect.y + y, height: Math.min(STRIP, rect.height - y) };
      context.putImageData(imageData(this.surface, strip, this.colours), strip.x, strip.y);
    }
  }
}

function imageData(surface, rect, colours) {
  const pixels = new ImageData(rect.width, rect.height);
  const words = new Uint32Array(pixels.data.buffer);
  for (let y = 0, i = 0; y < rect.height; y++) {
    let at = (rect.y + y) * surface.width + rect.x;
    for (let x = 0; x < rect.width; x++) words[i++] = colours[surface.data[at++]];
  }
  return pixels;
}

/** A new opaque canvas with a surface in the colours of a palette. */
export function drawn(surface, colours) {
  const canvas = canvasOf(surface.width, surface.height, { alpha: false });
  canvas.getContext("2d").putImageData(imageData(surface, surface.rect, colours), 0, 0);
  return canvas;
}

/** A picture reduced by a factor of 2, 4, ... such that no side is above `most`; itself if it is small enough. */
export function reduced(picture, most) {
  let found = picture;
  while (Math.max(found.width, found.height) > most) {
    const half = canvasOf(Math.ceil(found.width / 2), Math.ceil(found.height / 2), { alpha: false });
    half.getContext("2d").drawImage(found, 0, 0, half.width, half.height);
    found = half;
  }
  return found;
}

/**
 * Draw a picture at (0, 0) and, around it, the frame: its edge pixels repeated outwards. shown   the picture, or a reduced
 * one that is drawn in its place
 */
export function drawExtended(context, picture, frame, shown = picture) {
  const { width, height } = picture;
  const smooth = context.imageSmoothingEnabled;
  context.imageSmoothingEnabled = false; // a repeated pixel is not mixed with the next one
  // [start in the picture, its length, start of the target, its length] along each axis
  const across = [[0, 1, -frame.left, frame.left], [0, width, 0, width], [width - 1, 1, width, frame.right]];
  const down = [[0, 1, -frame.top, frame.top], [0, height, 0, height], [height - 1, 1, height, frame.bottom]];
  for (const [i, [x, wide, left, toWide]] of across.entries()) {
    for (const [j, [y, high, top, toHigh]] of down.entries()) {
      const isPicture = i === 1 && j === 1;
      if (!isPicture && toWide && toHigh) context.drawImage(picture, x, y, wide, high, left, top, toWide, toHigh);
    }
  }
  context.imageSmoothingEnabled = smooth;
  context.drawImage(shown, 0, 0, width, height);
}

/** The data URL (PNG) of a canvas that is made on demand, remembered until its key changes. */
export class Encoded {
  #key = null;
  #url = "";

  /** The URL for this key; `render()` returns the canvas. */
  get(key, render) {
    if (key !== this.#key) {
      this.#url = render().toDataURL("image/png");
      this.#key = key;
    }
    return this.#url;
  }

  /** Encode in the background, so that `get` with the same key need not wait. */
  async prepare(key, render) {
    if (key === this.#key) return;
    const blob = await new Promise((resolve) => render().toBlob(resolve, "image/png"));
    if (!blob) return; // too large for the browser: `get` tries again
    const reader = new FileReader();
    await new Promise((resolve) => {
      reader.onloadend = resolve;
      reader.readAsDataURL(blob);
    });
    if (!reader.error) {
      this.#url = reader.result;
      this.#key = key;
    }
  }
}
