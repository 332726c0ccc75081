"""The service of LitServe that the server is measured beside; its processes import it by name."""

from typing import Any

import litserve


class Echo(litserve.LitAPI):
    """Gives a prompt back."""

    def setup(self, device: str) -> None: ...

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["prompt"])

    def predict(self, prompt: str) -> str:
        return prompt

    def encode_response(self, prompt: str) -> dict[str, str]:
        return {"prompt": prompt}
