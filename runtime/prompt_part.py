"""Run the prompt-only half of a transformer once per prompt instead of in every forward."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TEXT = "text"
KEPT = 2  # the prompt and the negative prompt, which alternate


class PromptPart:
    """The first half of a graph, from ``text`` to inputs of the second half by name.

    Results for the last two texts are cached. Only read-only arrays that own their data are cached: any other array may
    have changed since.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._kept: list[tuple[np.ndarray, Mapping[str, Any]]] = []

    def __call__(self, text: np.ndarray) -> Mapping[str, Any]:
        """ONNX Runtime values for the embeddings ``[1, 512, text width]``."""
        for known, values in self._kept:
            if known is text:
                return values
        values = self._compute(text)
        if text.flags.owndata and not text.flags.writeable:
            self._kept = [*self._kept[1 - KEPT :], (text, values)]
        return values

    def _compute(self, text: np.ndarray) -> Mapping[str, Any]:
        import onnxruntime

        given = {TEXT: onnxruntime.OrtValue.ortvalue_from_numpy(text)}
        return dict(zip(self._names, self._session.run_with_ort_values(None, given), strict=True))
