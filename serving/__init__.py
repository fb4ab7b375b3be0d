"""The server behind serve.py."""

from typing import Any

JSONObject = dict[str, Any]
