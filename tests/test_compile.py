"""torch.compile of the blocks: graphs, breaks and bytes are counted, and nothing is compiled to
machine code, which takes minutes."""

from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from comfyui_l2p.l2p_core.config import L2PConfig
from comfyui_l2p.l2p_core.files.quantization import Int8Linear
from comfyui_l2p.l2p_core.model import Block, Hooks, L2PTransformer, rope_of_prompt, rotate

pytestmark = pytest.mark.slow
TOKENS, HEAD = 96, 128


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """A backend of torch.compile that runs what it is given, and the graphs it was given."""
    found = []

    def keep(graph, _):
        found.append(graph)
        return graph.forward

    keep.found = found
    return keep


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def config(**changes) -> L2PConfig:
    sizes = {"dim": 160, "n_heads": 5, "n_layers": 1, "n_refiner_layers": 1, "ffn_dim": 192}
    return L2PConfig(**{**sizes, "cap_feat_dim": 48, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotation_is_the_complex_product_to_the_bit(graphs, dtype):
    """In real numbers, which all have kernels."""
    x = torch.randn(2, TOKENS, 3, HEAD).to(dtype)
    rope = rope_of_prompt(TOKENS, (32, 48, 48), torch.device("cpu"))[None]
    compiled = torch.compile(rotate, backend=graphs)(x, rope)
    by_hand = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(
        *rope[:, :, None].unbind(-1)
    )
    by_hand = torch.view_as_real(by_hand).flatten(-2).to(dtype)
    assert torch.equal(compiled, by_hand) and torch.equal(rotate(x, rope), by_hand)
    (graph,) = graphs.found
    assert "complex" not in graph.code and rotate(x, rope).dtype == dtype


def test_a_compiled_block_moves_less_than_0_40_of_eager_bytes(monkeypatch):
    """Bytes of the kernels that Inductor would make of a block of the published size; eager ones
    are counted by `benchmarks/count.py`: 1.93 GB."""
    graph_lowering = pytest.importorskip("torch._inductor.graph").GraphLowering
    sizes = []

    class Counted(BaseException):
        """Ends the compilation before there is code."""

    def count(self):
        self.init_wrapper_code()
        self._update_scheduler()
        kernels = [node for node in self.scheduler.nodes if not node.is_extern()]
        sizes.extend(node.get_read_write_buffers_sizes() for node in kernels)
        complex_ones = [
            node.node.get_name()
            for node in self.scheduler.nodes
            if node.is_extern() and "view_as" in str(getattr(node.node, "python_kernel_name", ""))
        ]
        assert not complex_ones
        raise Counted

    monkeypatch.setattr(graph_lowering, "codegen", count)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad(), suppress(Counted):
        block = Block(L2PConfig(), dtype=torch.bfloat16)
        x = torch.empty(1, 4224, 3840, dtype=torch.bfloat16)
        rope, time = torch.empty(1, 4224, 64, 2), torch.empty(1, 256, dtype=torch.bfloat16)
        torch.compile(block)(x, rope, None, time)
    assert len(sizes) >= 8 and sum(sizes) < 0.76e9


def test_an_int8_block_is_one_graph(graphs):
    network = L2PTransformer(config()).eval().requires_grad_(False)
    block = network.layers[0]
    for name, layer in list(block.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "adaLN" not in name:
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            numbers = (layer.weight / scale).round().to(torch.int8)
            block.set_submodule(name, Int8Linear(numbers, scale, None))
    given = (
        torch.randn(1, TOKENS, 160),
        rope_of_prompt(TOKENS, (8, 12, 12), torch.device("cpu"))[None],
        None,
        torch.randn(1, 160),
    )
    with torch.no_grad():
        wanted = block(*given)
        found = torch.compile(block, backend=graphs)(*given)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (len(graphs.found), breaks()) == (1, 0)
    assert graphs.found[0].code.count("comfyui_l2p.int8_linear") == 7


def test_an_ordinary_day_takes_six_graphs(graphs):
    """Sizes, lengths of prompts, and batches, of unlike prompts too, compiled as by
    `compile_blocks`."""
    network = L2PTransformer(config()).eval().requires_grad_(False)
    for block in (*network.noise_refiner, *network.context_refiner, *network.layers):
        block.compile(backend=graphs, dynamic=True)

    def generate(height: int, width: int, *lengths: int) -> tuple[torch.Tensor, ...]:
        image = torch.randn(len(lengths), 3, height, width)
        prompts = [torch.randn(length, 48) for length in lengths]
        return run(image, prompts), image, prompts

    def run(image: torch.Tensor, prompts: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return network(image, torch.full((len(image),), 0.5), prompts)

    generate(256, 256, 70)
    generate(384, 256, 12)
    generate(320, 512, 200)
    assert len(graphs.found) == 2
    generate(256, 256, 70, 70)
    generate(320, 256, 100, 100, 100)
    assert len(graphs.found) == 4
    together, image, prompts = generate(256, 256, 70, 12, 12)
    generate(320, 256, 140, 12)
    alone = run(image[1:2], prompts[1:2])
    assert len(graphs.found) == 6 and breaks() == 0
    torch.testing.assert_close(together[1:2], alone, atol=3e-5, rtol=0)


def test_windows_of_all_sizes_are_one_graph(graphs):
    """Shifted ones too; as `compile_blocks` compiles."""
    network = L2PTransformer(config(n_layers=2)).eval().requires_grad_(False)
    plain = deepcopy(network)
    for block in network.layers:
        block.compile(backend=graphs, dynamic=True)
    for height, width in ((128, 128), (96, 160), (256, 128)):
        given = torch.randn(1, 3, height, width), torch.tensor([0.5]), [torch.randn(9, 48)]
        with torch.no_grad():
            found, expected = (each(*given, Hooks(neighbourhood=4)) for each in (network, plain))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (len(graphs.found), breaks()) == (1, 0)
