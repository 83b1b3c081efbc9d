"""Attribution of an answer to a transformer's FFN neurons, and how alike two attributions are (Eq. 8-13).

Knows transformers and tensors, and nothing of adapters or training: it can be used alone.
"""

from __future__ import annotations

from .answer import read_batch
from .config import AttributionConfig
from .fast import FastPathUnsupported, attribute
from .integrated_gradients import integrated_gradients
from .neurons import NeuronLayer, eval_mode, find_neurons, unwrap
from .similarity import normalized, similarity, similarity_matrix
from .vector import AttributionVector, Layout

__all__ = [
    "AttributionConfig",
    "AttributionVector",
    "FastPathUnsupported",
    "Layout",
    "NeuronLayer",
    "attribute",
    "eval_mode",
    "find_neurons",
    "integrated_gradients",
    "normalized",
    "read_batch",
    "similarity",
    "similarity_matrix",
    "unwrap",
]
