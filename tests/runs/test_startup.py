"""Flags become a loaded model."""

import pytest
import torch

from arguments import GenerationConfig, ModelArguments
from runs.startup import load_generator
from self_speculation.threads import _GOVERNORS, most_threads


@pytest.mark.parametrize("threads", [None, 3])
def test_threads_are_fixed_or_follow_other_programs(threads, model_folder):
    """Guards against --threads that is not used, or that the governor changes again."""
    try:
        model = load_generator(
            ModelArguments(model=str(model_folder), threads=threads), GenerationConfig()
        ).model
        assert most_threads(model) == torch.get_num_threads() == (threads or 1)
        assert (model in _GOVERNORS) == (threads is None)
    finally:
        torch.set_num_threads(1)
