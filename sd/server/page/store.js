// The images of the gallery: in IndexedDB, so that a reload keeps them; in memory where the browser has none.

const NAME = "sd-gallery";
const MOST = 300; // images; the oldest go

let database = null;

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(mode) {
  return database.transaction("images", mode).objectStore("images");
}

// Open it; returns all items, oldest first. An item is {id, blob, settings, text, seed, ...}.
export async function open() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id" });
    database = await result(request);
    return await result((await store("readonly")).getAll());
  } catch {
    database = null; // a private window, or storage that is off
    return [];
  }
}

export async function put(item) {
  if (!database) return;
  try {
    await result((await store("readwrite")).put(item));
  } catch {
    // the disk is full: the image stays until the page is closed
  }
}

export async function drop(...ids) {
  if (!database) return;
  const images = await store("readwrite");
  await Promise.all(ids.map((id) => result(images.delete(id)))).catch(() => {});
}

// The ids that are too many, of items oldest first.
export const surplus = (items) => items.slice(0, Math.max(0, items.length - MOST)).map((item) => item.id);
