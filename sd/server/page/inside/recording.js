// What was seen of a run: its plan, its steps as they come, and its end.

import { Heat } from "./heat.js";

const KEPT = 24; // requests that need not be asked for again

export class Recording {
  constructor() {
    this.plan = null; // what "begin" says
    this.steps = [];
    this.end = null; // what "done" says
  }

  // Take in an event; false for one that is not of a run.
  take({ event, data }) {
    if (event === "begin") this.plan = data;
    else if (event === "step") this.steps.push(withHeats(data));
    else if (event === "done") this.end = withHeats(data);
    else return false;
    return true;
  }

  get total() {
    return this.plan?.steps ?? 0;
  }

  // Frames are the steps, then the whole run.
  get last() {
    return this.total;
  }

  // The mean over the steps in which there was guidance; null if there was none.
  get guidance() {
    const found = this.steps.map((step) => step.guidance).filter(Boolean);
    return found.length ? Heat.mean(found) : null;
  }

  // The map of a word in a frame, and whether it is that of the frame itself or of the whole run.
  map(frame, word) {
    const own = this.steps[frame]?.maps;
    if (own) return { heat: own[word] ?? null, whole: false };
    return { heat: this.end?.maps?.[word] ?? null, whole: true };
  }

  // Where guidance acted in a frame.
  pull(frame) {
    return frame < this.total ? (this.steps[frame]?.guidance ?? null) : this.guidance;
  }

  // Shares of start, end and padding in a frame.
  special(frame) {
    return this.steps[frame]?.special ?? this.end?.special ?? null;
  }
}

function withHeats(data) {
  return {
    ...data,
    maps: data.maps?.map((map) => map && Heat.of(map)) ?? null,
    guidance: data.guidance && typeof data.guidance === "object" ? Heat.of(data.guidance) : null,
  };
}

// The recordings of the last few requests, so that a slider that is moved back answers without the server.
export class Recordings {
  constructor() {
    this.found = new Map();
  }

  get(key) {
    const found = this.found.get(key);
    if (found) this.put(key, found); // it is the last used now
    return found;
  }

  put(key, recording) {
    this.found.delete(key);
    this.found.set(key, recording);
    if (this.found.size > KEPT) this.found.delete(this.found.keys().next().value);
  }

  clear() {
    this.found.clear();
  }
}
