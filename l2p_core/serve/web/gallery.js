// The images of this browser, newest first. They are kept in its IndexedDB.

const MOST = 200; // images; the oldest are dropped

export class Gallery {
  /** Opens what is kept. Where the browser keeps nothing, the images last until a reload. */
  static async open() {
    const gallery = new Gallery();
    gallery.entries = [];
    try {
      gallery.database = await asked(indexedDB.open("l2p", 1), (request) => {
        request.result.createObjectStore("images", { keyPath: "id" });
      });
      gallery.entries = (await asked(gallery.store("readonly").getAll())).reverse();
    } catch (error) {
      console.warn("images are not kept:", error);
    }
    return gallery;
  }

  store(mode) {
    return this.database.transaction("images", mode).objectStore("images");
  }

  /** entry: {image, input, mask}, each a blob or null. */
  async add(entry) {
    const last = this.entries[0]?.id ?? 0;
    const kept = { ...entry, id: Math.max(Date.now(), last + 1) };
    this.entries.unshift(kept);
    if (this.database) await asked(this.store("readwrite").put(kept)).catch(console.warn);
    for (const old of this.entries.slice(MOST)) await this.remove(old);
    return kept;
  }

  async remove(entry) {
    this.entries = this.entries.filter((each) => each !== entry);
    if (this.database) await asked(this.store("readwrite").delete(entry.id));
  }
}

function asked(request, onUpgrade) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    if (onUpgrade) request.onupgradeneeded = () => onUpgrade(request);
  });
}
