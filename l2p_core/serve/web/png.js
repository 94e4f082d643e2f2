// The settings in a PNG: JSON in the uncompressed iTXt chunk "l2p".

/** The text of the settings, or null where the file has none. */
export async function settingsText(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const latin = new TextDecoder("latin1");
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = latin.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    at += length + 12;
    if (kind !== "iTXt") continue;
    const end = data.indexOf(0);
    if (latin.decode(data.subarray(0, end)) !== "l2p" || data[end + 1] !== 0) continue;
    const language = data.indexOf(0, end + 3);
    const translated = data.indexOf(0, language + 1);
    return new TextDecoder().decode(data.subarray(translated + 1));
  }
  return null;
}

/** The settings as an object, or null. The seed is text: it may be too large for a number. */
export async function readSettings(blob) {
  const text = await settingsText(blob);
  if (text === null) return null;
  try {
    const settings = JSON.parse(text);
    settings.seed = /"seed": ?(\d+)/.exec(text)?.[1] ?? "0";
    return settings;
  } catch {
    return null;
  }
}
