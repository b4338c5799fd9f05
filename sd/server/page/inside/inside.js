// See inside: what happens in the model, step by step and word by word.

export class Inside {
  // body() returns what would be sent to /api/generate; onSettings(settings) takes settings over into the form.
  constructor(root, { body, onSettings }) {
    this.root = root;
    this.body = body;
    this.onSettings = onSettings;
  }
}
