"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

_PATIENCE = 5.0  # seconds


def hub_answers(repo: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub says anything about a repository, be it that there is none; asked once.

    What loads from the hub asks again and again for half a minute before it looks at what is cached.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo, "README.md", repo_type=kind), timeout=_PATIENCE)
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except Exception:  # without a network, each version of the hub's client raises its own
        return False
    return True
