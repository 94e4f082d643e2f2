// The server's API: a request whose answer is a stream of events.

/** Generate images, or edit one. Calls onEvent with each event, in order.
 *  fields: plain values. image, mask: blobs or null. */
export async function generate(fields, image, mask, signal, onEvent) {
  const wanted = { ...fields, stream: true, progress: true, partial_images: 10 };
  const request = { method: "POST", signal };
  if (image) {
    request.body = new FormData();
    for (const [name, value] of Object.entries(wanted)) request.body.append(name, String(value));
    request.body.append("image", image, "image");
    if (mask) request.body.append("mask", mask, "mask.png");
  } else {
    request.body = JSON.stringify(wanted);
    request.headers = { "content-type": "application/json" };
  }
  const answer = await fetch(`v1/images/${image ? "edits" : "generations"}`, request);
  if (answer.status === 401) location.reload(); // to the page that asks for the key
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  for await (const event of events(answer.body)) {
    if (event.type === "error") throw new Error(event.error.message);
    onEvent(event);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}
