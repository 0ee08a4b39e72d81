"""What a prompt alone decides in a transformer, computed once a prompt instead of in every forward."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TEXT = "text"
KEPT = 2  # the prompt and the negative prompt, which take turns


class PromptPart:
    """The first half of a graph: ``text`` to what the second half takes of it, by name.

    The results for the last two texts are kept, if these are arrays of their own that cannot be written to; a text that
    its owner may change between two calls is worked on in every call.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._kept: list[tuple[np.ndarray, Mapping[str, Any]]] = []

    def __call__(self, text: np.ndarray) -> Mapping[str, Any]:
        """Values of ONNX Runtime for the embeddings ``[1, 512, text width]``."""
        for known, values in self._kept:
            if known is text:
                return values
        values = self._computed(text)
        if text.flags.owndata and not text.flags.writeable:
            self._kept = [*self._kept[1 - KEPT :], (text, values)]
        return values

    def _computed(self, text: np.ndarray) -> Mapping[str, Any]:
        import onnxruntime

        given = {TEXT: onnxruntime.OrtValue.ortvalue_from_numpy(text)}
        return dict(zip(self._names, self._session.run_with_ort_values(None, given), strict=True))
