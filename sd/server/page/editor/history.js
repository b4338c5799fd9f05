// Undo and redo. An entry has `swap()`, which exchanges the present state with the one that it keeps, and its size in
// `bytes`: the same entry undoes a change and, swapped again, redoes it.

export class History {
  /** most   bytes kept; the oldest entries go first, but the newest one always stays */
  constructor(most = 64 << 20) {
    this.most = most;
    this.done = [];
    this.undone = [];
  }

  /** Remember a change that has been made. Nothing can be redone after it. */
  add(entry) {
    this.undone = [];
    this.done.push(entry);
    let bytes = this.done.reduce((sum, each) => sum + each.bytes, 0);
    while (bytes > this.most && this.done.length > 1) bytes -= this.done.shift().bytes;
  }

  /** Take back the last change. Returns whether there was one. */
  undo() {
    return History.#move(this.done, this.undone);
  }

  /** Make the change again that was taken back last. Returns whether there was one. */
  redo() {
    return History.#move(this.undone, this.done);
  }

  get canUndo() {
    return this.done.length > 0;
  }

  get canRedo() {
    return this.undone.length > 0;
  }

  static #move(from, to) {
    const entry = from.pop();
    if (!entry) return false;
    entry.swap();
    to.push(entry);
    return true;
  }
}

/** An entry for a value that is replaced: `get()` returns the present one and `set(value)` puts another in its place. */
export function replacement(before, get, set, bytes = 64) {
  let kept = before;
  return {
    bytes,
    swap() {
      const present = get();
      set(kept);
      kept = present;
    },
  };
}
