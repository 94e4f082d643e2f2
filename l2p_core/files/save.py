"""Write tensors as a safetensors file into an open stream, one tensor at a time.

safetensors' own `save_file` creates its file by itself, with permissions for its owner alone, and
`save` makes a second copy of all tensors in memory. (github.com/huggingface/safetensors, README,
"Format")
"""

import json
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the header and the tensors, wide numbers first, so that each is aligned to its own
    width."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        table[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps({"__metadata__": dict(metadata), **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    stream.write(struct.pack("<Q", len(header)) + header)
    for name in names:
        content = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        stream.write(memoryview(content.numpy()))
