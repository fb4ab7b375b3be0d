"""Models in `.gguf` files: their headers, and their weights in any format.

gguf's reader makes numpy views of each token and each merge, which takes 6 to 13 s for a vocabulary of
150,000. Only the tokenizer needs them, and transformers reads that otherwise. `Header` is gguf's reader
without them. Configs of the families here are made by `_settings`, which transformers calls with what its
own fast reader returns: for other families it calls gguf's.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderTensor
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from self_speculation.model.families import FAMILIES
from self_speculation.model.few_bits import FORMATS, FewBitsEmbedding, FewBitsLinear
from self_speculation.model.progress import progress

# Longer arrays of numbers have one for each token.
_LONGEST = 2**12

# Elements that are dequantised at a time: they stay in the processor's cache.
_AT_A_TIME = 2**18

_DENSE = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

# Families by their names in files, where those differ.
_FAMILIES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}

_lock = Lock()


class Header(gguf.GGUFReader):
    """Fields and tensors of a file, without long arrays and those of strings.

    Raises:
        ValueError: the file is cut short, or is no GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            super().__init__(path)
        except (IndexError, OverflowError, ValueError, struct.error) as error:
            raise ValueError(f"the file is cut short or damaged, or cannot be read ({error})") from error

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start, number = orig_offs + 12, int(count[0])
        number_type = self.gguf_scalar_to_np.get(GGUFValueType(kind[0]))
        if kind[0] == GGUFValueType.STRING:
            read_length, view, end = struct.Struct("=Q").unpack_from, self.data.data, start
            for _ in range(number):
                end += 8 + read_length(view, end)[0]
        elif number_type is not None and number > _LONGEST:
            end = start + number * np.dtype(number_type).itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, [kind, count], [], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]


