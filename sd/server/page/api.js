// Requests to the server that this page comes from.

const KEY = "sd-key"; // in sessionStorage: it goes when the tab is closed, and is never written to disk by this page

// An answer that says what is wrong: its message is one line to show.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Seeds have up to 64 bits, more than a number of JavaScript. Those that are larger are texts here, and numbers on the
// wire.
export function toJson(value) {
  return JSON.stringify(value, (name, each) => {
    if (typeof each !== "bigint") return each;
    if (each <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(each);
    if (!JSON.rawJSON) throw new Error("This browser cannot send seeds above 2^53. Choose a smaller one.");
    return JSON.rawJSON(String(each));
  });
}

export function fromJson(text) {
  return JSON.parse(text, (name, each, context) =>
    Number.isInteger(each) && !Number.isSafeInteger(each) && context?.source ? context.source : each,
  );
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

let asking = null; // one dialog, even if several requests need the key

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-wrong").hidden = !wrong;
    field.value = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const given = dialog.returnValue === "use" && field.value.trim();
        if (given) sessionStorage.setItem(KEY, given);
        field.value = "";
        resolve(Boolean(given));
      },
      { once: true },
    );
    dialog.returnValue = "";
    dialog.showModal();
    field.focus();
  });
  return asking;
}

async function errorOf(response) {
  let message = "";
  const text = await response.text().catch(() => "");
  try {
    const found = JSON.parse(text);
    const error = found.error ?? found.detail ?? found.message ?? "";
    message = typeof error === "string" ? error : (error.message ?? "");
  } catch {
    message = text.slice(0, 300);
  }
  if (!message) message = `the server answered with status ${response.status}`;
  const wait = response.headers.get("Retry-After");
  return new ApiError(response.status, wait ? `${message} (try again in ${wait} s)` : message);
}

// fetch() that asks for the key where one is needed, and throws ApiError for any answer that is an error.
export async function send(path, options = {}) {
  for (let tries = 0; ; tries++) {
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    const changed = sessionStorage.getItem(KEY) !== key; // meanwhile, for another request
    if (!changed && !(await askForKey(Boolean(key))))
      throw new ApiError(401, "The server needs its key. Reload the page to give it.");
  }
}

export async function getJson(path, signal) {
  return fromJson(await (await send(path, { signal })).text());
}

export async function postJson(path, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: toJson(body), signal };
  const text = await (await send(path, options)).text();
  return text ? fromJson(text) : null;
}

export async function postBytes(path, blob, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: blob, signal };
  return fromJson(await (await send(path, options)).text());
}

export async function remove(path) {
  await send(path, { method: "DELETE" });
}

// The events of a stream, as {event, data}, with data from JSON.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let event = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event:")) event = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        }
        if (data.length) yield { event, data: fromJson(data.join("\n")) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// POST a body and yield what happens: {event, data}. Aborting the signal closes the connection, which cancels the job.
export async function* stream(path, body, signal) {
  const options = {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: toJson(body),
    signal,
  };
  yield* events(await send(path, options));
}

// Generate: events queued {id, position}, step {step, steps, previews}, done {images, seeds, ...}, and error {status,
// message}.
export function generate(body, signal) {
  return stream("/api/generate", body, signal);
}
