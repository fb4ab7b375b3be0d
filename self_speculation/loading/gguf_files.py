"""Models in `.gguf` files: weights in the file's bits or in other ones.

transformers reads such files by gguf's reader, which makes numpy views of each token and each merge: 6 to
13 s for a vocabulary of 150,000, several times over. Only the tokenizer needs them.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from self_speculation.config import LoadingWarning
from self_speculation.loading.gguf_header import Header, TensorInfo
from self_speculation.machine.progress import progress
from self_speculation.weights.few_bits import FORMATS, FewBitsEmbedding, FewBitsLinear

# Elements that are dequantised at a time: they stay in the processor's cache.
_AT_A_TIME = 2**18

_DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# Divisors of frequencies: for any length, within the original context, and beyond it.
ROTATION_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def storage_dtype(header: Header) -> torch.dtype:
    """uint8 if the operators read every matrix and one is quantised. Else the dtype of most matrices, or
    float16. Warns about formats without operators.
    """
    sizes = Counter[GGMLQuantizationType]()  # numbers of each format
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.quant_type] += math.prod(tensor.shape)
    unsupported = [quant_type for quant_type in sizes if quant_type not in (*FORMATS, *_DENSE)]
    for quant_type in unsupported:
        share = f"{sizes[quant_type] / sizes.total():.0%} of its weights are in {quant_type.name}"
        what = f"{share}, which no operator here has: all are read in 16 bits"
        warnings.warn(f"model {header.path}: {what}", LoadingWarning, stacklevel=4)
    if not unsupported and any(quant_type in FORMATS for quant_type in sizes):
        return torch.uint8
    return _DENSE.get(max(sizes, key=sizes.__getitem__), torch.float16)


def load_gguf(
    header: Header, config: PretrainedConfig, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, list[str]]:
    """A model on the CPU, and the names of parameters that the file lacks.

    Args:
        dtype: of all weights; None: matrices keep the file's bits, and vectors are float32.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class._from_config(config, dtype=dtype or torch.float32)

    def read(tensor: TensorInfo) -> Tensor:
        if dtype is None and len(tensor.shape) == 2 and tensor.quant_type in FORMATS:
            rows = np.fromfile(header.path, np.uint8, tensor.num_bytes, offset=tensor.start)
            return torch.from_numpy(rows).view(tensor.shape[0], -1)
        # Numbers of norms and biases are rounded after transformers' order, which may add to them.
        is_matrix = len(tensor.shape) > 1
        return read_tensor(header.path, tensor, dtype if dtype and is_matrix else torch.float32)

    dense: dict[str, Tensor] = {}
    for name, tensor, weight in _load_tensors(header, config, model.state_dict(), read):
        if weight.dtype != torch.uint8:
            dense[name] = weight.to(dtype or torch.float32)
            continue
        path = name.removesuffix(".weight")
        rows, columns = tensor.shape
        replaced = model.get_submodule(path)
        if isinstance(replaced, nn.Embedding):
            scale = getattr(replaced, "scalar_embed_scale", None)
            model.set_submodule(path, FewBitsEmbedding(weight, rows, columns, scale))
            if config.tie_word_embeddings:
                model.set_output_embeddings(FewBitsLinear(weight, rows, columns))
        else:
            bias = None if replaced.bias is None else replaced.bias.data  # a buffer, until it is read
            model.set_submodule(path, FewBitsLinear(weight, rows, columns, bias))
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    tensors = (*model.named_parameters(), *model.named_buffers())
    return model.eval(), [name for name, tensor in tensors if tensor.is_meta]


def _load_tensors(
    header: Header,
    config: PretrainedConfig,
    parameters: Iterable[str],
    read: Callable[[TensorInfo], Tensor],
) -> Iterator[tuple[str, TensorInfo, Tensor]]:
    """Yield parameter name, tensor and weight, the largest tensor first. Several threads read tensors, order
    their rows as transformers does, and move quantised blocks to where the operators want them.
    """
    architecture = header.metadata["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    by_name_in_file = {names.get_name(name, (".weight", ".bias")): name for name in parameters}
    largest_first = sorted(header.tensors, key=lambda tensor: -tensor.num_bytes)
    tensors = {by_name_in_file[t.name]: t for t in largest_first if t.name in by_name_in_file}
    if unknown := {t.name for t in largest_first} - by_name_in_file.keys() - {*ROTATION_TENSORS}:
        raise ValueError(f"{min(unknown)} is no tensor of a {config.model_type} model as transformers has it")
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())

    def ordered(tensor: TensorInfo) -> Tensor:
        weight = read(tensor)
        # Nothing is computed: numpy need not know bfloat16.
        plain = weight.view(torch.int16) if weight.dtype.itemsize == 2 else weight
        rows = processor.process(weights=plain.numpy(), name=tensor.name).weights
        weight = torch.from_numpy(np.ascontiguousarray(rows)).view(weight.dtype)
        if weight.dtype != torch.uint8:
            return weight
        return torch.ops.self_speculation.repack_weight(weight, int(tensor.quant_type), tensor.shape[1])

    title = f"reading {header.path.name}"
    num_threads = torch.get_num_threads()
    with progress(title, num_bytes) as advance, ThreadPoolExecutor(num_threads) as threads:
        for (name, tensor), weight in zip(
            tensors.items(), threads.map(ordered, tensors.values()), strict=True
        ):
            yield name, tensor, weight
            advance(tensor.num_bytes)


def read_tensor(path: Path, tensor: TensorInfo, dtype: torch.dtype) -> Tensor:
    row = math.prod(tensor.shape[1:])
    row_bytes = tensor.num_bytes // tensor.shape[0]
    weight = torch.empty(tensor.shape, dtype=dtype)
    start = tensor.start
    for rows in weight.split(max(1, _AT_A_TIME // row)):
        # Read, not mapped: pages of a mapping count as memory of this process. gguf dequantises 16 rows at a
        # time; here is one row of many blocks.
        blocks = np.fromfile(path, np.uint8, len(rows) * row_bytes, offset=start)[None]
        numbers = torch.from_numpy(gguf.dequantize(blocks, tensor.quant_type)).view(rows.shape)
        rows.copy_(numbers)
        if dtype == torch.float16 and float(rows.abs().amax()) == math.inf:
            why = "weights beyond 65504: they need --dtype bfloat16 or float32"
            raise ValueError(f"{tensor.name} has {why}")
        start += blocks.nbytes
    return weight
