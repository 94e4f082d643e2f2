"""The loss as a picture."""
from pathlib import Path

from PIL import Image, ImageDraw

from ..header import whole

WIDTH, HEIGHT, MARGIN = 800, 400, 48


def draw_curve(points: list[tuple[int, float]], file: Path) -> None:
    """Write a PNG of (step, loss) points, each the mean of the points that share a column of pixels."""
    columns: dict[int, list[float]] = {}
    first, last = points[0][0], points[-1][0]
    for step, loss in points:
        columns.setdefault(MARGIN + round((step - first) / max(last - first, 1) * (WIDTH - 2 * MARGIN)), []).append(loss)
    means = {x: sum(losses) / len(losses) for x, losses in columns.items()}
    high = max(means.values()) or 1.0
    line = [(x, HEIGHT - MARGIN - mean / high * (HEIGHT - 2 * MARGIN)) for x, mean in means.items()]
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    pen.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill="grey")
    pen.line(line if len(line) > 1 else line * 2, fill="black", width=2)
    pen.text((MARGIN, MARGIN - 16), f"loss {high:.3g}", fill="black")
    pen.text((MARGIN - 12, HEIGHT - MARGIN - 6), "0", fill="black")
    pen.text((MARGIN, HEIGHT - MARGIN + 4), f"step {first}", fill="black")
    pen.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 4), f"{last}", fill="black")
    with whole(file) as part:
        picture.save(part, "PNG")
