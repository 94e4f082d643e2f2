"""The counts of the benchmarks against operations written out by hand, bounds that a change of the
network must not exceed, and every line of the benchmark that needs a card."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


pytestmark = pytest.mark.slow
LAYERS = 2  # of 30: counting is linear in them, and takes seconds a layer on a busy machine


@pytest.fixture(scope="module")
def counted():
    """A guided step of the 1K model at 1024 pixels, its main layers but two left out."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import count
    finally:
        sys.path.remove(str(BENCHMARKS))
    config = replace(count.published_config(16), n_layers=LAYERS)
    return count.ours(config, 1024, (100, 12))


def test_a_guided_step_is_counted_as_by_hand(counted):
    """Two passes of 4096 image tokens with 128 and 32 of the prompt, 3840 wide, 10240 inside."""
    tokens, width, inner = (4096 + 128, 4096 + 32), 3840, 10240
    products = sum(2 * each * (4 * width**2 + 3 * width * inner) for each in tokens)
    modulation = 2 * 2 * 256 * 4 * width
    found = counted.total("main layers", "matmul")
    assert found.flops == LAYERS * (products + modulation)
    assert found.launches == LAYERS * 2 * 8
    attention = counted.total("main layers", "attention")
    assert attention.flops == LAYERS * sum(4 * each**2 * width for each in tokens)
    assert attention.bytes == LAYERS * sum(4 * 2 * each * width for each in tokens)


def test_a_guided_step_stays_within_bounds(counted):
    """Of the whole model: what is beside the main layers, and 15 times the two."""
    layers, whole = counted.total("main layers"), counted.total()
    launches, flops, size = (
        getattr(whole, what) + (30 // LAYERS - 1) * getattr(layers, what)
        for what in ("launches", "flops", "bytes")
    )
    assert 108e12 < flops < 110e12
    assert launches < 1900 and size < 142e9
    assert 15 * counted.total("main layers", "element-wise").bytes < 2 * 32e9
    assert counted.total("decoder").bytes < 8e9


def test_every_line_of_the_card_s_benchmark_runs(tmp_path, monkeypatch):
    """Tiny, on the CPU; no time is looked at."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    table = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--json", str(table)])
    gpu.main()
    rows = {row["what"]: row for row in json.loads(table.read_text())["rows"]}
    assert [row["note"] for what, row in rows.items() if what.startswith("network")] == [
        "right"
    ] * 2
    absent = {what for what, row in rows.items() if row["value"] is None}
    absent -= {"peak since reset"}  # of which a CPU has none
    assert all(what.startswith("attention") for what in absent), absent
    assert len(rows) == 48
