// The mask editor: strokes over an image. What is painted is generated.

export class MaskEditor {
  /** image: the <img> below the canvas. settings: () => ({brush: % of the width, erase}). */
  constructor(canvas, image, settings, onChange) {
    Object.assign(this, { canvas, image, settings, onChange, strokes: [] });
    image.addEventListener("load", () => {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      this.draw();
    });
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.go(event));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => (this.stroke = null));
    }
  }

  get empty() {
    return !this.strokes.some((stroke) => !stroke.erase) && !this.painted;
  }

  begin(event) {
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    const { brush, erase } = this.settings();
    this.stroke = { erase, width: (brush / 100) * this.canvas.width, points: [] };
    this.strokes.push(this.stroke);
    this.go(event);
    this.onChange();
  }

  go(event) {
    if (!this.stroke) return;
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    this.stroke.points.push([(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]);
    this.draw();
  }

  undo() {
    this.strokes.pop();
    this.draw();
  }

  /** painted: a canvas of the image's size to start from, or nothing. */
  clear(painted = null) {
    this.strokes = [];
    this.painted = painted;
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "#e0218a";
    if (this.painted) context.drawImage(this.painted, 0, 0);
    for (const { erase, width, points } of this.strokes) {
      context.globalCompositeOperation = erase ? "destination-out" : "source-over";
      context.lineWidth = width;
      context.beginPath();
      for (const [x, y] of [points[0], ...points]) context.lineTo(x, y);
      context.stroke();
    }
    context.globalCompositeOperation = "source-over";
  }

  /** A PNG that is transparent where the mask is painted; null where nothing is. */
  async blob() {
    if (this.empty) return null;
    const { canvas, context } = this.opaque();
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.canvas, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  /** Paint what is transparent in a mask that `blob` gave. */
  async restore(blob) {
    const { canvas, context } = this.opaque("#e0218a");
    context.globalCompositeOperation = "destination-out";
    context.drawImage(await createImageBitmap(blob), 0, 0);
    this.clear(canvas);
  }

  opaque(colour = "#000") {
    const canvas = document.createElement("canvas");
    canvas.width = this.canvas.width;
    canvas.height = this.canvas.height;
    const context = canvas.getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, canvas.width, canvas.height);
    return { canvas, context };
  }
}
