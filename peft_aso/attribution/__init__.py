"""Attribution of an answer to a transformer's FFN neurons, and how alike two attributions are (Eq. 8-13).

Knows transformers and tensors, and nothing of adapters or training: it can be used alone.
"""

from __future__ import annotations

from .answer import MAX_ANSWER_TOKENS
from .config import AttributionConfig
from .integrated_gradients import integrated_gradients
from .neurons import NeuronLayer, find_neurons, unwrap
from .similarity import Prepared, average_ranks, prepare, similarity, similarity_matrix
from .vector import AttributionVector, Layout
from .window import FastWayUnsupported

__all__ = [
    "MAX_ANSWER_TOKENS",
    "AttributionConfig",
    "AttributionVector",
    "FastWayUnsupported",
    "Layout",
    "NeuronLayer",
    "Prepared",
    "average_ranks",
    "find_neurons",
    "integrated_gradients",
    "prepare",
    "similarity",
    "similarity_matrix",
    "unwrap",
]
