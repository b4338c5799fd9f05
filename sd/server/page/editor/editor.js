// The place to edit an image: its mask, its frame, sketches for control networks.

export class Editor extends EventTarget {
  constructor(root) {
    super();
    this.root = root;
  }

  // Show an image: a Blob, or the URL of one.
  async setImage(blobOrUrl) {}

  clear() {}

  // What goes into a request: null, or {kind: "img2img", image}, or {kind: "inpaint", image, mask, ...}.
  value() {
    return null;
  }

  // What goes into the `controls` of a request.
  hints() {
    return [];
  }

  // The names of the control networks that there are.
  setControls(names) {}
}
