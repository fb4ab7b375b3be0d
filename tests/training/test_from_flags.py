"""Flags of train.py -> the arguments of the Trainer."""

import torch

from arguments import ModelArguments
from training.flags import OptimizationArguments
from training.from_flags import computed_in, trainer_settings


def test_on_a_gpu_auto_is_tf32(tmp_path, monkeypatch):
    """Guards against products in strict fp32 that nobody asked for, and TF32 where fp32 was asked for."""
    for name in ("training.from_flags", "transformers.training_args"):
        monkeypatch.setattr(f"{name}.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", (switched := []).append)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype, computed, is_tf32 in (("auto", "TF32", True), ("float32", "float32", False)):
        switched.clear()
        trainer_settings(OptimizationArguments(), ModelArguments(dtype=dtype, compile=True), tmp_path, gpu)
        assert switched[-1] == is_tf32
        assert computed_in(dtype, gpu) == computed
    assert computed_in("bfloat16", gpu) == "bfloat16"
    assert computed_in("auto", cpu) == "float32"