def _settings(metadata: Mapping[str, Any], tensors: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a config, by transformers' names for fields. Arrays of strings are their lengths. Raises
    ValueError for a file without a vocabulary.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError("the file has no tokenizer (tokenizer.ggml.tokens)")
    architecture = metadata["general.architecture"]
    family = _FAMILIES.get(architecture, architecture)
    own = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING[family]
    names = {f"{architecture}.{key}": name for key, name in own.items()}
    names |= {f"tokenizer.{key}": name for key, name in GGUF_CONFIG_MAPPING["tokenizer"].items()}
    stablelm = {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
    }
    return {
        "model_type": family,
        "vocab_size": metadata["tokenizer.ggml.tokens"],
        "tie_word_embeddings": "output.weight" not in tensors,
        **GGUF_CONFIG_DEFAULTS_MAPPING.get(family, {}),
        **(stablelm if family == "stablelm" else {}),
        **{name: metadata[key] for key, name in names.items() if name and key in metadata},
    }


@contextmanager
def own_settings() -> Iterator[None]:
    """In this block, transformers reads configs of the families here by `_settings`, unless it has a function
    of its own. Its table is that of the process, so one thread at a time is in such a block.
    """
    names = (*_FAMILIES, *GGUF_CONFIG_MAPPING)
    with _lock:
        added = {name for name in names if _FAMILIES.get(name, name) in FAMILIES} - GGUF_CONFIG_ARCHS.keys()
        GGUF_CONFIG_ARCHS.update(dict.fromkeys(added, _settings))
        try:
            yield
        finally:
            for name in added:
                del GGUF_CONFIG_ARCHS[name]


def unread_formats(header: Header) -> Mapping[str, float]:
    """By formats of matrices that are not read as they are, their shares of all numbers in matrices."""
    sizes = Counter[str]()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            kind = tensor.tensor_type
            sizes[kind.name if kind not in FORMATS and kind not in _DENSE else ""] += int(tensor.n_elements)
    return {name: size / sizes.total() for name, size in sizes.items() if name}


def has_few_bits(header: Header) -> bool:
    """Whether weights of this file are decoded in the file's own bits."""
    in_few_bits = any(tensor.tensor_type in FORMATS for tensor in header.tensors)
    return in_few_bits and not unread_formats(header)


def load_in_few_bits(
    header: Header, config: PretrainedConfig, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """A model with the file's own bits in place of matrices, and the names of parameters that it lacks."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=torch.float32, **kwargs)
    dense: dict[str, Tensor] = {}
    packed: dict[str, tuple[Tensor, int, int]] = {}  # with rows and columns
    for name, tensor, rows in _read_all(header, config, _bytes_or_float32):
        if rows.dtype == torch.uint8:
            columns = int(tensor.shape[0])
            weight = torch.ops.self_speculation.weight_of_file(rows, int(tensor.tensor_type), columns)
            packed[name] = weight, len(rows), columns
        else:
            dense[name] = rows
    for name, matrix in packed.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        module, replaced = model.get_submodule(parent), model.get_submodule(name.removesuffix(".weight"))
        if isinstance(replaced, nn.Embedding):
            scale = getattr(replaced, "scalar_embed_scale", None)
            setattr(module, child, FewBitsEmbedding(*matrix, scale))
            if config.tie_word_embeddings:
                model.set_output_embeddings(FewBitsLinear(*matrix))
        else:
            bias = dense.pop(name.removesuffix("weight") + "bias", None)
            setattr(module, child, FewBitsLinear(*matrix, bias))
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), [name for name, weight in model.named_parameters() if weight.is_meta]


def read_weights(header: Header, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a model, by the names of its parameters."""

    def read(path: Path, tensor: ReaderTensor) -> Tensor:
        return _read(path, tensor, dtype if len(tensor.shape) > 1 else torch.float32)

    return {name: weight.to(dtype) for name, _, weight in _read_all(header, config, read)}


def _read_all(
    header: Header, config: PretrainedConfig, read: Callable[[Path, ReaderTensor], Tensor]
) -> Iterator[tuple[str, ReaderTensor, Tensor]]:
    """All weights, by the names of parameters, with transformers' order of rows; read on several threads."""
    architecture = header.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).state_dict()
    by_name_in_file = {names.get_name(name, (".weight", ".bias")): name for name in parameters}
    largest_first = sorted(header.tensors, key=lambda tensor: -tensor.n_bytes)
    tensors = {by_name_in_file[t.name]: t for t in largest_first if t.name in by_name_in_file}
    num_bytes = sum(tensor.n_bytes for tensor in tensors.values())

    def ordered(tensor: ReaderTensor) -> Tensor:
        weight = read(header.path, tensor)
        # Nothing is computed: numpy need not know bfloat16.
        plain = weight.view(torch.int16) if weight.dtype.itemsize == 2 else weight
        rows = processor.process(weights=plain.numpy(), name=tensor.name).weights
        return torch.from_numpy(np.ascontiguousarray(rows)).view(weight.dtype)

    title, num_threads = f"reading {header.path.name}", torch.get_num_threads()
    with progress(title, num_bytes) as advance, ThreadPoolExecutor(num_threads) as threads:
        for (name, tensor), weight in zip(
            tensors.items(), threads.map(ordered, tensors.values()), strict=True
        ):
            yield name, tensor, weight
            advance(tensor.n_bytes)


def _bytes_or_float32(path: Path, tensor: ReaderTensor) -> Tensor:
    """A matrix in few bits as the file has it, [rows, bytes]; others in float32."""
    if len(tensor.shape) != 2 or tensor.tensor_type not in FORMATS:
        return _read(path, tensor, torch.float32)
    rows = np.fromfile(path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
    return torch.from_numpy(rows).view(int(tensor.shape[1]), -1)


def _read(path: Path, tensor: ReaderTensor, dtype: torch.dtype) -> Tensor:
    shape = [*reversed(tensor.shape.tolist())]
    row, row_bytes = math.prod(shape[1:]), tensor.n_bytes // shape[0]
    weight = torch.empty(shape, dtype=dtype)
    start = int(tensor.data_offset)
    for rows in weight.split(max(1, _AT_A_TIME // row)):
        # Read, not mapped: pages of a mapping count as memory of this process. gguf dequantises 16 rows at a
        # time; these are one row of many blocks.
        blocks = np.fromfile(path, np.uint8, len(rows) * row_bytes, offset=start)[None]
        numbers = torch.from_numpy(gguf.dequantize(blocks, tensor.tensor_type)).view(rows.shape)
        rows.copy_(numbers)
        if dtype == torch.float16 and float(rows.abs().amax()) == math.inf:
            why = "weights beyond 65504: they need --dtype bfloat16 or float32"
            raise ValueError(f"{tensor.name} has {why}")
        start += blocks.nbytes
    return weight
